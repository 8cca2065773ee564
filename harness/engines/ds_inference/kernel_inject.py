"""DeepSpeed's injected kernels: fused decoder layers that keep the keys and values of a static batch themselves.

They were written for earlier transformers, so little is taken for granted: the layers are driven here step by step
(their ``generate`` would need the caches of transformers 4), and models they cannot compute are refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.basics.errors import UserError
from harness.engines.ds_inference.static_cache import left_padded
from harness.engines.shared import deepspeed_ops

OPTIONS = {
    "replace_with_kernel_inject": True,
    "return_tuple": False,  # a decoder layer of transformers 5 returns a tensor
    "min_out_tokens": 1,
}


def build(aloud: bool) -> None:
    """Compiles the kernels where that was never done; raises UserError where it cannot be."""
    try:
        deepspeed_ops.load(deepspeed_ops.INJECTED, aloud)
    except deepspeed_ops.OpsError as error:
        found = f"true: DeepSpeed's injected kernels cannot be built: {error}"
        raise UserError("engine.kernel_inject", found, "use engine.kernel_inject=false") from error


class InjectedBatch:
    """Drives the injected model through one batch after the other, always with all rows.

    Args:
        module: the model with injected layers; ``reset_cache`` empties their workspace.
        rows: sequences that the workspace has room for.
    """

    def __init__(self, module: Any, rows: int, device: str, dtype: torch.dtype) -> None:
        self.module = module
        self.rows = rows
        self.device = device
        self.dtype = dtype
        self.begins = torch.zeros(rows, dtype=torch.int64)
        self.column = 0

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Begins a batch; returns the logits ``[rows, vocab]`` after each prompt, those of empty rows too."""
        self.module.reset_cache()
        # One column alone would look like a decode step to the layers.
        self.column = columns = max(2, *(len(prompt) for prompt in prompts))
        filled = prompts + [[0]] * (self.rows - len(prompts))
        self.begins = torch.tensor([columns - len(prompt) for prompt in filled])
        ids = torch.tensor([[0] * (columns - len(prompt)) + prompt for prompt in filled])
        positions = (torch.arange(columns)[None] - self.begins[:, None]).clamp(min=0)
        return self._forward(ids, positions, left_padded(self.begins, columns))

    def decode(self, tokens: list[int]) -> Tensor:
        """Feeds the newest token of each row, empty rows included; returns the logits ``[rows, vocab]``."""
        positions = self.column - self.begins[:, None]
        self.column += 1
        sees = torch.arange(self.column)[None] >= self.begins[:, None]
        return self._forward(torch.tensor(tokens)[:, None], positions, sees[:, None])

    @torch.inference_mode()
    def _forward(self, ids: Tensor, positions: Tensor, sees: Tensor) -> Tensor:
        mask = torch.zeros(sees.shape, dtype=self.dtype).masked_fill_(~sees, torch.finfo(self.dtype).min)
        output = self.module(
            input_ids=ids.to(self.device),
            position_ids=positions.to(self.device),
            attention_mask=mask[:, None].to(self.device),
            use_cache=False,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
