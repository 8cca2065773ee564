"""The config composed as a user composes it: every option, every refusal, one line each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from support.machine import EVERY_FLAG
from support.runs import ROOT, command, variables

from harness.basics.errors import UserError
from harness.config import flags, schema
from harness.config.checks import check_kv_heads, parse_bytes
from harness.config.compose import to_config
from harness.config.explain import explain
from harness.config.reference import every
from harness.config.schema import Config
from harness.engines.catalogue import register
from harness.engines.fastgen.runners.native import checks as native_checks
from harness.running.job import check, prepare, resolve_dtype


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def composed(*overrides: str) -> Config:
    """Composes as harness/main.py does, errors explained."""
    try:
        return to_config(compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error


@pytest.mark.parametrize("group", ["engine", "model", "dataset", "generation", "parallel", "hardware"])
def test_every_option_of_every_group_composes(group: str) -> None:
    options = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
    assert options
    for option in options:
        chosen = getattr(composed(f"{group}={option}"), group)
        if hasattr(chosen, "name"):
            assert chosen.name == option
    if group == "parallel":
        assert [composed(f"parallel={o}").parallel.tp for o in ("single", "tp2", "tp4", "tp8", "dp2")] == [
            1,
            2,
            4,
            8,
            1,
        ]


def test_the_contract_s_options_are_there() -> None:
    wanted = {
        "engine": {"baseline", "ds_inference", "fastgen", "mii", "simulate"},
        "model": {"smollm2_135m", "llama2_7b", "llama2_13b", "llama2_70b"},
        "dataset": {
            *(
                "sample",
                "asc24",
                "csv",
                "huggingface",
                "jsonl",
                "openai_batch",
                "parquet",
                "sharegpt",
                "synthetic",
                "text",
            )
        },
        "parallel": {"auto", "single", "tp2", "tp4", "tp8", "dp2"},
        "hardware": {"cpu", "a100_40g", "a100_80g", "h100_80g", "h200_141g", "h20_96g", "l40s_48g", "b200_180g"}
        | {"rtx_pro_6000_96g", "mi300x_192g"},
        "experiment": {"quickstart", "asc24_70b_8gpu"},
    }
    for group, options in wanted.items():
        assert options <= {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


def test_defaults_run_the_demo_model_on_the_sample() -> None:
    config = composed()
    check(config, "cpu")
    assert (config.engine.name, config.model.name, config.dataset.name) == ("fastgen", "smollm2_135m", "sample")
    assert (config.parallel.tp, config.parallel.dp, config.results_dir) == (None, None, "results")


def test_an_experiment_overlays_the_rest_and_the_command_line_overlays_it() -> None:
    assert composed("experiment=quickstart").dataset.num_samples == 16
    assert composed("experiment=quickstart", "dataset.num_samples=3").dataset.num_samples == 3
    challenge = composed("experiment=asc24_70b_8gpu")
    assert (challenge.model.name, challenge.parallel.tp, challenge.hardware.name) == ("llama2_70b", 8, "a100_80g")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("engine.token_budgt=3", "engine.token_budgt: no such key; did you mean engine.token_budget?"),
        ("token_budget=3", "token_budget: no such key; did you mean engine.token_budget?"),
        ("+engine.foo=1", "engine.foo: no such key"),
        ("+foo=1", "foo: no such key"),
        ("++engine.token_budgt=3", "engine.token_budgt: no such key; did you mean engine.token_budget?"),
        ("engine.kv_block_size=abc", "engine.kv_block_size: 'abc' is no whole number"),
        ("engine.kv_block_size=1.5", "engine.kv_block_size: '1.5' is no whole number"),
        ("engine.kv_block_size=null", "engine.kv_block_size: cannot be null"),
        ("model.demo=perhaps", "model.demo: 'perhaps' is no true or false"),
        ("engine.batch_size=8", "engine.batch_size: 8: engine=fastgen has no such key, ds_inference has; leave it out"),
        ("+engine.cuda_graph=true", "engine.cuda_graph: True: engine=fastgen has no such key, ds_inference has"),
        ("timeout_s=soon", "timeout_s: 'soon' is no number; give 0.001 to 1e9 (seconds): the run is ended after that"),
        (
            "engine.kv_block_size=x",
            "engine.kv_block_size: 'x' is no whole number; give a whole number (tokens): tokens in",
        ),
        ("model=llama3_8b", "model: no option named 'llama3_8b'; model.path=DIR alone is enough, for a checkpoint has"),
        ("model=/models/mine", "model: no option named '/models/mine'; model.path=/models/mine alone is enough, for a"),
        ("model=org/name", "model: no option named 'org/name'; model.path=org/name alone is enough, for a checkpoint"),
        (
            "dataset=/d/a.json",
            "dataset: no option named '/d/a.json'; give the file as dataset.path=/d/a.json, and choose its",
        ),
        ("model.dtype=int4", "model.dtype: 'int4' is not known; choose one of auto, float32"),
        (
            "engine.kernels=naive",
            "engine.kernels: 'naive' is not known; choose one of auto, triton, deepspeed, native, torch",
        ),
        ("generation.stop=never", "generation.stop: 'never' is not known; choose one of eos, length"),
        ("engine=vllm", "engine: no option named 'vllm'; choose one of baseline, ds_inference, fastgen"),
        ("experiment=nope", "experiment: no option named 'nope'; choose one of"),
        ("engine.token_budget=[1", "command line: "),
        ("nonsense", "command line: 'nonsense' cannot be read; write group=option"),
        ("engine.token_budget=64,", "command line: 'engine.token_budget=64,' cannot be read; write group=option"),
        ("engine.token_budget=int(x)", "command line: 'engine.token_budget=int(x)' cannot be read: ValueError while"),
        ("~engine", "engine.name: not set"),
        ("model.architecture=5", "model.architecture: "),
    ],
)
def test_what_hydra_refuses_is_one_line(override: str, line: str) -> None:
    with pytest.raises(UserError) as refused:
        composed(override)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["engine.token_budget=32", "engine.max_sequences=64"],
            "engine.token_budget: 32 is below engine.max_sequences=64",
        ),
        (["engine.token_budget=0"], "engine.token_budget: 0; give a whole number from 1"),
        (["engine.max_sequences=-1"], "engine.max_sequences: -1; "),
        (["engine.kv_block_size=0"], "engine.kv_block_size: 0; "),
        (["engine=ds_inference", "engine.batch_size=0"], "engine.batch_size: 0; "),
        (["parallel.tp=0"], "parallel.tp: 0; "),
        (["parallel.dp=-2"], "parallel.dp: -2; "),
        (["dataset.num_samples=0"], "dataset.num_samples: 0; "),
        (["generation.max_output_len=0"], "generation.max_output_len: 0; "),
        (["model.max_context=0"], "model.max_context: 0; "),
        (["timeout_s=0"], "timeout_s: 0.0; "),
        (["timeout_s=nan"], "timeout_s: nan; "),
        (["timeout_s=1e300"], "timeout_s: 1e+300; give seconds from 0.001 to 1e9"),
        (["timeout_s=1e-9"], "timeout_s: 1e-09; "),  # the system's timer would take it for none
        (["repeat=100000"], "repeat: 100000; give a whole number from 1 to 10000"),
        (["dataset.seed=-1"], "dataset.seed: -1; "),
        (["+hardware.peak_flops.int3=1e12"], "hardware.peak_flops.int3: no such type; choose one of float32, bfloat16"),
        (["model.architecture.rms_norm_eps=nan"], "model.architecture.rms_norm_eps: nan; give a number"),
        (["+model.architecture.x={a:[1,{b:nan}]}"], "model.architecture.x.a.1.b: nan; "),
        (['model.name="a\tb"'], "model.name: 'a\\tb'; give a name of 1 to 200 printable characters"),
        (["hardware.name=''"], "hardware.name: ''; "),
        (["engine.kv_memory=0"], "engine.kv_memory: 0; "),
        (["engine.kv_memory=-0.5"], "engine.kv_memory: -0.5; "),
        (["engine.kv_memory=nan"], "engine.kv_memory: nan; "),
        (["engine.kv_memory=lots"], "engine.kv_memory: 'lots'; "),
        (["engine=ds_inference", "engine.kernel_inject=true"], "engine.kernel_inject: true needs CUDA"),
        (["engine.kernels=deepspeed"], "engine.kernels: deepspeed needs CUDA"),
        (["engine=mii"], "engine: mii needs CUDA"),
        (["engine=simulate", "verify=2"], "verify: 2: the tokens of a simulation are made up"),
        (["engine=simulate", "engine.eos_rate=2"], "engine.eos_rate: 2; give a chance above 0"),
        (["engine=simulate", "engine.eos_rate=often"], "engine.eos_rate: 'often'; give a chance above 0"),
        (["engine=simulate", "engine.pace=-1"], "engine.pace: -1.0; give real seconds"),
        (
            ["engine=simulate", "engine.token_budget=8", "engine.max_sequences=64"],
            "engine.token_budget: 8 is below engine.max_sequences=64",
        ),
        (["engine=simulate", "hardware=a100_80g", "parallel.tp=4"], "parallel.tp: 4 ranks share 3 key/value heads"),
        (["engine=ds_inference", "engine.cuda_graph=true"], "engine.cuda_graph: true needs CUDA"),
        (["engine=ds_inference", "engine.batch_tokens=0"], "engine.batch_tokens: 0"),
        (["engine.quantization=wf6af16"], "engine.quantization: wf6af16: only DeepSpeed's ragged kernels on CUDA"),
        (["engine.quantization=int3"], "engine.quantization: 'int3'; give null or wf6af16"),
        (["engine.draft=lookup", "engine.draft_len=0"], "engine.draft_len: 0"),
        (["engine.name=fast"], "engine.name: 'fast'; choose one of"),
        (["engine.name=mii"], "engine.name: mii, with the keys of another engine; use engine=mii"),
        (["model.dtype=float16"], "model.dtype: float16"),
        (["parallel.tp=4"], "parallel.tp: 4 ranks share 3 key/value heads"),
        (["engine=baseline", "parallel.tp=2"], "parallel.tp: 2: the baseline"),
        (["verify=-1"], "verify: -1"),
        (["repeat=0"], "repeat: 0"),
        (["sweep.save_as=../x"], "sweep.save_as: '../x'"),
        (["sweep.confirm=-1"], "sweep.confirm: -1"),
        (["sweep.confirm_samples=0"], "sweep.confirm_samples: 0"),
        (["results_dir=''"], "results_dir: ''"),
        (["hardware.peak_flops.bfloat16=-1"], "hardware.peak_flops.bfloat16: -1.0"),
        (["hardware.memory_bandwidth=nan"], "hardware.memory_bandwidth: nan"),
        (["hardware.node_bandwidth=-5e10"], "hardware.node_bandwidth: -50000000000.0; give the data sheet's figure"),
        (["hardware.devices_per_node=0"], "hardware.devices_per_node: 0; give a whole number from 1"),
        (["+hardware.peak_flops.float8=0"], "hardware.peak_flops.float8: 0.0; give the data sheet's figure"),
        (
            ["engine.token_budget=99999999999999"],
            "engine.token_budget: 99999999999999; give a whole number from 1 to 2",
        ),
    ],
)
def test_impossible_combinations_on_cpu(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        check(composed(*overrides), "cpu")
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_more_ranks_than_memory_are_refused() -> None:
    with pytest.raises(UserError, match=r"^parallel: 100000 ranks need 29296\.9 GiB before they load a model, "):
        prepare(compose("config", ["parallel.dp=100000"]))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--bogus"], "command line: no such flag: '--bogus'; write group.key=value"),
        (["--cfg", "nonsense"], "command line: argument --cfg/-c: invalid choice"),
        (["--cfg"], "command line: argument --cfg/-c: expected one argument"),
        (["-m", "--cfg", "job"], "command line: -m and --cfg do not go together; leave out -m"),
        (["--run", "--info"], "command line: --info and --run do not go together"),
        (["-m", "--help"], "command line: -m and --help do not go together; leave out -m, and give one value a key"),
        (["--help", "--resolve"], "command line: --resolve says how --cfg prints"),
        (["--package", "results_dir=x"], "command line: --package says how --cfg prints, and there is none"),
        (["--resolve"], "command line: --resolve says how --cfg prints"),
        (["--experimental-rerun", "x.pickle"], "command line: --experimental-rerun reads a pickle"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(arguments: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        flags.parse(arguments)
    assert str(refused.value).startswith(line)


def test_flags_may_be_abbreviated() -> None:
    assert flags.parse(["--multi", "engine.token_budget=1,2"]).multirun
    assert flags.parse(["--cfg", "job", "--package", "engine", "--resolve"]).package == "engine"


@pytest.mark.parametrize("kernels", ["auto", "native", "torch"])
def test_kernels_that_a_cpu_can_have_are_let_through_there(kernels: str) -> None:
    check(composed(f"engine.kernels={kernels}"), "cpu")


@pytest.mark.parametrize(
    ("overrides", "flags", "found"),
    [
        (["parallel.tp=2"], EVERY_FLAG, "they do not shard a model (parallel.tp)"),
        (["model.architecture.hidden_act=gelu"], EVERY_FLAG, "its hidden_act is gelu, not silu or gelu_pytorch_tanh"),
        (["model.architecture.model_type=gemma2"], EVERY_FLAG, "gemma2 is not one of the families"),
        (["model.dtype=bfloat16"], {"avx", "avx2"}, "this processor has no fma"),
        ([], {"avx512f", "avx512bw", "avx512vl"}, "this processor has no avx2, fma"),
        (["model.dtype=bfloat16"], {"avx2", "fma"}, None),
        (["model.dtype=float32"], {"avx2", "fma"}, None),
        (["parallel.dp=2"], EVERY_FLAG, None),
        (["engine.kernels=auto", "parallel.tp=2"], EVERY_FLAG, None),
        (["engine.kernels=torch"], set(), None),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
def test_what_the_native_kernels_cannot_compute_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], flags: set[str], found: str | None
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(native_checks, "cpu_flags", lambda: flags)
    tiny = [f"model.architecture.{key}=64" for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")]
    tiny = ["model=llama2_7b", "model.weights=dummy", *tiny, "+model.architecture.head_dim=16", "model.dtype=float32"]
    job = compose("config", [*tiny, "engine.kernels=native", *overrides])
    if found is None:
        assert prepare(job).accelerator == "cpu"
        return
    with pytest.raises(UserError) as refused:
        prepare(job)
    assert str(refused.value).startswith(f"engine.kernels: native: {found}")
    assert str(refused.value).endswith("; use engine.kernels=torch or auto")


def test_float16_is_fine_on_cuda() -> None:
    check(composed("model.dtype=float16"), "cuda")


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine=mii", "parallel.tp=2"],
        ["engine.kernels=deepspeed", "parallel.tp=2", "parallel.dp=2"],
        ["engine.quantization=wf6af16", "model.dtype=float16"],
        ["engine=ds_inference", "engine.kernel_inject=true", "parallel.tp=2"],
        ["engine=ds_inference", "engine.cuda_graph=true"],
    ],
)
def test_what_cuda_has_is_let_through_there(overrides: list[str]) -> None:
    check(composed(*overrides), "cuda")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["engine=mii", "parallel.dp=2"], "parallel.dp: 2: MII's pipeline is one replica a launch"),
        (["engine.kernels=native"], "engine.kernels: native computes on a CPU, and this run is on cuda"),
        (["engine.draft=lookup"], "engine.draft: lookup: engine.kernels=auto on cuda cannot check drafts; use "),
        (
            ["engine.draft=lookup", "engine.kernels=triton"],
            "engine.draft: lookup: engine.kernels=triton on cuda cannot",
        ),
        (["engine=ds_inference", "engine.cuda_graph=true", "parallel.tp=2"], "engine.cuda_graph: true: DeepSpeed"),
        (
            ["engine=ds_inference", "engine.cuda_graph=true", "engine.kernel_inject=true"],
            "engine.cuda_graph: true: DeepSpeed",
        ),
        (["engine.quantization=wf6af16"], "model.dtype: auto: engine.quantization=wf6af16 computes with float16"),
        (
            ["engine.quantization=wf6af16", "model.dtype=float16", "engine.kernels=torch"],
            "engine.quantization: wf6af16: only DeepSpeed's ragged kernels",
        ),
    ],
)
def test_impossible_combinations_on_cuda(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        check(composed(*overrides), "cuda")
    assert str(refused.value).startswith(line)


def test_kv_heads_bound_tensor_parallelism() -> None:
    check_kv_heads(8, 8)
    check_kv_heads(8, None)
    with pytest.raises(UserError, match=r"parallel\.tp"):
        check_kv_heads(9, 8)


def test_sizes() -> None:
    assert [parse_bytes(size) for size in (0.5, 7, "2GiB", "1.5 MB", "12")] == [0.5, 7, 2 * 2**30, 1.5e6, 12]
    for nonsense in ("", "GiB", "2 GiX", "-1", "1e9", "2GiB2"):
        with pytest.raises(ValueError, match="not a size"):
            parse_bytes(nonsense)


def test_dtype_auto_takes_bfloat16_on_cuda() -> None:
    assert resolve_dtype(schema.DType.auto, "cuda") == "bfloat16"
    assert resolve_dtype(schema.DType.float32, "cuda") == "float32"
    assert resolve_dtype(schema.DType.auto, "cpu") in ("bfloat16", "float32")


def test_every_key_can_be_asked_after() -> None:
    assert {"engine.token_budget", "sweep.resume", "results_dir"} <= every().keys()


HEAVY = ("torch", "transformers", "deepspeed", "numpy", "pandas", "accelerate")


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--help"], ["engine=mii"], ["dataset=asc24"]])
def test_nothing_heavy_is_imported_to_answer(arguments: list[str], tmp_path: Path) -> None:
    probe = (
        "import sys, runpy, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules]))\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, 'harness')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    results = [] if arguments[0].startswith("--") else [f"results_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", probe, *command(*arguments, *results)[1:]],
        cwd=ROOT,
        env=variables(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == (2 if results else 0), done.stderr
    assert "HEAVY []" in done.stdout
