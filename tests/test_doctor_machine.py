"""The doctor's look at a machine: packages, extensions, compilers, GPUs, and the hosts of a launch."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from support import driver
from support.hosts import NAMESPACES, NETWORK, networked
from support.runs import ROOT, variables

from harness.basics.errors import UserError
from harness.doctor import heavy, hosts, machine, pairs
from harness.doctor.findings import Findings, Outcome
from harness.doctor.heavy import Heavy
from harness.machine import build_locks


class Heard(Heavy):
    """A process that has said all that it had to say."""

    def __init__(self, *entries: dict[str, Any]) -> None:
        self.entries = entries

    def rest(self, key: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if key in entry]


# --- what takes seconds ---


def test_a_package_that_ends_python_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn_one.py").write_text("raise ImportError('no such\\nsymbol')")
    (tmp_path / "deadly_one.py").write_text("import os, signal; print('a line'); os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    process = Heavy(["json", "torn_one", "deadly_one", "csv", "not_there"])
    found = Findings(aloud=False)
    heavy.packages(found, process)
    process.close()
    assert [str(one).partition("; ")[0] for one in found.all] == [
        f"[ok] packages: json {json.__version__} imports",
        "[no] packages: torn_one cannot be imported: ImportError: no such symbol",
        "[no] packages: deadly_one cannot be imported: Python was ended by SIGSEGV",
        "[no] packages: csv cannot be imported: not tried, since Python was ended by SIGSEGV",
        "[no] packages: not_there is not installed",
    ]


def test_an_import_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endless_one.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(heavy, "LIMIT_S", 5.0)
    process = Heavy(["endless_one"])
    assert process.package("endless_one")["error"] == "it took longer than 5 s"
    assert not process._process.running


def test_deepspeed_s_extensions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(heavy.ragged_kernels, "not_installed", lambda: None)
    monkeypatch.setattr(heavy.ragged_kernels, "no_compiler", lambda: "there is no nvcc")
    for name in ("ragged_ops", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        (tmp_path / name / build_locks.OWNER).write_text(socket.gethostname())
    (tmp_path / "busy").mkdir()
    with open(tmp_path / "busy" / "lock", "w"):  # as a builder keeps it
        found = Findings(aloud=False)
        entry = {"folder": str(tmp_path / "x"), "built": False}
        entries = [{"extension": "ragged_ops"} | entry | {"built": True}, {"extension": "ragged_device_ops"} | entry]
        entries += [{"extension": "inference_core_ops"} | entry | {"compatible": False, "complaint": "too old"}]
        entries += [{"extension": "transformer_inference"} | entry, {"extension": "odd", "error": "OSError: full"}]
        monkeypatch.setenv("DS_ACCELERATOR", "cuda")
        heavy.extensions(found, Heard({"extensions": str(tmp_path)}, *entries))
    assert [str(one).partition("; ")[0].removeprefix("[") for one in found.all] == [
        f"ok] extensions: ragged_ops: built, in {tmp_path}",
        "note] extensions: ragged_device_ops: not built yet",
        "no] extensions: inference_core_ops: cannot be built: too old",
        "no] extensions: transformer_inference: not built: there is no nvcc",
        "no] extensions: odd: OSError: full",
        f"note] extensions: {tmp_path}/mine/lock was left behind by a build that was killed",
        f"note] extensions: {tmp_path}/ragged_ops/lock was left behind by a build that was killed",
    ]
    assert found.all[-2].remedy.startswith("rm ") and found.all[-1].remedy == "the next build takes it away"
    assert "python launch/build_kernels.py builds them" in found.all[1].remedy


@pytest.mark.parametrize("count", range(2, 10))
def test_all_pairs_take_their_turn(count: int) -> None:
    turns = pairs.rounds(range(count))
    assert sorted(pair for turn in turns for pair in turn) == sorted(combinations(range(count), 2))
    for turn in turns:
        places = [place for pair in turn for place in pair]
        assert len(places) == len(set(places)) == count // 2 * 2
    assert len(turns) == count - 1 + count % 2


@pytest.mark.slow
def test_a_process_that_stops_answering_ends_its_pair_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    three = pairs.Pairs("gloo", range(3))
    try:
        assert {pair: error for pair, error, _ in three.tried()} == dict.fromkeys(combinations(range(3), 2))
        monkeypatch.setattr(pairs, "PAIR_S", 4.0)
        os.kill(three._processes[0]._process.pid, signal.SIGSTOP)
        found = Findings(aloud=False)
        (wrong,) = pairs.check(found, three)
        assert wrong.startswith("two processes on this host cannot add numbers over gloo: ")
        assert [one.outcome for one in found.all] == [Outcome.no, Outcome.ok], "a new process takes its place"
    finally:
        three.close()


@pytest.mark.slow
def test_a_backend_that_is_not_there_is_a_finding() -> None:
    two = pairs.Pairs("nothing", range(2))
    found = Findings(aloud=False)
    wrong = pairs.Pairs.tried(two)
    errors = [error for _, error, _ in wrong]
    two.close()
    assert len(errors) == 1 and "nothing" in str(errors[0]).lower()
    assert found.all == []


# --- compilers and kernels ---


def test_a_compiler_that_is_too_old_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "old-g++"
    complaint = "cc1plus: error: unrecognized option '-m'"
    old.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit\necho {shlex.quote(complaint)} >&2; exit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(old))
    found = Findings(aloud=False)
    machine.compilers(found)
    assert f"cannot compile the kernels: {complaint}" in found.all[0].text


@pytest.mark.parametrize(
    ("release", "outcome", "joint"), [("13.0", "ok", ","), ("13.1", "note", ", and"), ("12.8", "no", ", and")]
)
def test_nvcc_is_compared_with_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, outcome: str, joint: str
) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(machine.device, "torch_cuda_version", lambda: "13.0")
    found = Findings(aloud=False)
    machine._nvcc(found)
    said = f"nvcc {release} ({nvcc}){joint} torch is built for CUDA 13.0"
    assert (found.all[0].outcome.value, found.all[0].text) == (outcome, said)


def test_deepspeed_says_itself_whether_it_would_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch
    from deepspeed.ops.op_builder.inference_core_ops import InferenceCoreBuilder
    from torch.utils import cpp_extension

    from harness.doctor.probe import _buildable

    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("DS_SKIP_CUDA_CHECK", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    said = _buildable("inference_core_ops", InferenceCoreBuilder())
    assert said["compatible"] is False
    assert "Installed CUDA version 13.1 does not match the version torch was compiled with 13.0" in said["complaint"]
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    assert _buildable("inference_core_ops", InferenceCoreBuilder())["compatible"] is True


# --- GPUs, by a stand-in for the driver ---

LOOK = """
import sys
from harness.doctor import devices
from harness.doctor.findings import Findings
from harness.machine import device
if "cuda build" in sys.argv:
    device.torch_cuda_version = lambda: "13.0"
