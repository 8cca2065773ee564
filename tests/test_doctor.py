"""The doctor: what it says of this machine is what a run does, and what is wrong is one line with the way out."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.checkpoints import save
from support.machine import EVERY_FLAG, kernels_on_cpu
from support.runs import ROOT, python, variables

from harness.basics.errors import UserError
from harness.config.compose import compose, to_config
from harness.config.schema import DType
from harness.doctor import __main__ as command
from harness.doctor import given, kernels, requirements
from harness.doctor import machine as machine_checks
from harness.doctor.examination import Look
from harness.doctor.findings import CONFIG, VERDICT, Findings, Outcome
from harness.doctor.heavy import Heavy
from harness.doctor.kernels import Machine
from harness.engines import catalogue
from harness.engines.fastgen.runners.native import checks as native_checks
from harness.models import demo
from harness.ranks.rank import Rank
from harness.running import job as jobs
from harness.running import preflight, target

CPU = Machine("cpu")


class Sound(Heavy):
    """All packages can be imported; what is heard in seconds has tests of its own."""

    def __init__(self, *entries: dict[str, Any]) -> None:
        self.entries = entries

    def package(self, name: str) -> dict[str, Any]:
        return {"package": name, "error": None, "version": "1"}

    def rest(self, key: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if key in entry]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for module in (preflight, target):  # what is free changes from one moment to the next
        monkeypatch.setattr(module, "available_memory_bytes", lambda: 16 * 2**30)
    catalogue.register()


def examined(*words: str, rank: Rank | None = None, where: Machine = CPU) -> Findings:
    """Returns what is found of a config, as the command finds it."""
    found = Findings(aloud=False)
    given.check(found, compose(list(words)), where, Sound(), rank)
    return found


def lines(found: Findings, outcome: Outcome, area: str = CONFIG) -> list[str]:
    return [str(one) for one in found.all if one.area == area and one.outcome is outcome]


# --- the command ---


@pytest.fixture(scope="module")
def whole(demo_model: Path) -> list[dict[str, str]]:
    """What ``python -m harness.doctor --json`` says of this machine and the default config."""
    done = python("-m", "harness.doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert all(one.keys() == {"area", "outcome", "text", "remedy"} for one in found)
    return found


def test_every_area_of_a_machine_without_a_gpu_is_looked_at(whole: list[dict[str, str]]) -> None:
    areas = dict.fromkeys(one["area"] for one in whole)
    expected = ["cpu", "memory", "gpu", "compiler", "kernels", "models", "packages", "extensions", "engines"]
    assert list(areas) == [*expected, "network", CONFIG, VERDICT]
    assert whole[-1] == {"area": VERDICT, "outcome": "ok", "text": "the config can run here", "remedy": ""}
    for area, count in (("models", len(list((ROOT / "conf" / "model").glob("*.yaml")))), ("engines", 5)):
        assert len([one for one in whole if one["area"] == area]) == count
    outcome = {one["text"].partition(" ")[0].rstrip(":"): one["outcome"] for one in whole if one["area"] == "engines"}
    assert outcome["mii"] == "no" and {outcome[name] for name in ("baseline", "ds_inference", "fastgen")} == {"ok"}
    for name in ("torch", "transformers", "deepspeed"):
        assert any(one["text"].startswith(f"{name} ") and one["outcome"] == "ok" for one in whole)
    (network,) = [one for one in whole if one["area"] == "network"]
    assert (network["outcome"], network["text"]) == ("ok", "two processes on this host add numbers over gloo")


def test_the_kernels_are_those_that_a_run_takes(whole: list[dict[str, str]], demo_model: Path) -> None:
    dtype = jobs.prepare(compose([])).dtype
    said = [one["text"] for one in whole if one["area"] == CONFIG and one["text"].startswith("engine=fastgen")]
    assert said[0].startswith(f"engine=fastgen computes it with {kernels_on_cpu(demo_model, dtype)} kernels")
    (ours,) = [one["text"] for one in whole if one["text"].startswith("smollm2_135m in")]
    assert f"in {dtype}: {kernels_on_cpu(demo_model, dtype)} kernels" in ours
    assert "on a GPU triton or torch, not deepspeed: 9 query to 3 key-value heads is a ratio of 3" in ours


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["modle=x"], "modle: no such key; did you mean model?"),
        (["engine.token_budgt=4"], "engine.token_budgt: no such key; did you mean engine.token_budget?"),
        (["model=llama3"], "model: no option named 'llama3'"),
        (["dataset.num_samples=-1"], "dataset.num_samples: -1; give a whole number"),
        (["engine.kernels=cuda"], "engine.kernels: 'cuda' is not known"),
        (["resume=no-such-run"], "resume: no run no-such-run"),
        (["--hostfile", "nowhere"], "--hostfile: 'nowhere': No such file or directory"),
        (["--jsn"], "command line: unrecognized arguments: --jsn"),
        (["-m", "engine=mii,fastgen"], "command line: "),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and said in captured.err, captured.err


def test_without_its_packages_it_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requirements, "asked", lambda: ["not-a-package>=1", "numpy", "pyyaml<1"])
    monkeypatch.setattr(requirements, "NEEDED", ("not-a-package",))
    assert command.main([]) == 1
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("[no] packages: not installed: not-a-package; run bash launch/setup.sh")
    assert second.startswith("[note] packages: of a version that the code is not written for: pyyaml ")
    assert last.startswith("[no] verdict: the config cannot run here: packages are missing")


def test_in_an_empty_environment_it_says_what_to_install(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    done = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", "-m", "harness.doctor"],
        cwd=ROOT,
        env=variables(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("[no] packages: not installed: torch, transformers, ") and done.stderr == ""
    assert last.startswith("[no] verdict: the config cannot run here: packages are missing")


def test_nothing_else_is_needed_to_look() -> None:
    code = "import sys; before = set(sys.modules); import harness.doctor.examination as one\n"
    code += "one.catalogue.register(); one._composed([])\n"
    code += "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables(), capture_output=True, text=True)
    packages = importlib.metadata.packages_distributions()
    took = {name.lower() for module in done.stdout.split() for name in packages.get(module, [])}
    asked = {requirements._name(line) for line in requirements.asked()}
    assert took & asked - {"hydra-optuna-sweeper"} == set(requirements.NEEDED), done.stderr


def test_what_the_user_can_mend_is_said_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CPU_ISA", "sse")
    found = Findings(aloud=False)
    assert Look(found)("kernels", native_checks.instruction_set) is None
    sets = "amx_bf16, avx512_bf16, avx512, avx2"
    line = f"[no] kernels: HARNESS_CPU_ISA: 'sse' is not known; choose one of {sets}, or leave it unset"
    assert [str(one) for one in found.all] == [line]


def test_what_nobody_has_foreseen_leaves_the_rest() -> None:
    found = Findings(aloud=False)
    look = Look(found)
    assert look("gpu", lambda: {}["driver"]) is None
    assert look("cpu", lambda: 7) == 7
    assert str(found.all[0]) == "[no] gpu: could not be looked at: KeyError: 'driver'; HYDRA_FULL_ERROR=1 says more"
    assert found.conclude() == 0
    look(CONFIG, lambda: {}["model"])
    assert found.conclude() == 1


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m harness.doctor | head -n 1; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        env=variables(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("[ok] cpu: ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_in_between_it_leaves_nothing_running(number: signal.Signals) -> None:
    words = [sys.executable, "-m", "harness.doctor"]
    process = subprocess.Popen(words, cwd=ROOT, env=variables(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"[ok] cpu: ")
    beside = psutil.Process(process.pid).children()
    assert len(beside) >= 3  # a compiler that is tried may be there for a moment
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + number, b"")
    assert not [one for one in beside if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_finding_is_one_line_of_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    found = Findings(aloud=True)
    found.no("area", "two\nlines and \x1b[31m", "mend it")
    found.no("area", "two\nlines and \x1b[31m", "mend it")
    assert capsys.readouterr().out == "[no] area: two lines and \\x1b[31m; mend it\n"
    assert found.conclude() == 0  # nothing of it is about the config


# --- the given config ---


def test_70b_on_this_machine_says_all_that_is_in_its_way() -> None:
    found = examined("model=llama2_70b", "parallel.tp=8")
    against = lines(found, Outcome.no)
    assert against[0].startswith("[no] config: model.path: not set; give the directory of a LLaMA-2 checkpoint")
    dtype = jobs.resolve_dtype(DType.auto, "cpu")
    assert any(f"model: {dtype} weights need" in line and "of memory are free" in line for line in against)
    (takes,) = [line for line in lines(found, Outcome.note) if "what it would take" in line]
    assert "128.5 GiB of bfloat16 weights" in takes and "8 x h100_80g" in takes and "0 CUDA devices" in takes
    assert found.conclude() == 1 and "for 2 reasons" in str(found.all[-1])


def test_what_it_would_take_is_what_a_split_would_choose() -> None:
    found = examined("model=llama2_70b", "model.weights=dummy")
    (takes,) = [line for line in lines(found, Outcome.note) if "what it would take" in line]
    for name in ("h100_80g", "b200_180g", "a100_40g"):
        planned = jobs.prepare(
            compose(["model=llama2_70b", f"hardware={name}"]),
            planned=target.described(to_config(compose([f"hardware={name}"])).hardware),
        )
        assert f"{planned.tp} x {name}" in takes


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model=llama2_7b"],
        ["model.path=/nowhere"],
        ["engine=mii"],
        ["engine=baseline", "parallel.tp=2"],
        ["engine=ds_inference", "engine.kernel_inject=true"],
        ["engine.kernels=deepspeed"],
        ["engine.kv_memory=100000GiB"],
        ["dataset=asc24"],
        ["dataset=asc24", "dataset.path=/nowhere.json"],
        ["parallel.tp=2"],
        ["parallel.dp=2"],
        ["model=llama2_70b", "model.weights=dummy", "model.dtype=float32"],
        ["model=llama2_70b", "model.weights=dummy", "model.dtype=float32", "preflight=false"],
        ["model.dtype=float16"],
    ],
    ids=lambda words: " ".join(words) or "default",
)
def test_the_verdict_is_that_of_a_run(words: list[str], demo_model: Path) -> None:
    config, found = compose(words), Findings(aloud=False)
    given.check(found, config, CPU, Sound(), None)
    try:
        jobs.prepare(config)
    except UserError as error:
        assert str(found.against[0]) == f"[no] config: {error}"
        assert found.conclude() == 1
    else:
        assert found.conclude() == 0, found.against


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, demo_model: Path) -> None:
    monkeypatch.setattr(preflight, "available_memory_bytes", lambda: 2**26)
    found = examined()
    (against,) = lines(found, Outcome.no)
    assert re.match(r"\[no] config: model: \w+ weights need 0\.\d GiB, 0\.1 GiB of memory are free; ", against)
    assert any("1 x a100_40g" in line for line in lines(found, Outcome.note))


def test_a_checkpoint_that_is_cut_short(tmp_path: Path) -> None:
    save(tmp_path)
    assert examined(f"model.path={tmp_path}").conclude() == 0
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    found = examined(f"model.path={tmp_path}")
    (against,) = lines(found, Outcome.no)
    assert "model.safetensors should have" in against and against.endswith("; copy it again")
    assert any("it has room" in line for line in lines(found, Outcome.ok)), "the rest is judged as conf/ describes it"


def test_results_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_model: Path) -> None:
    (tmp_path / "file").write_text("")
    (against,) = lines(examined(f"results_dir={tmp_path / 'file' / 'inside'}"), Outcome.no)
    assert "cannot be written: Not a directory; check this path, or set results_dir" in against
    (tmp_path / "runs.csv").write_text("no,table\n1\n")
    (against,) = lines(examined(f"results_dir={tmp_path}"), Outcome.no)
    assert "runs.csv" in against
    before = sorted(tmp_path.iterdir())
    assert examined(f"results_dir={tmp_path / 'made' / 'later'}").conclude() == 0
    assert sorted(tmp_path.iterdir()) == before, "it has made something"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(given.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    (against,) = lines(examined("preflight=false"), Outcome.no)
    assert "results go to" in against and against.endswith("; free space, or set results_dir to another disk")


@pytest.mark.skipif(os.geteuid() != 0, reason="root may write anywhere, so that the test has to become another user")
def test_results_that_another_user_owns(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from harness.basics.files import can_write; os.setuid(65534)\n"
    code += "try: can_write(Path(sys.argv[1]))\nexcept PermissionError as error: print(error.strerror)"
    (tmp_path / "closed").mkdir(mode=0o700)
    for place in (tmp_path / "closed", tmp_path / "closed" / "results"):
        done = subprocess.run(
            [sys.executable, "-c", code, place], cwd=ROOT, env=variables(), capture_output=True, text=True
        )
        assert done.stdout == "Permission denied\n", done.stderr


def test_the_demo_model_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    found = examined()
    assert any("the first run fetches it" in line for line in lines(found, Outcome.note))
    assert found.conclude() == 0 and not (tmp_path / "cache").exists()
    monkeypatch.setattr(demo, "SPACE", 2**60)
    assert "MB are free in" in lines(examined(), Outcome.no)[0]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "file"))
    assert "HARNESS_CACHE: the demo model cannot be kept in" in lines(examined(), Outcome.no)[0]


def test_a_package_that_the_engine_needs_is_broken(demo_model: Path) -> None:
    broken = Sound()
    broken.package = lambda name: {"error": "it is torn" if name == "deepspeed" else None}  # type: ignore[method-assign]
    for words, status in (([], 0), (["engine=ds_inference"], 1), (["parallel.dp=2"], 1), (["engine=simulate"], 0)):
        found = Findings(aloud=False)
        given.check(found, compose(words), CPU, broken, None)
        against = [line for line in lines(found, Outcome.no) if "deepspeed" in line]
        assert len(against) == status, words
    assert "engine=simulate" not in str(found.against)


def test_without_a_gpu_a_run_on_cuda_is_refused_and_a_simulation_is_not(
    monkeypatch: pytest.MonkeyPatch, demo_model: Path
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(target.device, "cuda_devices", lambda: 0)
    none = Machine("cuda", (), "there is no CUDA driver")
    found = Findings(aloud=False)
    kernels.all_of_them(found, none)
    kernels.engines(found, none, Sound())
    simulates, *others = [str(one) for one in reversed(found.all)]
    assert "simulate" in simulates and "no CUDA driver" not in simulates
    assert "[no] engines: fastgen: there is no CUDA driver" in others
    assert others[-1] == "[no] kernels: none on cuda: there is no CUDA driver"
    words = ["engine=simulate", "hardware=h100_80g", "model=llama2_70b", "parallel.tp=8"]
    assert examined(*words, where=none).conclude() == 0
    (against,) = lines(examined("model=llama2_70b", "model.weights=dummy", "parallel.tp=8", where=none), Outcome.no)
    assert against.startswith("[no] config: parallel: tp=8 x dp=1 needs 8 GPUs, this machine shows 0; ")


def test_requests_that_the_model_has_no_room_for(demo_model: Path) -> None:
    some = ["dataset=synthetic", "dataset.prompt=random", "dataset.num_samples=3", "dataset.output_len=10"]
    (against,) = lines(examined(*some, "dataset.input_len=9000"), Outcome.no)
    assert "3 of 3 requests are longer than the model's context of 8,192 tokens, and are rejected; set " in against
    found = examined("model.max_context=100")
    assert found.conclude() == 0
    assert any("of 72 requests are longer than" in line for line in lines(found, Outcome.note))


def test_a_run_that_is_complete_is_not_resumed(demo_model: Path) -> None:
    place = ROOT / "results" / "reference" / "sample"
    run_id = next(path.parent.name for path in sorted(place.glob("*/record.json")))
    (against,) = lines(examined(f"resume={run_id}", f"results_dir={place}"), Outcome.no)
    assert against == f"[no] config: resume: {run_id} is complete; start a new run"


def test_what_is_refused_on_a_cpu_has_its_devices_named() -> None:
    found = examined("experiment=asc24_70b_8gpu", "dataset=sample", "model.weights=dummy")
    assert "model.dtype: float16 is not computed well on cpu" in lines(found, Outcome.no)[0]
    assert any(
        "128.5 GiB of float16 weights and a KV cache: 8 x a100_40g" in line for line in lines(found, Outcome.note)
    )


def test_a_launch_on_several_hosts_has_its_slots(demo_model: Path) -> None:
    assert examined("parallel.dp=4", rank=Rank(world=4, local_world=2)).conclude() == 0
    (against,) = lines(examined("parallel.tp=1", "parallel.dp=3", rank=Rank(world=4, local_world=2)), Outcome.no)
    assert "parallel: tp=1 x dp=3 needs 3 ranks, the launch has 4; give the hostfile as many slots" in against


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_model: Path) -> None:
    monkeypatch.setattr(native_checks, "cpu_flags", lambda: EVERY_FLAG)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    words = [f"model.path={demo_model}", "model.dtype=bfloat16"]
    said = [line for line in lines(examined(*words), Outcome.ok) if "computes it" in line]
    assert said[0].endswith("computes it with native kernels") and not list(tmp_path.iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = Findings(aloud=False)
    machine_checks.compilers(found)
    assert str(found.all[0]).startswith("[no] compiler: no C++ compiler: g++ is not installed (CXX names another); ")
    said = [line for line in lines(examined(*words), Outcome.ok) if "computes it" in line]
    assert "with torch kernels, not native: no C++ compiler" in said[0]
    (against,) = lines(examined(*words, "engine.kernels=native"), Outcome.no)
    assert against.startswith("[no] config: engine.kernels: native: no C++ compiler: g++ is not installed")
    kernels.all_of_them(found, CPU)
    assert "[no] kernels: native: not here: no C++ compiler" in "\n".join(map(str, found.all))
