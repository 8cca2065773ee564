"""Commands and ranks in processes that need not import PyTorch, transformers and DeepSpeed: forked from one that has.

Python takes eight seconds to import them and, of a tiny model, less to do its work. One server a test session has them,
and our modules, none of which has been called. It forks for every command that is handed to it, and for what such a
command starts by ``sys.executable``, the ranks of a launch among them: a stand-in asks the server for a fork and passes
on its signals, its own end, and how the fork ends. Each has its own arguments, environment, working directory and
output, and its stand-in's namespaces and memory control group. Where it matters how a process comes to be, what it
inherits or how it is killed, tests start one as users do.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import hashlib
import importlib.machinery
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import psutil

PRELOADED = [
    "harness.main",
    "harness.running.start",
    "harness.running.tune",
    "harness.verify.__main__",
    "harness.compare.__main__",
    "harness.engines.fastgen.engine",
    "transformers.models.llama.modeling_llama",
    "deepspeed.inference.v2.model_implementations",
    "deepspeed.launcher.runner",
]
AT_IMPORT = (
    "CUDA",
    "DS_",
    "GOMP_",
    "HF_",
    "OMP_",
    "TORCH",
    "TRITON",
)  # variables that libraries read when they are imported
HEADER, STATUS = struct.Struct("=Q"), struct.Struct("=i")  # a request's length, 0 to stay connected; its exit status
STAND_IN = """#!{python} -IS
import json, os, signal, socket, struct, sys
words = sys.argv[2:] if sys.argv[1:2] == ["-u"] else sys.argv[1:]
modules = ["-m", "deepspeed.launcher.launch"], ["-m", "deepspeed.launcher.runner"], ["-m", "harness.main"]
script = words and (words[0].endswith((".py", "/deepspeed")) or "/llama-harness" in words[0][words[0].rfind("/"):])
if not script and words[:2] not in modules:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
request = json.dumps([words, os.getcwd(), dict(os.environ), os.getpid()]).encode()
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [struct.pack("=Q", len(request))], [0, 1, 2])
server.sendall(request)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
status = struct.unpack("=i", server.recv(4, socket.MSG_WAITALL))[0]
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def suits(variables: dict[str, str]) -> bool:
    """Returns whether a fork with this environment is what a new process with it would be."""
    server = os.environ | {"DS_ACCELERATOR": "cpu"}
    return all(server.get(name) == value for name, value in variables.items() if name.startswith(AT_IMPORT))


def run(
    words: list[str], directory: Path, variables: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Returns how Python's ``words`` ended, as :func:`subprocess.run` would with ``text`` and ``capture_output``.

    Args:
        words: a script and its arguments, or ``-m``, a module and its arguments.
        variables: the environment; see :func:`suits`.
        timeout: seconds.
    """
    with tempfile.TemporaryDirectory() as place, _connected(_server()) as server:
        files = [Path(os.devnull), Path(place, "stdout"), Path(place, "stderr")]
        handles = [os.open(file, os.O_RDWR | os.O_CREAT) for file in files]
        request = json.dumps([words, str(directory), variables, None]).encode()
        socket.send_fds(server, [HEADER.pack(len(request))], handles)
        server.sendall(request)
        for handle in handles:
            os.close(handle)
        server.settimeout(timeout)
        try:
            (status,) = STATUS.unpack(server.recv(STATUS.size, socket.MSG_WAITALL))
        except TimeoutError:  # which ends it too, with the connection
            outputs = [file.read_text() for file in files[1:]]
            raise subprocess.TimeoutExpired(words, timeout, *outputs) from None
        return subprocess.CompletedProcess(words, status, *(file.read_text() for file in files[1:]))


def interpreter() -> Path:
    """Returns a program that does as Python would, in a fork, where its environment :func:`suits`."""
    return _server().parent / "python"


def fork_of(process: psutil.Process) -> psutil.Process:
    """Returns the fork that does a stand-in's work, to be looked at, stopped or killed; any other process itself."""
    try:
        return psutil.Process(int((_place() / f"fork of {process.pid}").read_text()))
    except (FileNotFoundError, psutil.NoSuchProcess):  # the latter where it has just ended
        return process


@cache
def _place() -> Path:
    """Returns the directory of the session's server, which need not have been started."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    here = hashlib.sha256(f"{__file__} {session}".encode()).hexdigest()[:16]  # a session may start another, of a copy
    return Path(tempfile.gettempdir(), f"harness-tests-{os.getuid()}-{here}")


@cache
def _server() -> Path:
    """Returns the address of the session's server, which lives as long as a test process is connected."""
    place = _place()
    place.mkdir(mode=0o700, exist_ok=True)
    address = place / "server"
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            held = _connected(address)
        except OSError:
            line = [sys.executable, __file__, str(address)]
            variables = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parent / "absent")}
            process = subprocess.Popen(line, env=variables, start_new_session=True)
            while not address.exists():
                assert process.poll() is None, "the server of warm processes has ended"
                time.sleep(0.05)
            held = _connected(address)
    held.sendall(HEADER.pack(0))
    atexit.register(held.close)
    return address


