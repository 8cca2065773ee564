"""Compiles the Triton kernels for GPUs that need not be there, and says what each takes of a processor.

    python launch/compile_kernels.py [--arch sm_80,sm_90,sm_100] [--dtype float16] [--models A,B] [--kernels A,B]

The functions that launch the kernels in a run are called with tensors without data, in models' shapes, and what they
launch is compiled instead: specialised, and with warps and stages, as in a run. Registers and bytes of stack, which is
where registers are spilled to, are read from the binary by the cuobjdump that Triton brings. The exit status is 1 if
anything spills or needs more shared memory than the card has for a program, 2 without Triton.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

from harness.models.architecture import attention_heads

BLOCK_SIZE = 64
MATRIX = ("mma.sync", "wgmma", "tcgen05.mma")  # matrix instructions of sm_80, sm_90 and sm_100


@dataclass(frozen=True, slots=True)
class Card:
    """What a processor (SM) has: CUDA C++ Programming Guide, technical specifications per compute capability.

    Attributes:
        shared: bytes of shared memory for all programs together. Each takes 1 KiB more than it asks for, and one may
            ask for all the rest.
        columns: of tensor memory.
    """

    shared: int
    columns: int = 0
    registers: int = 65536
    threads: int = 2048
    programs: int = 32


CARDS = {"sm_80": Card(164 * 1024), "sm_90": Card(228 * 1024), "sm_100": Card(228 * 1024, 512)}
# Sizes from the config.json of meta-llama/Meta-Llama-3-8B, Qwen/Qwen2-7B, Qwen/Qwen3-8B, h2oai/h2o-danube-1.8b-base
# and, for its heads alone, microsoft/Phi-3-mini-4k-instruct.
KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")
SIZES = {
    "llama3_8b": (4096, 14336, 32, 8, 128256, 128),
    "qwen2_7b": (3584, 18944, 28, 4, 152064, 128),
    "qwen3_8b": (4096, 12288, 32, 8, 151936, 128),
    "danube_1.8b": (2560, 6912, 32, 8, 32000, 80),
    "phi3_mini": (3072, 8192, 32, 32, 32064, 96),
}
OURS = ("llama2_7b", "llama2_70b", "llama2_13b", "smollm2_135m")  # in conf/model
KNOWN = (*OURS, *SIZES)
DEFAULT = "llama2_7b,llama2_70b,llama3_8b,qwen2_7b"
RANKS = {"llama2_70b": 8}
HEAD_NORMS = ("qwen3_8b",)


@dataclass(frozen=True, slots=True)
class Sizes:
    """One rank's part of a model."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    ranks: int
    head_norms: bool


def sizes(name: str) -> Sizes:
    """Returns what one rank of a model holds."""
    if name in SIZES:
        architecture: dict[str, Any] = dict(zip(KEYS, SIZES[name], strict=True))
    else:
        architecture = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())["architecture"]
    ranks = RANKS.get(name, 1)
    heads, kv_heads, head_dim = attention_heads(architecture)
    inner, vocabulary = architecture["intermediate_size"] // ranks, architecture["vocab_size"] // ranks
    hidden = architecture["hidden_size"]
    return Sizes(hidden, inner, heads // ranks, kv_heads // ranks, head_dim, vocabulary, ranks, name in HEAD_NORMS)


@dataclass
class Recorder:
    """Stands for a GPU and its driver: what is launched is compiled for it, and kept."""

    arch: int
    made: list[Any] = field(default_factory=list)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def record(self) -> None:
        """Takes the place of the driver, and of launching."""
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        launch = JITFunction.run

        def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **more: Any) -> None:
            self.made.append(launch(kernel, *arguments, grid=grid, warmup=True, **more))

        driver.set_active(self)
        JITFunction.run = compile_only


