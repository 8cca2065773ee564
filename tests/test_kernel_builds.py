"""DeepSpeed's extensions, built ahead: locks that killed builds leave, and what is said where nothing can be built."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.engines import settings
from support.runs import ROOT, variables

from harness.basics.errors import UserError
from harness.basics.programs import beside_the_interpreter
from harness.engines.ds_inference import kernel_inject
from harness.engines.fastgen.runners.deepspeed_runner import DeepSpeedRunner
from harness.engines.shared import deepspeed_ops
from harness.machine import build_locks, device

# What torch's builder does while it compiles.
BUILDER = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("building", flush=True)
time.sleep(float(sys.argv[2]))
baton.release()
"""


def builder(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """Returns a process that has taken the folder's lock as torch takes it."""
    command = [sys.executable, "-c", BUILDER, str(folder / build_locks.LOCK), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    return process


def made_long_ago(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - 2 * build_locks.QUIET_S,) * 2)


@pytest.mark.slow
def test_a_build_is_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    with builder(tmp_path, 1.0):
        made_long_ago(tmp_path)
        build_locks.own(tmp_path)
        assert build_locks.held(tmp_path / build_locks.LOCK) and not build_locks.clear(tmp_path)
        build_locks.wait(tmp_path, said.append)
    assert len(said) == 1 and "another process builds it" in said[0]
    assert not (tmp_path / build_locks.LOCK).exists()


def test_the_lock_of_a_killed_build_is_cleared(tmp_path: Path) -> None:
    build_locks.own(tmp_path)
    process = builder(tmp_path, 60.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / build_locks.LOCK).exists()  # for which torch would wait for ever
    said: list[str] = []
    build_locks.wait(tmp_path, said.append)
    assert said == [f"{tmp_path.name}: a lock that a build had left behind is gone"]
    with builder(tmp_path, 0.0) as again:
        assert again.wait() == 0


def test_another_hosts_lock_is_left_until_nothing_is_written_any_more(tmp_path: Path) -> None:
    (tmp_path / build_locks.LOCK).touch()
    (tmp_path / build_locks.OWNER).write_text("another")
    assert not build_locks.stale(tmp_path)
    made_long_ago(tmp_path)
    (tmp_path / "one.o").touch()
    assert not build_locks.stale(tmp_path)
    made_long_ago(tmp_path)
    assert build_locks.clear(tmp_path) and not build_locks.clear(tmp_path)


@pytest.mark.skipif(device.accelerator() == "cuda", reason="here they can be built")
def test_what_cannot_be_built_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(deepspeed_ops.OpsError, match=r"^ragged_device_ops: .+"):
        deepspeed_ops.load(deepspeed_ops.RAGGED, aloud=False)
    with pytest.raises(UserError, match=r"^engine.kernel_inject: true: .* cannot be built: transformer_inference: .+"):
        kernel_inject.build(aloud=False)
    refused = r"^engine.kernels: deepspeed: its kernels cannot be built .*: ragged_device_ops: .*engine.kernels=torch"
    with pytest.raises(UserError, match=refused):
        DeepSpeedRunner(settings())._build()
    assert not list(tmp_path.glob("*/lock"))


@pytest.mark.parametrize(
    ("listed", "plain"),
    [("9.0a", "9.0"), ("8.0;9.0a+PTX", "8.0;9.0+PTX"), ("8.6 10.0f", "8.6 10.0"), ("8.0", "8.0"), ("", "")],
)
def test_architectures_are_given_as_deepspeed_reads_them(listed: str, plain: str) -> None:
    assert deepspeed_ops.plain_architectures(listed) == plain


@pytest.mark.skipif(device.accelerator() == "cuda", reason="there it builds them")
def test_the_command_refuses_in_one_line_where_there_is_no_gpu() -> None:
    command = [sys.executable, "launch/build_kernels.py"]
    done = subprocess.run(command, cwd=ROOT, env=variables(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: CUDA: there is no GPU here") and done.stderr.count("\n") == 1


def test_every_extension_has_a_builder_and_files_to_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    # Where DeepSpeed runs on a CPU its package gives other builders by these names.
    modules = {"transformer_inference": "transformer_inference", "inference_core_ops": "inference_core_ops"}
    modules |= {"ragged_device_ops": "ragged_ops", "ragged_ops": "ragged_utils"}
    package = "deepspeed.ops.op_builder"
    builders = {
        name: getattr(importlib.import_module(f"{package}.{modules[name]}"), cls)
        for name, cls in deepspeed_ops.BUILDERS.items()
    }
    monkeypatch.setattr(deepspeed_ops, "builder_of", lambda name: builders[name]())
    for name, builder_class in builders.items():
        assert name == builder_class.NAME
        (deepspeed_ops.folder(name) / "one.o").touch()
        done, count = deepspeed_ops.compiled(name)
        assert done == 1 < count and not deepspeed_ops.built(name)
    (tmp_path / "ragged_ops" / "ragged_ops.so").touch()
    assert deepspeed_ops.built("ragged_ops")


def test_ninja_is_found_however_the_interpreter_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    beside_the_interpreter()
    beside_the_interpreter()
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}/usr/bin"
