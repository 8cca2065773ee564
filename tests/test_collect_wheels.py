"""launch/collect_wheels.py: what is lacking, by pip itself over a small index on disk; and a model cut and joined."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.runs import ROOT

from harness.basics.errors import UserError

sys.path.append(str(ROOT / "launch"))

import collect_wheels
import resolve_wheels

TORCH = "2.11.0+cu130"


def listed(directory: Path, *lines: str) -> Path:
    """Writes a list of packages that are there."""
    path = directory / "present.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def publish(directory: Path, name: str, version: str, *needs: str) -> None:
    """Writes a wheel with nothing in it but what it declares."""
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {n}" for n in needs),
        ]
        wheel.writestr(f"{about}/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder that pip takes wheels from, and it alone."""
    directory = tmp_path / "index"
    directory.mkdir()
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(directory)), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", value)
    return directory


def lacking(directory: Path, present: resolve_wheels.Present, *requirements: str, **pins: str) -> dict[str, str]:
    """Returns what pip would install beside ``present``, with versions."""
    place = resolve_wheels.stand_in(directory / "there", sys.executable, present, {})
    wanted = resolve_wheels.Wanted(requirements, {"alone": "1.0"})
    return resolve_wheels.resolve(Path(sys.executable), place, wanted, pins)


def test_what_is_lacking(tmp_path: Path, index: Path) -> None:
    publish(index, "engine", "1.0", "torch>=2.11", "old>=2", "named", "inner", "away; python_version < '3'")
    publish(index, "inner", "1.0")
    publish(index, "inner", "2.0")
    publish(index, "old", "2.5")
    publish(index, "torch", "2.13.0")  # newer, and not asked for
    present = {"torch": TORCH, "old": "1.0", "named": None}
    assert lacking(tmp_path, present, "engine", inner="1.0") == {
        "alone": "1.0",
        "engine": "1.0",
        "inner": "1.0",
        "old": "2.5",
    }


@pytest.mark.parametrize(
    ("needs", "said"),
    [("torch>=2.13", "--torch: the one given is older"), ("nowhere", "packages: ERROR: .*nowhere.*make pip reach")],
)
def test_there_is_no_such_set(needs: str, said: str, tmp_path: Path, index: Path) -> None:
    publish(index, "engine", "1.0", needs)
    publish(index, "torch", "2.13.0")
    with pytest.raises(UserError, match=said):
        lacking(tmp_path, {"torch": TORCH}, "engine")


def test_a_list_of_what_is_there(tmp_path: Path) -> None:
    path = listed(
        tmp_path, "# made by hand", "torch==2.11.0", "PyYAML", "own_code @ file:///src", "-e /src/editable", ""
    )
    assert resolve_wheels.read_present(path, TORCH) == {"torch": TORCH, "pyyaml": None, "own-code": None}
    assert resolve_wheels.read_present(collect_wheels.PRESENT, TORCH)["triton"] == "3.6.0"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("torch==2.13.0",), r"--torch: 2.11.0\+cu130, but .* lists torch 2.13.0"),
        (("numpy==2.4.0",), "lists no torch"),
        (("torch==2.11.0", "Package Version"), "line 2: 'Package Version' is no package"),
    ],
)
def test_a_list_that_cannot_be_right(lines: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        resolve_wheels.read_present(listed(tmp_path, *lines), TORCH)
    with pytest.raises(UserError, match=r"--present: .* cannot be read"):
        resolve_wheels.read_present(tmp_path / "absent.txt", TORCH)


def test_what_the_project_needs() -> None:
    wanted = resolve_wheels.read_wanted({"torch": TORCH})
    names = {resolve_wheels.Requirement(one).name for one in wanted.requirements}
    assert {"torch", "deepspeed", "hydra-core", "gguf", "pytest", "hypothesis", "grpcio", "pyzmq", "ujson"} <= names
    assert not names & {"vl-convert-python", "pyarrow", "mlflow-skinny", "ruff", "deepspeed-mii", "deepspeed-kernels"}
    assert set(wanted.alone) == {"deepspeed-kernels", "deepspeed-mii"}
    assert resolve_wheels.read_wanted({"deepspeed-mii": "0.3.3", "deepspeed-kernels": None}).alone == {}


def test_wheels_for_another_machine_are_refused() -> None:
    fit = ("a-1-py3-none-any.whl", "a-1-cp312-cp312-manylinux_2_17_x86_64.whl", "a-1-cp38-abi3-manylinux1_x86_64.whl")
    resolve_wheels.check_tags(map(Path, fit), "3.12", "x86_64")
    for name in (
        "a-1-cp311-cp311-manylinux1_x86_64",
        "a-1-py3-none-linux_x86_64",
        "a-1-py3-none-manylinux_2_39_x86_64",
    ):
        with pytest.raises(UserError, match=f"{name}.whl does not fit Python 3.12"):
            resolve_wheels.check_tags([Path(f"{name}.whl")], "3.12", "x86_64")


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    """Returns a folder as collect_wheels fills it: one wheel, and a model of 2,500 bytes in parts of 1,000."""
    model, directory = tmp_path / "made", tmp_path / "carried"
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(range(250)) * 10)
    (model / "config.json").write_text("{}")
    collect_wheels.prepared(directory)
    publish(directory / "wheels", "engine", "1.0")
    collect_wheels.collect_model(model, directory / "model", 1000)
    shutil.copy(ROOT / "launch" / "join.sh", directory)
    collect_wheels.write_sums(directory, model / "model.safetensors")
    return directory