def launches(one: Sizes, dtype: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields what each of a pass's launches is called, and the launch."""
    import torch

    from harness.engines.fastgen.runners.triton.kernels import activation, attention, norm, rotary, sampling

    def empty(*size: int, kind: Any = dtype) -> Any:
        return torch.empty(size, dtype=kind, device="meta")

    def whole(*size: int) -> Any:
        return empty(*size, kind=torch.int32)

    rows, single = 64, torch.float32
    x, weight, ids = empty(rows, one.hidden), empty(one.hidden), whole(rows)
    qkv = empty(rows, (one.heads + 2 * one.kv_heads) * one.head_dim)
    cache = empty(1000, one.kv_heads, BLOCK_SIZE, one.head_dim)
    table = empty(4096, one.head_dim // 2, kind=single)
    head_norms = (empty(one.head_dim), empty(one.head_dim)) if one.head_norms else None
    yield "embed", lambda: sampling.embed(ids, ids, empty(one.vocabulary, one.hidden), x)
    yield "norm", lambda: norm.add_rms_norm(None, x, weight, 1e-5, x)
    yield "norm, added", lambda: norm.add_rms_norm(x, x, weight, 1e-5, x)
    turn = "rotary, head norms" if head_norms else "rotary"
    yield turn, lambda: rotary.rotate_and_store(qkv, table, table, ids, ids, cache, cache, head_norms, 1e-6)
    group = one.heads // one.kv_heads
    chunks = attention.Chunks(ids, ids, ids, ids, whole(rows, 64))
    room = attention.Parts.of(group, one.head_dim, 132, torch.device("meta"))
    for decode, splits in ((True, 1), (True, attention.MOST_SPLITS), (False, 1)):
        tiles = attention.Tiles(ids, ids, attention.tile_rows(group, decode), splits)
        name = "attention, " + (("decodes" if splits == 1 else f"{splits} parts") if decode else "prompts")
        out = empty(rows, one.heads * one.head_dim)
        yield name, functools.partial(attention.attend, qkv, cache, cache, out, chunks, tiles, 0.1, room)
    yield "silu", lambda: activation.silu_and_multiply(empty(rows, 2 * one.inner), empty(rows, one.inner))
    values = empty(rows, kind=single)
    yield "argmax", lambda: sampling.argmax(empty(rows, one.vocabulary), ids, values, one.vocabulary)
    if one.ranks > 1:
        yield "choose", lambda: sampling.choose(whole(one.ranks, rows), empty(one.ranks, rows, kind=single), ids)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a program of a compiled kernel takes."""

    warps: int
    registers: int  # of a thread
    stack: int  # bytes of a thread
    shared: int  # bytes
    columns: int
    matrix: str

    def programs(self, card: Card) -> int:
        """Returns how many fit on a processor; registers are given to a warp in lots of 256."""
        lot = -(-self.registers * 32 // 256) * 256
        fits = [
            card.registers // (lot * self.warps),
            card.shared // (self.shared + 1024),
            card.threads // (32 * self.warps),
            card.programs,
        ]
        return min(fits + ([card.columns // self.columns] if self.columns else []))

    def faults(self, card: Card) -> list[str]:
        """Returns what is wrong with it."""
        spills = [f"SPILLS {self.stack} B"] if self.stack else []
        return spills + (["TOO MUCH SHARED MEMORY"] if self.shared > card.shared - 1024 else [])


def figures(kernel: Any) -> Figures:
    """Reads a compiled kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    meta = kernel.metadata
    matrix = next((one for one in MATRIX if one in kernel.asm["ptx"]), "-")
    return Figures(meta.num_warps, registers, stack, meta.shared, getattr(meta, "tmem_size", 0) or 0, matrix)


LINE = "{:<12} {:<19} {:<7} {:>5} {:>6} {:>9} {:>6} {:>16} {:>8}  {:<11} {}"


def compiled(arch: str, models: list[str], kernels: list[str], dtype: Any, recorder: Recorder) -> Iterator[bool]:
    """Prints a line for each kernel of each model that no other line is the same as; yields whether it is right."""
    card, seen = CARDS[arch], set()
    for model in models:
        ranks = f"/{RANKS[model]}" if model in RANKS else ""
        for name, launch in launches(sizes(model), dtype):
            if kernels and not any(name.startswith(one) for one in kernels):
                continue
            recorder.made.clear()
            launch()
            for kernel, what in zip(recorder.made, (name, name.replace("attention", "join")), strict=False):
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                found = figures(kernel)
                shared = f"{found.shared / 1024:.1f} of {card.shared / 1024 - 1:.0f}"
                faults = found.faults(card)
                print(
                    LINE.format(
                        model + ranks, what, arch, found.warps, kernel.metadata.num_stages, found.registers,
                        found.stack, shared, found.programs(card), found.matrix, ", ".join(faults),
                    ).rstrip(),
                    flush=True,
                )  # fmt: skip
                yield not faults


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(CARDS), help=f"of {', '.join(CARDS)}")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--models", default=DEFAULT, help=f"of {', '.join(KNOWN)}")
    parser.add_argument("--kernels", default="", help="those whose names begin so: embed, norm, attention, ...")
    asked = parser.parse_args()
    archs, models = asked.arch.split(","), asked.models.split(",")
    for option, given, known in (("--arch", archs, CARDS), ("--models", models, KNOWN)):
        if unknown := [one for one in given if one not in known]:
            parser.error(f"{option}: {unknown[0]!r}; give some of {', '.join(known)}, with commas between")
    if importlib.util.find_spec("triton") is None:
        print("error: Triton is not installed; PyTorch for CUDA brings it, or pip install triton", file=sys.stderr)
        return 2
    import torch

    started = time.monotonic()
    right: list[bool] = []
    print(LINE.format("model", "kernel", "card", "warps", "stages", "registers", "spills", "shared KiB", "programs",
                      "matrix", "").rstrip())  # fmt: skip
    recorder = Recorder(0)
    recorder.record()
    for recorder.arch in (int(arch.removeprefix("sm_")) for arch in archs):
        kernels = [one for one in asked.kernels.split(",") if one]
        right += compiled(f"sm_{recorder.arch}", models, kernels, getattr(torch, asked.dtype), recorder)
    print(f"{len(right)} kernels in {time.monotonic() - started:.0f} s, {right.count(False)} at fault")
    return 0 if all(right) and right else 1


if __name__ == "__main__":
    sys.exit(main())
