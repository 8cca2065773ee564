"""The keys of ``engine=fastgen``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Union

from harness.config.checks import AUTO
from harness.config.key import key
from harness.config.schema import EngineConfig
from harness.engines.shared.order import Order


class Kernels(Enum):
    """What computes a pass: ``auto`` is triton, deepspeed or torch on CUDA, native or torch on CPUs."""

    auto = "auto"
    triton = "triton"
    deepspeed = "deepspeed"
    native = "native"
    torch = "torch"


class Drafts(Enum):
    """Where drafts come from: ``lookup`` is what followed the same tokens before, in the prompt or the output."""

    lookup = "lookup"


@dataclass
class FastGenConfig(EngineConfig):
    """How full its passes are, how large its KV cache, and what computes them.

    ``token_budget``, ``max_sequences`` and ``kv_memory`` may be ``auto`` until ``harness.running.sizes`` has settled
    them; an engine never sees it.
    """

    name: str = key("fastgen", "set by the option")
    kernels: Kernels = key(Kernels.auto, "what computes a pass: `auto` is the first that can run here")
    token_budget: Any = key(
        AUTO,
        "tokens in a pass: all running decodes, then prompt chunks",
        unit="tokens",
        allowed="whole number, at least `max_sequences`; `auto`",
    )
    max_sequences: Any = key(AUTO, "sequences running at a time", unit="sequences", allowed="whole number, `auto`")
    order: Order = key(
        Order.longest_first,
        "longest `output_len` first, so that no long request is left alone at the end, or the file's order",
    )
    kv_block_size: int = key(
        64, "tokens in a block of the KV cache (`deepspeed` kernels have their own)", unit="tokens"
    )
    kv_memory: Union[int, float, str] = key(  # noqa: UP007 (OmegaConf reads typing.Union)
        AUTO,
        "the KV cache: a fraction of the free memory, or so much",
        unit="bytes",
        allowed="a fraction up to 1, bytes, or a size such as `2GiB`; `auto`",
    )
    prefix_sharing: bool = key(
        False, "prompts that begin with the same tokens share whole blocks of the KV cache, computed once"
    )
    draft: Drafts | None = key(
        None,
        "drafts what followed the same tokens before, in the prompt or the output; kept is what the model chooses too "
        "(`native` and `torch` kernels)",
    )
    draft_len: int = key(4, "drafts of a sequence in a pass, at most", unit="tokens")
    quantization: str | None = key(
        None, "`deepspeed` kernels: FP6 weights, float16 activations (A100)", allowed="`null`, `wf6af16`"
    )