found = Findings(aloud=True)
machine = devices.found_here(found)
print(machine.accelerator, len(machine.gpus), machine.capability, machine.unusable)
"""
H100 = "NVIDIA H100 80GB HBM3, 79.2 GiB, compute capability 9.0"
GPUS = [
    f"[ok] gpu: cuda:0 {H100}, GPU-10101010-1010-1010-1010-101010101010",
    f"[ok] gpu: cuda:1 {H100}, GPU-11111111-1111-1111-1111-111111111111",
]
DRIVER = "[ok] gpu: driver 580.65.06 runs CUDA up to 13.0, torch is built for 13.0"
OLD = "[no] gpu: driver 580.65.06 runs CUDA up to 12.4, torch is built for 13.0; install a newer driver"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return driver.library(tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize(
    ("given", "said", "last"),
    [
        (["NVLINK"], [*GPUS, DRIVER, "[ok] gpu: cuda:0-1: NVLink"], "cuda 2 (9, 0) None"),
        ([], [*GPUS, DRIVER, "[ok] gpu: cuda:0-1: PCIe, across NUMA nodes"], "cuda 2 (9, 0) None"),
        (
            ["NO_PEERS"],
            [*GPUS, DRIVER, "[note] gpu: cuda:0-1: PCIe, across NUMA nodes, no peer access"],
            "cuda 2 (9, 0) None",
        ),
        (
            ["ONE", "OLD_DRIVER"],
            [GPUS[0], "[note] gpu: 1 of the 2 that are installed are visible: NVML shows more than CUDA does", OLD],
            "cuda 1 (9, 0) None",
        ),
        (
            ["ONE", "SLICED", "CUDA_VISIBLE_DEVICES"],
            [
                f"[ok] gpu: cuda:0 {H100}, MIG-10101010-1010-1010-1010-101010101010",
                "[note] gpu: cuda:0: it is a slice of a GPU (MIG), and NCCL joins no slices",
                "[note] gpu: 1 of the 2 that are installed are visible: CUDA_VISIBLE_DEVICES is '1'",
                DRIVER,
            ],
            "cuda 1 (9, 0) None",
        ),
        (
            ["NO_START"],
            ["[note] gpu: none: the CUDA driver does not start: error 802 (system not yet initialized); runs are on"],
            "cpu 0 None None",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_gpus_and_what_connects_them(library: str, given: list[str], said: list[str], last: str) -> None:
    out = look(library, given, "cuda build")
    assert out[-1] == last and len(out) == len(said) + 1
    for line, expected in zip(out, said, strict=False):
        assert line.startswith(expected), line


def look(library: str, given: list[str], *words: str, **more: str) -> list[str]:
    """Returns what is said of the GPUs of the stand-in, told apart by what is ``given``."""
    environment = variables(LD_LIBRARY_PATH=library, **dict.fromkeys(given, "1"), **more)
    if "DS_ACCELERATOR" not in more:
        del environment["DS_ACCELERATOR"]
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_cuda_that_is_asked_for_and_not_there(library: str) -> None:
    first, last = look("/nowhere", [], DS_ACCELERATOR="cuda")
    assert first.startswith("[no] gpu: DS_ACCELERATOR=cuda, and there is no CUDA driver (libcuda.so.1)")
    assert first.endswith("; unset DS_ACCELERATOR to run on the CPU")
    assert last.startswith("cuda 0 None there is no CUDA driver")
    *_, last = look(library, [], DS_ACCELERATOR="cuda")
    assert last == "cuda 2 (9, 0) this torch is a build without CUDA"
    out = look(library, ["NVLINK"], "cuda build", DS_ACCELERATOR="cpu")
    assert "[note] gpu: DS_ACCELERATOR=cpu: runs are on the CPU; unset it to use the GPUs" in out


def test_a_gpu_that_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.doctor import devices

    found = Findings(aloud=False)
    whole = {"whole": 80 * 2**30}
    entries = [
        {"device": 0, "error": None, "free": 79 * 2**30} | whole,
        {"device": 1, "error": None, "free": 50 * 2**30} | whole,
        {"device": 2, "error": "CUDA error: uncorrectable ECC error encountered"},
    ]
    assert devices.computing(found, Heard(*entries)) == ["cuda:2: CUDA error: uncorrectable ECC error encountered"]
    assert [str(one).partition("; ")[0] for one in found.all] == [
        "[ok] gpu: cuda:0 computes a bfloat16 product",
        "[ok] gpu: cuda:1 computes a bfloat16 product",
        "[note] gpu: cuda:1: 30.0 GiB of 80.0 GiB are taken",
        "[no] gpu: cuda:2 does not compute: CUDA error: uncorrectable ECC error encountered",
    ]


# --- hosts ---

SSH = r"""#!/usr/bin/env bash
# ssh [-o OPTION]... HOST COMMAND: a shell that knows nothing of this one's variables, and hosts that are not as here.
while [[ $1 == -o ]]; do shift 2; done
host=$1; shift
shell() { env -i HOME="$HOME" PATH=/usr/bin:/bin sh -c "$1"; }
case $host in
  gone) echo "ssh: Could not resolve hostname gone: Name or service not known" >&2; exit 255 ;;
  closed) echo "a banner" >&2; echo "me@closed: Permission denied (publickey,password)." >&2; exit 255 ;;
  slow) exec sleep 60 ;;
  nowhere) shell "${*//cd /cd /nowhere}" ;;
  bare) shell "${*//bin\/python/bin/pithon}" ;;
  mute) echo "out of memory" >&2; exit 1 ;;
  older) shell "$*" | sed -E 's/("torch": )"[^"]*"/\1"2.11.0"/; s/("commit": )"[^"]*"/\1"0123456789abcdef"/' ;;
  changed) shell "$*" | sed -E 's/"code": "[^"]*"/"code": "other"/' ;;
  itself) shell "$*" | sed -E 's/("hostname": )"[^"]*"/\1"itself"/; s/("addresses": )\[[^]]*\]/\1["127.0.1.1"]/' ;;
  *) echo "welcome to $host"; shell "$*" ;;
