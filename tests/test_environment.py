"""environment.py: what it says about this machine, and about machines described by real files."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from harness.machine import cgroups, device, memory, snapshot

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def ask(expression: str, **variables: str) -> str:
    """Evaluates an expression over ``environment`` in a fresh process, DS_ACCELERATOR unset unless given."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from harness.machine import device, memory"
    script += f"; print({expression})"
    clean = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(("value", "expected"), [("cpu", "cpu"), ("cuda", "cuda"), (" CPU ", "cpu")])
def test_ds_accelerator_decides(monkeypatch: pytest.MonkeyPatch, value: str, expected: str) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", value)
    assert device.accelerator() == expected


@pytest.mark.parametrize("variables", [{}, {"DS_ACCELERATOR": ""}, {"DS_ACCELERATOR": "nonsense"}])
def test_accelerator_is_what_torch_would_find(variables: dict[str, str]) -> None:
    import torch

    expected = "cuda" if torch.cuda.is_available() else "cpu"
    asked = ask("device.accelerator(), 'torch' in sys.modules", **variables)
    assert asked == f"{expected} False"  # asked without importing torch


def test_a_hidden_gpu_is_none() -> None:
    assert ask("device.accelerator()", CUDA_VISIBLE_DEVICES="") == "cpu"


def test_torch_cuda_version_is_torchs_own() -> None:
    import torch

    assert device.torch_cuda_version() == torch.version.cuda


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "13.0"),
        ("__version__ = '2.11'\ncuda = '12.8'\n", "12.8"),
        ("cuda: Optional[str] = None\n", None),
        ("__all__ = ['cuda']\n", None),
        ("cuda = open('x')\n", None),
        (None, None),
    ],
)
def test_cuda_version_is_read_from_text(tmp_path: Path, text: str | None, expected: str | None) -> None:
    if text is not None:
        (tmp_path / "version.py").write_text(text)
    assert device._cuda_version_in(tmp_path / "version.py") == expected


def test_cores_follow_the_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    assert ask(f"__import__('os').sched_setaffinity(0, {{{one}}}) or device.cores()") == "1"
    assert device.cores() == len(os.sched_getaffinity(0))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bfloat16_is_what_the_kernel_reports() -> None:
    words = Path("/proc/cpuinfo").read_text().split()
    assert device.supports_bfloat16_on_cpu() is ("avx512_bf16" in words or "amx_bf16" in words)


# --- memory ---


def group(path: Path, **files: object) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(f"{content}\n")


def test_cgroup_v2_takes_the_tightest_ancestor(tmp_path: Path) -> None:
    group(
        tmp_path / "pod" / "job",
        memory__max=8 * GIB,
        memory__high="max",
        memory__current=5 * GIB,
        memory__stat=f"anon 1\nfile 2\ninactive_file {2 * GIB}",
    )
    assert cgroups.headroom("0::/pod/job\n", tmp_path) == 5 * GIB
    group(tmp_path / "pod", memory__max=6 * GIB, memory__current=5 * GIB, memory__stat="inactive_file 0")
    assert cgroups.headroom("0::/pod/job\n", tmp_path) == 1 * GIB
    group(tmp_path / "pod", memory__max=4 * GIB)  # lowered below what is in use
    assert cgroups.headroom("0::/pod/job\n", tmp_path) == 0
    group(tmp_path / "pod", memory__max="max")
    group(tmp_path / "pod" / "job", memory__high=7 * GIB)
    assert cgroups.headroom("0::/pod/job\n", tmp_path) == 4 * GIB


def test_cgroup_v2_without_a_limit(tmp_path: Path) -> None:
    group(tmp_path, memory__max="max", memory__current=GIB)
    assert cgroups.headroom("0::/\n", tmp_path) is None
    assert cgroups.headroom("0::/../../elsewhere\n", tmp_path) is None
    assert cgroups.headroom("", tmp_path) is None
    assert cgroups.headroom("0::/\n", tmp_path / "nothing") is None


def test_cgroup_v1_in_a_container_that_sees_itself_as_the_root(tmp_path: Path) -> None:
    group(
        tmp_path / "memory",
        memory__limit_in_bytes=4 * GIB,
        memory__usage_in_bytes=3 * GIB,
        memory__stat=f"inactive_file 7\ntotal_inactive_file {GIB}",
    )
    membership = "5:cpu,cpuacct:/docker/abc\n4:hugetlb,memory:/docker/abc\n0::/\n"
    assert cgroups.headroom(membership, tmp_path) == 2 * GIB
    group(tmp_path / "memory", memory__limit_in_bytes=9223372036854771712)
    assert cgroups.headroom(membership, tmp_path) is None


def test_available_memory_is_within_the_machine() -> None:
    import psutil  # type: ignore[import-untyped]

    assert 0 < memory.available_memory_bytes() <= psutil.virtual_memory().total


def test_peak_memory_counts_what_was_held() -> None:
    before, after = (int(ask(f"(b'x' * {size}) and memory.peak_memory_bytes('cpu')")) for size in (1, 200 << 20))
    assert 190 << 20 < after - before < 300 << 20
    assert ask("memory.peak_memory_bytes('cuda')") == "0"


# --- versions, git, snapshot ---


def test_package_versions_are_those_installed() -> None:
    versions = snapshot.package_versions()
    assert versions["torch"] == metadata.version("torch")
    assert versions["hydra-core"] == metadata.version("hydra-core")
    assert set(versions) <= set(snapshot.PACKAGES)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    source = tmp_path / "harness" / "__init__.py"
    source.parent.mkdir()
    source.write_text("one\n")
    assert snapshot.git_state(tmp_path) is None  # no checkout
    git("init", "-q")
    git("add", "harness/__init__.py")
    assert snapshot.git_state(tmp_path) is None  # no commit
    git("rm", "-q", "--cached", "harness/__init__.py")
    git("commit", "-q", "--allow-empty", "-m", "something else")
    assert snapshot.git_state(tmp_path) is None  # a checkout that does not track the harness
    git("add", "harness/__init__.py")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert snapshot.git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "dataset.json").write_text("untracked")
    assert snapshot.git_state(tmp_path) == {"commit": commit, "dirty": False}
    source.write_text("two\n")
    assert snapshot.git_state(tmp_path) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert snapshot.git_state(tmp_path) == {"commit": commit, "dirty": True}
    if os.geteuid() == 0:
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
        os.chown(tmp_path, 12345, 12345)
        os.chown(tmp_path / ".git", 12345, 12345)
        assert snapshot.git_state(tmp_path) is None  # git refuses someone else's checkout
    monkeypatch.setenv("PATH", str(tmp_path))
    assert snapshot.git_state(tmp_path) is None  # no git


def test_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SECRET_TOKEN", "not for a record")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    found = snapshot.snapshot("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["python"] == platform.python_version()
    assert found["cpu"]["cores_visible"] == device.cores()
    assert found["device_name"] == device.device_name("cpu") != ""
    assert found["env"]["OMP_NUM_THREADS"] == "1"
    assert "MKL_NUM_THREADS" not in found["env"]
    assert "not for a record" not in json.dumps(found)


def test_a_missing_gpu_has_no_name() -> None:
    assert ask("repr(device.device_name('cuda'))", CUDA_VISIBLE_DEVICES="") == "''"


@pytest.mark.gpu
def test_gpu_is_named_as_torch_names_it() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert device.device_name("cuda") == torch.cuda.get_device_name(0)
