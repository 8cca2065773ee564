"""launch/compile_kernels.py: real binaries for GPUs that are not here."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.runs import ROOT, variables

pytest.importorskip("triton", reason="Triton is not installed")
SCRIPT = "launch/compile_kernels.py"


def compiled(*words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the script, after statements that change what it finds."""
    prepared = f"import runpy, sys; sys.argv = {[SCRIPT, *words]!r}; sys.path[0] = 'launch'; {before}"
    code = f"{prepared}\nrunpy.run_path({SCRIPT!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables(), capture_output=True, text=True)


@pytest.mark.slow
def test_what_a_kernel_takes() -> None:
    done = compiled("--arch", "sm_90", "--models", "llama2_7b", "--kernels", "silu,choose")  # one rank chooses nothing
    assert done.returncode == 0, done.stderr
    _, line, end = done.stdout.splitlines()
    assert line.split()[:5] == ["llama2_7b", "silu", "sm_90", "4", "3"]
    assert end.startswith("1 kernels in ")
    assert end.endswith(" 0 at fault")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.full)])
def test_nothing_spills(dtype: str) -> None:
    done = compiled("--models", "llama2_70b,danube_1.8b,phi3_mini", "--dtype", dtype, "--kernels", "attention,join")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{kind}\n" in done.stdout for kind in ("mma.sync", "wgmma", "tcgen05.mma"))


@pytest.mark.slow
def test_what_spills_is_named() -> None:
    """Of a tile of twice the rows four warps cannot hold the numbers."""
    attention = "harness.engines.fastgen.runners.triton.kernels.attention"
    few = f"import {attention} as attention; attention.PROMPT_ROWS = 128"
    done = compiled("--arch", "sm_80", "--models", "llama2_7b", "--kernels", "attention, prompts", before=few)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SPILLS" in done.stdout


def test_refusals_are_one_line() -> None:
    absent = compiled(before="sys.modules['triton'] = None")
    assert absent.returncode == 2
    assert absent.stderr.count("\n") == 1
    assert "Triton is not installed" in absent.stderr
    unknown = compiled("--arch", "sm_1")
    assert unknown.returncode == 2
    assert "--arch: 'sm_1'; give some of sm_80, sm_90, sm_100" in unknown.stderr


ANYWHERE = """
import sys
sys.path.insert(0, "launch")
import compile_kernels
recorder = compile_kernels.Recorder(90)
recorder.record()
import torch
from harness.engines.fastgen.runners.triton.kernels import attention, rotary, sampling
real = torch.zeros(4096, dtype=torch.int32)
def empty(*size, dtype=torch.bfloat16):
    return torch.empty(size, dtype=dtype, device="meta")
qkv, cache, out, single = empty(9, 768), empty(9, 2, 16, 64), empty(9, 512), empty(99, 32, dtype=torch.float32)
for place, rows in ((0, 16), (1, 1), (2, 17)):
    figures = real[place : place + rows]
    table = real[place : place + 7 * rows].view(7, rows)
    chunks = attention.Chunks(figures, figures, figures, figures, table)
    for splits in (1, 2):
        tiles = attention.Tiles(figures, figures, 16, splits)
        attention.attend(qkv, cache, cache, out, chunks, tiles, 1.0, attention.Parts.of(4, 64, 9, qkv.device))
    rotary.rotate_and_store(qkv, single, single, figures, figures, cache, cache)
    sampling.embed(figures, figures, out, out)
    values = torch.zeros(place + rows)[place:]
    sampling.argmax(empty(rows, 512), figures, values, 1 + 15 * place)
    sampling.choose(figures[None].expand(8, rows), values[None].expand(8, rows), figures)
print(len(recorder.made), len({made.hash for made in recorder.made}))
"""


@pytest.mark.slow
def test_nothing_is_compiled_anew_when_figures_move_or_rows_change() -> None:
    """A pass's figures begin anywhere in one buffer, and their numbers change: compiling would fall into the clock."""
    done = subprocess.run([sys.executable, "-c", ANYWHERE], cwd=ROOT, env=variables(), capture_output=True, text=True)
    assert done.stdout == "21 7\n", done.stdout + done.stderr