esac
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_hosts_are_asked_one_by_one(ssh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "LIMIT_S", 20.0)
    names = ["first", "gone", "closed", "nowhere", "bare", "mute", "older", "changed", "itself"]
    found = Findings(aloud=False)
    assert hosts.check(found, dict.fromkeys(names, 2), "cpu") == names[1:]
    said = dict(zip(names, [str(one) for one in found.all], strict=True))
    assert said["first"].startswith("[ok] hosts: first (2 slots): reachable, the same source and packages as here (Py")
    for name, text in {
        "gone": "not reachable without a password: ssh: Could not resolve hostname gone: Name or service not known;",
        "closed": "not reachable without a password: me@closed: Permission denied (publickey,password).; make ssh",
        "nowhere": f"it has no directory {ROOT}; put the checkout at the same path; see launch/NODES.md",
        "bare": f"it has no {sys.executable}; run bash launch/setup.sh there; see launch/NODES.md",
        "mute": "its Python does not answer: out of memory; try it there; see launch/NODES.md",
        "older": "torch 2.11.0, here ",
        "changed": "the same commit, but other source: changes that are not committed; make it as",
        "itself": "it takes the first host for itself (127.0.1.1); make it as this host is",
    }.items():
        assert said[name].startswith(f"[no] hosts: {name}: {text}"), said[name]
    assert "; commit 0123456789ab, here " in said["older"]


