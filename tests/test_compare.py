"""compare.py: the command with every kind of bad input, and what it prints for people and for programs."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.made_runs import FACTS, ROOT, command, refused, run

from harness.compare import __main__ as compare
from harness.results.columns import COLUMNS
from harness.results.table import put_row, read_rows

# --- bad input ---


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file; run a job first"),
        (b"", "no runs in it; run a job first"),
        ((",".join(COLUMNS) + "\n").encode(), "no runs in it; run a job first"),
        (b"name,age\nx,3\n", "is not a table of runs; name the runs.csv"),
        (b"\x00\xff\x80" * 50, "is not a table of runs"),
        (b"run_id,status,engine\na,ok\n", "no whole row is left in it"),
    ],
)
def test_an_unusable_table_is_refused(
    tmp_path: Path, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "runs.csv"
    if content is not None:
        table.write_bytes(content)
    line = refused(capsys, str(table))
    assert str(table) in line and said in line


def test_a_row_cut_in_the_middle_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "a")
    run(tmp_path, "b", **{"engine.token_budget": 64})
    table = tmp_path / "runs.csv"
    table.write_bytes(table.read_bytes()[:-150])
    assert compare.main([str(tmp_path), "--csv"]) == 0
    captured = capsys.readouterr()
    assert [row["run_id"] for row in csv.DictReader(io.StringIO(captured.out))] == ["a"]
    assert captured.err.startswith(f"warning: {table}: row 2 left out: ") and captured.err.count("\n") == 1


def test_a_number_that_is_none_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, budget in (("a", 1), ("b", 2), ("c", 3)):
        run(tmp_path, name, 123.0, **{"engine.token_budget": budget})
    table = tmp_path / "runs.csv"
    table.write_text(table.read_text().replace(",123,", ",fast,", 1).replace(",123,", ",inf,", 1))
    assert compare.main([str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    rates = {one["run_id"]: one["figures"]["total_tokens_per_s"] for one in json.loads(captured.out)["groups"]}
    assert rates == {"a": None, "b": None, "c": 123.0}
    assert captured.err == (
        f"warning: {table}: total_tokens_per_s 'fast' of run a is not a number; taken as unknown (1 more such cells)\n"
    )


def test_bytes_that_are_no_text_are_shown_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.csv").write_bytes(b"run_id,status,model,total_tokens_per_s\na,ok,m\xff,1\nb,ok,n,2\n")
    for form in ("--csv", "--json"):
        assert compare.main([str(tmp_path), form]) == 0
        output = capsys.readouterr().out
        assert ("m\\ufffd" if form == "--json" else "m\ufffd") in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limit", "0"], "'0' is not a whole number of at least 1"),
        (["--limit", "many"], "'many' is not a whole number"),
        (["--csv", "--json"], "not allowed with"),
        (["--speed"], "unrecognized arguments: --speed"),
        (["--baseline"], "expected one argument"),
    ],
)
def test_a_wrong_option_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments)


def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for name in (
        str(tmp_path),
        str(tmp_path / "nowhere" / "x.html"),
        str(tmp_path / "file" / "x.html"),
        "",
        "/dev/null",
    ):
        line = refused(capsys, str(tmp_path / "no-such-table.csv"), "--html", name)
        assert line.startswith("error: --html: ") and line.endswith("name a file in a directory that can be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


# --- output ---


def test_the_table_fits_and_keeps_run_ids_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"20260101-00000{number}-ds_inference-ab1{number}" for number in range(3)]
    for number, name in enumerate(names):
        changes = {"engine.token_budget": 64 * 2**number, "model.path": f"/a/long/path/to/some/models/number{number}"}
        order = "dataset" if number else "longest_first"
        run(tmp_path, name, 100.0 + number, **changes, **{"engine.order": order, "git_commit": f"{number}" * 40})
    assert compare.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    assert all(sum(line.startswith(name + " ") for line in lines) == 1 for name in names)
    text = " ".join(" ".join(lines).split())
    assert (
        "longest_first" in text
        and "engine.order=dataset" in text
        and "Baseline: 20260101-000000-ds_inference-ab10, the oldest" in text
    )


def test_text_of_a_run_is_never_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "a", **{"model.name": "[red]x[/red]"})
    run(tmp_path, "b", **{"model.name": "=1+1"})
    run(tmp_path, "c", status="failed", error="[/bold] broke [link=x]", **{"model.name": "y"})
    assert compare.main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "[red]x[/red]" in output and "c failed: [/bold] broke [link=x]" in output


def test_limit_says_how_many_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        run(tmp_path, f"run-{number}", 100.0 + number, **{"engine.token_budget": 64 + number})
    assert compare.main([str(tmp_path), "--limit", "2"]) == 0
    output = capsys.readouterr().out
    shown = [line.split()[0] for line in output.splitlines() if line.startswith("run-")]
    assert shown == ["run-5", "run-4", "run-0"]  # and the baseline
    assert "3 more not shown" in output


def test_csv_and_json_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "a", 100.0)
    run(tmp_path, "a2", 110.0)
    run(tmp_path, "b", 210.0, **{"generation.stop": "length"})
    assert compare.main([str(tmp_path), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["run_id"] for row in rows] == ["b", "a"]
    assert rows[0] | {"ratio": "2", "differs_in": "generation.stop", "generation.stop": "length"} == rows[0]
    assert rows[1]["run_ids"] == "a a2" and rows[1]["total_tokens_per_s"] == "105" and rows[1]["runs"] == "2"
    assert compare.main([str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["baseline"] == {"run_id": "a", "reason": "the oldest"} and data["keys"] == ["generation.stop"]
    assert data["groups"][1]["run_ids"] == ["a", "a2"] and data["groups"][1]["ok"] == 2
    assert data["groups"][1]["figures"]["total_tokens_per_s"] == 105.0
    assert data["groups"][0]["config"]["engine.order"] == "dataset"
    (warning,) = data["warnings"]
    assert (warning["differs_in"], warning["baseline"], warning["run_ids"]) == ("generation.stop", "eos", ["b"])


def test_columns_of_a_parity_check_are_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "a")
    run(tmp_path, "b", **{"engine.token_budget": 64})
    header, first, second = (tmp_path / "runs.csv").read_text().splitlines()
    extra = "parity_checked,parity_exact_share,parity_explained_share"
    (tmp_path / "runs.csv").write_text(f"{header},{extra}\n{first},,,\n{second},16,0.75,1\n")
    assert compare.main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "75.0%" in output
    assert compare.main([str(tmp_path), "--csv"]) == 0
    rows = {row["run_id"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert rows["b"]["parity_exact_share"] == "0.75" and rows["a"]["parity_checked"] == ""


# --- the command ---


@pytest.fixture(scope="module")
def ten_thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a table of 10,000 runs, each of a config of its own, without their directories."""
    directory = tmp_path_factory.mktemp("many")
    put_row(directory, dict.fromkeys(COLUMNS) | FACTS | {"run_id": "r0", "status": "ok", "engine": "fastgen"})
    (row,) = read_rows(directory / "runs.csv")
    with open(directory / "runs.csv", "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for number in range(10_000):
            changes = {"run_id": f"r{number}", "config_hash": f"{number:012x}", "token_budget": 64 + number % 50}
            table.writerow(row | changes | {"total_tokens_per_s": 100 + number, "started_at": f"{number:05d}"})
    return directory


def test_ten_thousand_runs(ten_thousand: Path) -> None:
    done = command(str(ten_thousand))
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert "9,959 more not shown" in done.stdout and len(lines) < 60
    assert [line.split()[0] for line in lines[2:4]] == ["r9999", "r9998"]


def test_a_reader_that_leaves_early_is_no_error(ten_thousand: Path) -> None:
    line = f"{sys.executable} -m harness.compare {ten_thousand} --csv | head -n 1"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("run_id,runs,ok,") and done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_the_command_without_arguments_reads_results(tmp_path: Path) -> None:
    done = command(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: results/runs.csv: there is no such file; run a job first, or name another runs.csv\n"
    )
    run(tmp_path / "results", "a")
    done = command(cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[2].startswith("a ") and done.stderr == ""


def test_a_mistake_is_found_without_heavy_imports() -> None:
    code = (
        "import sys; from harness.compare import __main__ as compare; assert compare.main(['nowhere.csv']) == 2; "
        "print({'pandas', 'vl_convert', 'torch', 'transformers', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
