"""How far rounding alone moves a model's choices: what near-ties' bounds in ``harness/models/judging.py`` rest on.

The ids of a finished run are fed to Hugging Face's model in each type; wherever a type would choose another token than
float32 does, its gap is the distance of that token below the best in float32, in standard deviations of the logits.
Beside it stands how close the second best token comes to the best: a wrong token that is closer than the bound would
pass for a near-tie.

    python launch/measure_rounding.py results/RUN_ID [float64 bfloat16 float16]
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from harness.config.schema import ModelConfig
from harness.models import loading, locate
from harness.models.tokenizer import load_tokenizer
from harness.verify import runs


def main() -> None:
    """Prints a line for each type."""
    run = runs.load(Path(sys.argv[1]))
    source = locate.locate(run.group("model", ModelConfig))
    requests = runs.read_requests(run, needed=True).by_index
    assert requests is not None
    tokenizer = load_tokenizer(source)
    rows = []
    for line in run.completions:
        prompt = tokenizer(requests[line["index"]].prompt).input_ids
        rows.append((len(prompt) - 1, torch.tensor([prompt + line["token_ids"][:-1]])))
    model = loading.load_model(source, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        exact = [model(ids, use_cache=False).logits[0, first:] for first, ids in rows]
    spread = [logits.std(-1) for logits in exact]
    top = [logits.topk(2, -1).values for logits in exact]
    margins = torch.cat([(two[:, 0] - two[:, 1]) / each for two, each in zip(top, spread, strict=True)])
    print(f"{len(margins):,} tokens; logits spread by {torch.cat(spread).mean():.2f}")
    for bound in (1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25):
        print(f"the second best is within {bound:g} of the best at {(margins <= bound).float().mean():.3%} of them")
    for name in sys.argv[2:] or ("float64", "bfloat16", "float16"):
        other = copy.deepcopy(model).to(getattr(torch, name))
        with torch.inference_mode():
            found = [other(ids, use_cache=False).logits[0, first:] for first, ids in rows]
        gaps, moved = [], []
        for logits, mine, each in zip(exact, found, spread, strict=True):
            chosen = logits.gather(-1, mine.argmax(-1, keepdim=True))[:, 0]
            gaps.append((logits.max(-1).values - chosen) / each)
            moved.append((mine.double() - logits.double()).abs().amax(-1) / each)
        gap = torch.cat(gaps)
        print(
            f"{name}: {(gap > 0).sum()} other tokens, gaps up to {gap.max():.2g}; "
            f"logits move by up to {torch.cat(moved).max():.2g} standard deviations"
        )


if __name__ == "__main__":
    main()