def test_a_host_that_does_not_answer_is_given_up(ssh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "LIMIT_S", 1.0)
    found = Findings(aloud=False)
    assert hosts.check(found, {"slow": 1}, "cpu") == ["slow"]
    assert str(found.all[0]) == "[no] hosts: slow: no answer within 1 s; try ssh slow true"


def test_a_slot_is_a_gpu(ssh: None) -> None:
    found = Findings(aloud=False)
    assert hosts.check(found, {"first": 8}, "cuda") == ["first"]
    assert "8 slots and 0 GPUs" in found.all[0].text


def test_without_ssh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = Findings(aloud=False)
    assert hosts.check(found, {"a": 1, "b": 1}, "cpu") == ["a", "b"]
    assert found.all[0].text == "there is no ssh on this host"


@pytest.mark.parametrize(
    "text",
    [
        "a slots=2\nb slots=1\n",
        "# one\n\n  a   slots=4  # GPUs\n",
        "a\n",
        "a slots=1\na slots=1\n",
        "# none\n",
        "a slots=x\n",
    ],
)
def test_a_hostfile_is_read_as_deepspeed_reads_it(text: str, tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    (tmp_path / "hosts").write_text(text)
    try:
        expected = dict(fetch_hostfile(str(tmp_path / "hosts")))
    except ValueError:
        with pytest.raises(UserError, match=r"^--hostfile: "):
            hosts.read(str(tmp_path / "hosts"))
    else:
        assert hosts.read(str(tmp_path / "hosts")) == expected


ASK = """
import json, sys
from harness.doctor import hosts
from harness.doctor.findings import Findings
found = Findings(aloud=True)
print(json.dumps(hosts.check(found, {"nodea": 1, "nodeb": 1}, "cpu")))
"""
NODES_SSH = """#!/usr/bin/env bash
while [[ $1 == -o ]]; do shift 2; done
[ $1 = nodea ] && exec bash -c "$2"
exec nsenter --target $b --net --mount --uts bash -c "$2"
"""


@pytest.mark.parametrize("knows", [True, False])
def test_two_hosts_with_a_cable_between_them(tmp_path: Path, knows: bool) -> None:
    networked(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(NODES_SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    spoilt = "" if knows else "printf '127.0.1.1 nodea nodeb\\n' >hosts.b\n"
    done = subprocess.run(
        [*NAMESPACES, f'{NETWORK}export b\n{spoilt}cd "$ROOT" && "$@"', "bash", sys.executable, "-c", ASK],
        cwd=tmp_path,
        env=variables(ROOT=str(ROOT), PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    *said, unready = done.stdout.splitlines()
    assert json.loads(unready) == ([] if knows else ["nodeb"]), done.stdout + done.stderr
    assert said[0].startswith("[ok] hosts: nodea (1 slot): reachable")
    expected = (
        "[ok] hosts: nodeb (1 slot)" if knows else "[no] hosts: nodeb: it takes the first host for itself (127.0.1.1)"
    )
    assert said[1].startswith(expected)
