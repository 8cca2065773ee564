"""comparison/groups.py: groups, baselines, ratios, what sets groups apart, and what makes them incomparable."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import comparison, refused, run

from harness.basics.errors import UserError
from harness.compare import __main__ as compare

# --- groups ---


def test_repeated_runs_are_one_group_with_median_and_spread(tmp_path: Path) -> None:
    for number, rate in enumerate((100.0, 130.0, 110.0)):
        run(tmp_path, f"r{number}", rate)
    run(tmp_path, "other", 220.0, **{"engine.token_budget": 128})
    found = comparison(tmp_path)
    assert [one.run_id for one in found.groups] == ["other", "r2"]
    group = found.groups[1]
    assert (group.ok, len(group.runs), group.throughput, group.low, group.high) == (3, 3, 110, 100, 130)
    assert group.spread == pytest.approx(30 / 110)
    assert found.groups[0].spread is None
    assert found.baseline is group
    assert [one.ratio for one in found.groups] == [2.0, 1.0]
    assert group.figures["latency_p50_s"] == 2.0 and group.figures["peak_memory_bytes"] == 2**31


@pytest.mark.parametrize(
    "change",
    [
        {"device_name": "Another CPU"},
        {"git_commit": "beef" * 10},
        {"dataset_sha256": "bb" * 32},
        {"kernels": "native"},
        {"parallel.dp": 2},
        {"engine.order": "longest_first"},
    ],
)
def test_another_job_machine_or_commit_is_another_group(tmp_path: Path, change: dict[str, Any]) -> None:
    run(tmp_path, "a")
    run(tmp_path, "b", **change)
    assert len(comparison(tmp_path).groups) == 2


@pytest.mark.parametrize("key", ["results_dir", "repeat", "timeout_s"])
def test_keys_that_do_not_change_the_job_split_no_group(tmp_path: Path, key: str) -> None:
    run(tmp_path, "a")
    run(tmp_path, "b", **{key: 7})
    found = comparison(tmp_path)
    assert len(found.groups) == 1 and found.keys == []


def test_a_run_that_failed_early_belongs_to_its_config(tmp_path: Path) -> None:
    run(tmp_path, "a", 100.0)
    run(tmp_path, "b", status="timeout", error="too slow")  # knows neither its dataset nor its device
    run(tmp_path, "c", status="oom", error="no memory", late=True)
    (group,) = comparison(tmp_path).groups
    assert (group.ok, len(group.runs), group.throughput, group.run_id) == (1, 3, 100.0, "a")
    assert group.statuses == {"ok": 1, "timeout": 1, "oom": 1} and group.error == "no memory"


def test_an_early_failure_is_not_guessed_into_one_of_two_groups(tmp_path: Path) -> None:
    run(tmp_path, "a")
    run(tmp_path, "b", device_name="Another CPU")
    run(tmp_path, "c", status="timeout", error="too slow")
    assert [len(one.runs) for one in comparison(tmp_path).groups] == [1, 1, 1]


def test_failed_groups_come_last_with_their_settings_and_no_figures(tmp_path: Path) -> None:
    run(tmp_path, "bad", status="oom", error="no memory", **{"engine.token_budget": 4096})
    run(tmp_path, "good")
    found = comparison(tmp_path)
    assert [one.run_id for one in found.groups] == ["good", "bad"]
    assert found.groups[1].throughput is None and found.groups[1].ratio is None
    assert found.groups[1].settings["engine.token_budget"] == 4096  # from its record: the row does not know it
    assert found.keys == ["engine.token_budget"]


def test_rows_of_an_old_table_stand_alone(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text("run_id,status,engine,total_tokens_per_s\na,ok,baseline,10\nb,ok,fastgen,30\nc,ok,fastgen,20\n")
    found = comparison(table)
    assert [(one.run_id, one.ratio) for one in found.groups] == [("b", 3.0), ("c", 2.0), ("a", 1.0)]
    assert found.keys == ["engine"] and found.figures == ["total_tokens_per_s"]


def test_several_tables_are_put_together_and_a_run_counts_once(tmp_path: Path) -> None:
    run(tmp_path / "one", "a")
    run(tmp_path / "two", "b", **{"engine.token_budget": 64})
    (tmp_path / "two" / "more.csv").write_bytes((tmp_path / "one" / "runs.csv").read_bytes())
    found = comparison(tmp_path / "one", tmp_path / "two" / "runs.csv", tmp_path / "two" / "more.csv")
    assert sorted(run.run_id for one in found.groups for run in one.runs) == ["a", "b"]


# --- what differs ---


def test_only_differing_settings_are_named_as_on_the_command_line(tmp_path: Path) -> None:
    run(tmp_path, "a", **{"engine.token_budget": 64, "engine.order": "longest_first"})
    run(tmp_path, "b", **{"engine.token_budget": 128, "parallel.tp": 2})
    found = comparison(tmp_path)
    assert found.keys == ["parallel.tp", "engine.token_budget", "engine.order"]
    by_id = {one.run_id: [one.settings[key] for key in found.keys] for one in found.groups}
    assert by_id == {"a": [1, 64, "longest_first"], "b": [2, 128, "dataset"]}


def test_without_records_the_table_tells_what_it_can(tmp_path: Path) -> None:
    for name, order, budget in (("a", "longest_first", 64), ("b", "dataset", 128)):
        run(tmp_path, name, **{"engine.token_budget": budget, "engine.order": order})
        shutil.rmtree(tmp_path / name)
    assert comparison(tmp_path).keys == ["engine.token_budget"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"status": "ok"}', '{"status": "ok", "config": "lost"}'])
def test_a_damaged_record_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    run(tmp_path, "a", **{"engine.token_budget": 64})
    run(tmp_path, "b", **{"engine.token_budget": 128, "engine.order": "longest_first"})
    (tmp_path / "a" / "record.json").write_text(content)
    assert comparison(tmp_path).keys == ["engine.token_budget"]


def test_no_setting_is_named_twice(tmp_path: Path) -> None:
    run(tmp_path, "a", requests=2, **{"dataset.num_samples": 2, "engine.quantization": "wf6af16"})
    run(tmp_path, "b", requests=1, **{"dataset.num_samples": 1, "engine.quantization": None, "model.name": "large"})
    assert comparison(tmp_path).keys == ["model", "engine.quantization", "dataset.num_samples"]


def test_what_follows_from_another_setting_is_left_out(tmp_path: Path) -> None:
    run(tmp_path, "a", **{"model.name": "small", "model.path": "models/small"})
    run(tmp_path, "b", **{"model.name": "large", "model.path": "models/large"})
    assert comparison(tmp_path).keys == ["model"]
    run(tmp_path, "c", **{"model.name": "large", "model.path": "models/other"})
    assert comparison(tmp_path).keys == ["model", "model.path"]


# --- the baseline ---


def test_the_only_run_of_the_baseline_engine_is_the_baseline(tmp_path: Path) -> None:
    run(tmp_path, "a", 500.0)
    run(tmp_path, "b", 50.0, **{"engine.name": "baseline"})
    run(tmp_path, "c", status="failed", error="x", **{"engine.name": "baseline", "model.name": "large"})
    found = comparison(tmp_path)
    assert found.baseline is not None and found.baseline.run_id == "b" and "engine=baseline" in found.reason
    assert found.groups[0].ratio == 10.0


@pytest.mark.parametrize(
    ("engine", "baseline", "reason"),
    [("fastgen", "a", "the oldest"), ("baseline", "b", "the oldest one with engine=baseline")],
)
def test_otherwise_the_oldest_is(tmp_path: Path, engine: str, baseline: str, reason: str) -> None:
    names = ("started_at", "run_id", "status", "engine", "total_tokens_per_s")
    rows = [("3", "c", "ok", engine, 3), ("2", "b", "ok", engine, 2), ("1", "a", "ok", "fastgen", 1)]
    rows += [("0", "x", "failed", "baseline", "")]
    with open(tmp_path / "runs.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    found = comparison(tmp_path)
    assert found.baseline is not None and (found.baseline.run_id, found.reason) == (baseline, reason)


# --- intervals ---


def rounds(results: Path, name: str, rates: list[float], series: str = "s", **changes: Any) -> None:
    """Makes repeated runs that say in which round they were made."""
    for number, rate in enumerate(rates):
        run(results, f"{name}{number}", rate, **changes)
        path = results / f"{name}{number}" / "record.json"
        record = json.loads(path.read_text()) | {"round": {"series": series, "number": number, "varied": []}}
        path.write_text(json.dumps(record))


DRIFT = [100.0, 90.0, 80.0, 70.0, 60.0, 50.0]


def test_runs_of_the_same_rounds_are_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds(tmp_path, "a", DRIFT)
    rounds(tmp_path, "b", [1.05 * rate for rate in DRIFT], **{"engine.token_budget": 64})
    near = [1.01, 0.99, 1.02, 0.98, 1.0, 1.01]
    rounds(tmp_path, "c", [by * rate for by, rate in zip(near, DRIFT, strict=True)], **{"engine.token_budget": 128})
    found = comparison(tmp_path, baseline="a2")
    by_budget = {one.settings["engine.token_budget"]: one for one in found.groups}
    faster, alike = by_budget[64], by_budget[128]
    assert faster.interval is not None and faster.interval.paired and faster.interval.clear
    assert faster.interval.low == pytest.approx(1.05) == faster.ratio
    assert alike.interval is not None and alike.interval.low < 1.0 < alike.interval.high
    assert by_budget[512].interval is None
    assert compare.main([str(tmp_path), "--baseline", "a2"]) == 0
    text = capsys.readouterr().out
    assert "1.05x  1.050-1.050 " in text and "1.00x ~" in text and "with 99% confidence" in text
    assert "not made in rounds" not in text
    assert compare.main([str(tmp_path), "--baseline", "a2", "--json"]) == 0
    data = {one["config"]["engine.token_budget"]: one for one in json.loads(capsys.readouterr().out)["groups"]}
    assert (data[64]["ratio_of"], data[64]["ratio_paired"], data[512]["ratio_low"]) == (6, True, None)
    assert data[128]["ratio_low"] == pytest.approx(alike.interval.low)


def test_runs_that_are_of_no_common_rounds_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds(tmp_path, "a", DRIFT)
    rounds(tmp_path, "b", [1.05 * rate for rate in DRIFT], series="t", **{"engine.token_budget": 64})
    run(tmp_path, "c", 80.0, **{"engine.token_budget": 128})
    by_budget = {one.settings["engine.token_budget"]: one for one in comparison(tmp_path, baseline="a2").groups}
    interval = by_budget[64].interval
    assert interval is not None and not interval.paired and not interval.clear
    assert by_budget[64].ratio == pytest.approx(1.05)
    assert by_budget[128].interval is None  # of a single run nothing is known
    assert compare.main([str(tmp_path), "--baseline", "a2"]) == 0
    assert "not made in rounds" in capsys.readouterr().out


def test_a_part_of_a_run_id_names_the_baseline(tmp_path: Path) -> None:
    for name in ("20260101-fastgen-aaaa", "20260102-fastgen-bbbb", "20260102-fastgen-bbbb2"):
        run(tmp_path, name, **{"engine.token_budget": 64 if name.endswith("aaaa") else 128, "git_commit": name * 2})
    for name, chosen in (("aaaa", 0), ("20260101", 0), ("20260102-fastgen-bbbb", 1), ("b2", 2)):
        baseline = comparison(tmp_path, baseline=name).baseline
        assert baseline is not None and baseline.run_id.endswith(("aaaa", "bbbb", "bbbb2")[chosen])
    with pytest.raises(UserError, match=r"--baseline: 'bbb' is in 20260102-fastgen-bbbb, 20260102-fastgen-bbbb2; give"):
        comparison(tmp_path, baseline="bbb")
    with pytest.raises(UserError, match="'zzzz' in it"):
        comparison(tmp_path, baseline="zzzz")


def test_a_part_that_only_repetitions_share_is_unambiguous(tmp_path: Path) -> None:
    run(tmp_path, "x1", 100.0)
    run(tmp_path, "x2", 120.0)
    run(tmp_path, "y", 220.0, **{"engine.token_budget": 64})
    found = comparison(tmp_path, baseline="x")
    assert found.groups[0].ratio == 2.0


def test_a_failed_baseline_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "good")
    run(tmp_path, "bad", status="oom", error="x", **{"model.name": "large"})
    line = refused(capsys, str(tmp_path), "--baseline", "bad")
    assert line == "error: --baseline: bad is oom, not ok; name a run that is"


def test_a_named_baseline_is_shown_though_filtered_out(tmp_path: Path) -> None:
    run(tmp_path, "a", 100.0)
    run(tmp_path, "b", 300.0, **{"engine.token_budget": 64})
    found = comparison(tmp_path, baseline="a", where=["engine.token_budget=64"])
    assert [(one.run_id, one.ratio) for one in found.groups] == [("b", 3.0), ("a", 1.0)]


def test_where_no_run_is_ok_there_is_no_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "a", status="failed", error="it broke")
    assert compare.main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "No run is ok" in output and "a failed: it broke" in output


# --- comparability ---


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        ({"dataset_sha256": "bb" * 32}, "dataset", "another dataset: sample bbbbbbbb; baseline: sample aaaaaaaa"),
        ({"dataset.name": "asc24"}, "dataset", "another dataset: asc24; baseline: sample"),
        ({"generation.stop": "length"}, "generation.stop", "generation.stop: length; baseline: eos"),
        ({"requests": 1}, "dataset.num_samples", "dataset.num_samples: 1; baseline: 2"),
        ({"model.name": "large"}, "model", "model: large; baseline: small"),
        ({"model.weights": "dummy"}, "model.weights", "model.weights: dummy; baseline: pretrained"),
        ({"model.dtype": "float16"}, "model.dtype", "model.dtype: float16; baseline: float32"),
        ({"device_name": "A GPU"}, "device_name", "device_name: A GPU; baseline: A CPU"),
        ({"generation.max_output_len": 8}, "generation.max_output_len", "max_output_len: 8; baseline: null"),
    ],
)
def test_what_is_not_comparable_is_said(
    tmp_path: Path, change: dict[str, Any], field: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "a", 100.0)
    run(tmp_path, "b", 135.0, **change)
    found = comparison(tmp_path)
    assert found.groups[0].differs_in == [field] and found.groups[1].differs_in == []
    assert [str(warning) for warning in found.warnings] == [str(found.warnings[0])]
    assert str(found.warnings[0]).startswith("b not comparable with the baseline: ")
    assert str(found.warnings[0]).endswith(text)
    assert compare.main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "1.35x !" in output and "! b not comparable" in output


def test_parallelism_and_scheduling_are_comparable(tmp_path: Path) -> None:
    run(tmp_path, "a")
    run(tmp_path, "b", **{"parallel.tp": 2, "engine.token_budget": 64, "engine.name": "mii"})
    assert comparison(tmp_path).warnings == []


def test_many_warnings_of_a_kind_are_one(tmp_path: Path) -> None:
    run(tmp_path, "a")
    for number in range(12):
        run(tmp_path, f"b{number}", requests=10 + number)
    (warning,) = comparison(tmp_path).warnings
    assert len(warning.run_ids) == 12 and "12 groups not comparable" in str(warning) and "and 8 more" in str(warning)


# --- --where ---


def test_where_keeps_the_groups_with_a_setting(tmp_path: Path) -> None:
    for name, budget, order in (("a", 64, "dataset"), ("b", 128, "dataset"), ("c", 256, "longest_first")):
        run(tmp_path, name, **{"engine.token_budget": budget, "engine.order": order})
    run(tmp_path, "d", status="failed", error="x", **{"engine.token_budget": 1024})

    def ids(*where: str) -> list[str]:
        return sorted(one.run_id for one in comparison(tmp_path, where=where).groups)

    assert ids("token_budget=64", "status=ok") == ["a"]
    assert ids("engine.token_budget=64", "engine.token_budget=256") == ["a", "c"]  # alternatives
    assert ids("engine.order=dataset", "token_budget=128.0") == ["b"]
    assert ids("git_commit=c0ffee") == ["a", "b", "c"]
    assert ids("engine.name=fastgen", "status=failed") == ["d"]
    assert ids("engine.quantization=null") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("engine.token_bugdet=64", "no run has a key 'engine.token_bugdet'; near: engine.token_budget"),
        ("token_budget=7", "no group left with engine.token_budget=7; there: 512"),
        ("token_budget", "'token_budget' is not KEY=VALUE; for example engine.token_budget=256"),
    ],
)
def test_a_wrong_condition_is_refused(
    tmp_path: Path, where: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "a")
    assert refused(capsys, str(tmp_path), "--where", where).startswith(f"error: --where: {line}")
