"""A dataset format is added by one module and one option: a toy one, from outside the package, is run end to end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.runs import ROOT, TINY, Run, python

from harness.basics.errors import UserError
from harness.config.schema import DatasetConfig
from harness.workload import catalogue, formats
from harness.workload.reading import read

MODULE = """
from harness.workload.formats.base import FileFormat
from harness.workload.records import Request


class Toy(FileFormat):
    name = "toy"
    required = ("path", "output_len")
    record = '{"ask": ...}'

    def parse(self, record, dataset):
        if not self.recognises(record.value):
            raise record.misshapen()
        return Request(record.index, record.text("ask", record.value["ask"]), None)

    def recognises(self, value):
        return isinstance(value, dict) and "ask" in value


FORMAT = Toy()
"""
# The package's own way in, with one more directory of formats and one of options.
MAIN = """
import sys
from harness.workload import formats
formats.__path__.append(sys.argv.pop(1))
from harness.main import main
sys.exit(main())
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes the format's module, its option and a file of it to a directory, and has the catalogue look there."""
    (tmp_path / "toy.py").write_text(MODULE)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "toy.yaml").write_text("name: toy\npath: null\noutput_len: 3\n")
    (tmp_path / "toy.json").write_text('[{"ask": "one"}, {"ask": "two, and more"}]')
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, f"{formats.__name__}.toy", raising=False)
    return tmp_path


def line(name: str, path: Path, **keys: int) -> str:
    with pytest.raises(UserError) as caught:
        read(DatasetConfig(name=name, path=str(path), **keys))
    return str(caught.value)


def test_the_catalogue_holds_each_option_of_conf() -> None:
    assert set(catalogue.known()) == {path.stem for path in (ROOT / "conf" / "dataset").glob("*.yaml")}
    assert all(one.name == name for name, one in catalogue.known().items())


def test_a_toy_format_is_read_and_named_in_refusals(toy: Path) -> None:
    file = toy / "toy.json"
    workload = read(DatasetConfig(name="toy", path=str(file), output_len=3))
    assert [(request.prompt, request.output_len) for request in workload.requests] == [("one", 3), ("two, and more", 3)]
    assert line("toy", file) == "dataset.output_len: not given; give a whole number from 1 to 1,000,000"
    assert "dataset.input_len: 3 given with dataset=toy" in line("toy", file, output_len=3, input_len=3)
    assert line("asc24", file).endswith('; this is a JSON list of {"ask": ...}: use dataset=toy')
    assert line("sample", file).endswith(": use dataset=toy")
    assert "dataset=text or dataset=toy" in line("sample", toy / "nowhere.json")
    assert line("nothing", file).endswith("text, toy or synthetic")
    (toy / "other.json").write_text('[["one", 1, 1]]')
    assert line("toy", toy / "other.json", output_len=3).endswith(": use dataset=asc24")
    (toy / "other.json").write_text('["one"]')
    assert line("toy", toy / "other.json", output_len=3).endswith('not {"ask": ...}; write it as {"ask": ...}')


def test_a_toy_format_is_run_end_to_end(toy: Path) -> None:
    words = ["dataset=toy", f"dataset.path={toy / 'toy.json'}", f"hydra.searchpath=[file://{toy}]"]
    script = toy / "dataset" / "main.py"  # not beside the format, or it would be taken for one
    script.write_text(MAIN)
    done = python(str(script), str(toy), *words, f"results_dir={toy / 'results'}", *TINY)
    assert done.returncode == 0, done.stderr
    run = Run(done.returncode, done.stdout, done.stderr, toy / "results")
    assert (run.row["dataset"], run.row["completed"], run.row["output_tokens"]) == ("toy", "2", "6")
    assert [len(run.completions[index]["token_ids"]) for index in (0, 1)] == [3, 3]