def join(directory: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(directory / "join.sh"), str(target)], capture_output=True, text=True)


def test_a_model_is_cut_and_joined(carried: Path, tmp_path: Path) -> None:
    parts = sorted((carried / "model").glob("*.part"))
    assert [part.stat().st_size for part in parts] == [1000, 1000, 500]
    target = tmp_path / "cache" / "model"
    for _ in range(2):
        done = join(carried, target)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{target} is complete\n", "")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": bytes(range(250)) * 10,
    }
    (target / "model.safetensors").write_bytes(b"half of it")
    assert join(carried, target).returncode == 0
    assert (target / "model.safetensors").read_bytes() == bytes(range(250)) * 10


def test_a_damaged_or_missing_part_is_named(carried: Path, tmp_path: Path) -> None:
    part, target = carried / "model" / "model-0002.part", tmp_path / "model"
    whole = part.read_bytes()
    part.write_bytes(whole[:500] + b"?" + whole[501:])
    done = join(carried, target)
    assert (done.returncode, done.stderr) == (2, f"error: damaged: model/{part.name}; carry that to {carried} again\n")
    part.unlink()
    (wheel,) = (carried / "wheels").iterdir()
    wheel.rename(tmp_path / wheel.name)  # a zip knows its time: one made anew would be another
    done = join(carried, target)
    assert (done.returncode, list(target.iterdir())) == (2, [])
    assert done.stderr == f"error: not there: model/{part.name} wheels/{wheel.name}; carry that to {carried}\n"
    part.write_bytes(whole)
    (tmp_path / wheel.name).rename(wheel)
    assert join(carried, target).returncode == 0


def test_a_folder_is_filled_anew_unless_it_has_something_else(carried: Path) -> None:
    assert {path.name for path in collect_wheels.prepared(carried).rglob("*")} == {"wheels", "model"}
    (carried / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis.tex"):
        collect_wheels.prepared(carried)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--python", "3.1"), "--python: 3.1, but no python3.1 here; install Python 3.1, or set PYTHON to one"),
        (("--python", "three"), "--python: 'three'; give a version such as 3.12"),
        (("--torch", "latest"), "--torch: 'latest' is no version; give one such as 2.11+cu130"),
        (("--part-size", "60MB"), "--part-size: '60MB'; give a number of bytes, or one with K, M or G behind it"),
    ],
)
def test_refusals_are_one_line(
    words: tuple[str, str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTHON", raising=False)
    given = ("--python", "3.12", "--torch", "2.11+cu130", "--out", str(tmp_path / "out"), *words)
    assert collect_wheels.main([*given]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not (tmp_path / "out").exists()