def _connected(address: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(str(address))
    except OSError:
        server.close()
        raise
    return server


def _serve(address: Path) -> list[str]:
    """Forks for each request until no test process is connected; returns, in a fork, what it is to run."""
    stand_in = address.parent / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable, address=str(address)))
    stand_in.chmod(0o700)
    gc.freeze()  # what all forks share is not touched again
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address) + ".new")
    listener.listen(64)
    os.rename(str(address) + ".new", address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    held: list[socket.socket] = []
    while True:
        for ready in select.select([listener, *held], [], [])[0]:
            if ready is not listener:
                held.remove(ready)
                ready.close()
                continue
            client, _ = listener.accept()
            message, files, _, _ = socket.recv_fds(client, HEADER.size, 3)
            if (size := HEADER.unpack(message)[0]) == 0:
                held.append(client)
                continue
            if os.fork() == 0:
                for other in (listener, *held):
                    other.close()
                return _guard(client, size, files, stand_in)
            client.close()
            for file in files:
                os.close(file)
        if not held:
            shutil.rmtree(address.parent, ignore_errors=True)
            os._exit(0)


def _guard(client: socket.socket, size: int, files: list[int], stand_in: Path) -> list[str]:
    """Forks the process asked for and sees to it until it or its client ends; returns, in the fork, its words."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    words, directory, variables, asking = json.loads(client.recv(size, socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        if asking is not None:  # before it does anything that a test could wait for
            _join(asking)
            new = stand_in.parent / f"new {asking}"
            new.write_text(str(os.getpid()))
            new.rename(stand_in.parent / f"fork of {asking}")
        client.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
        for file in {*files} - {0, 1, 2}:
            os.close(file)
        os.chdir(directory)
        # What is installed beside the interpreter is found beside the true one.
        path = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", "")])
        os.environ.clear()
        os.environ.update(variables | {"PATH": path})
        sys.executable = str(stand_in)
        return words
    for file in files:
        os.close(file)
    process = os.pidfd_open(pid)
    watched: list[Any] = [process, client]
    while process not in select.select(watched, [], [])[0]:
        numbers = client.recv(64)
        for number in numbers or [signal.SIGKILL]:
            os.kill(pid, number)
        if not numbers:  # the client has gone
            watched = [process]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if asking is not None:
        (stand_in.parent / f"fork of {asking}").unlink(missing_ok=True)  # another process may get that number
    try:
        client.sendall(STATUS.pack(status))
    except OSError:  # it has gone
        pass
    os._exit(0)


def _join(process: int) -> None:
    """Moves this process into the memory control groups and the namespaces of another, where they are not its own."""
    from harness.machine import cgroups

    places = [cgroups.memory_hierarchies(Path(f"/proc/{who}/cgroup").read_text()) for who in ("self", process)]
    for own, other in zip(*places, strict=True):
        if own != other:
            (other.groups[0] / "cgroup.procs").write_text(str(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("user", "net", "uts", "mnt"):  # that of users first: it allows the others
        place = f"/proc/{process}/ns/{name}"
        if os.readlink(place) != os.readlink(f"/proc/self/ns/{name}"):
            with open(place) as namespace:
                if libc.setns(namespace.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"setns: {place}")


def _become(words: list[str]) -> None:
    """Runs a script or a module as Python does."""
    module = words[0] == "-m"
    if module:
        for name in (words[1], f"{words[1]}.__main__"):
            sys.modules.pop(name, None)  # it becomes __main__
    sys.argv = words[1:] if module else words
    first = os.getcwd() if module else os.path.dirname(os.path.abspath(words[0]))
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [first, *named, *PLACES]
    importlib.invalidate_caches()
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    found = importlib.machinery.PathFinder.find_spec("harness", sys.path)
    if found is not None and found.origin != sys.modules["harness"].__file__:  # a package of it, which imports its own
        for name in [name for name in sys.modules if name.split(".")[0] == "harness"]:
            del sys.modules[name]
    for number, name in ((1, "stdout"), (2, "stderr")):  # anew: what the server's own may do is remembered in them
        how = {"encoding": getattr(sys, name).encoding, "errors": getattr(sys, name).errors, "closefd": False}
        setattr(sys, name, os.fdopen(number, "w", buffering=1, **how))
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        status = 0
    # As an interpreter ends, but for taking all of those modules apart, which takes longer than most commands.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    PLACES = [place for place in sys.path[1:] if place not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the harness beside these tests
    for name in PRELOADED:
        importlib.import_module(name)
    _become(_serve(Path(sys.argv[1])))
