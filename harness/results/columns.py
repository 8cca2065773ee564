"""The one table of the columns of ``runs.csv``: what each says, who supplies it, how it is combined and compared.

Whatever else lists columns takes them from here: the row that a run writes, what a segment of a resumed run keeps, what
``harness.verify`` counts again, what ``harness.compare`` groups by and shows, and the table in ``results/README.md``.
New columns come at the end, so that older tables stay readable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

GIB = 2**30


class Source(Enum):
    """Who supplies a column."""

    RECORDER = "the recorder, as it opens and closes the run"
    CONFIG = "the config; corrected once the run knows better"
    WORKLOAD = "the dataset as read"
    ENGINE = "the engine, once it is loaded or from its statistics"
    COUNT = "counted from completions.jsonl"
    RATE = "a count / elapsed_s"
    TIME = "a percentile of times in completions.jsonl"
    CLOCK = "the clocks of rank 0 and the other ranks"
    MODEL = "the arithmetic of the model, and hardware.peak_flops"
    MACHINE = "the device or the code's repository"
    TELEMETRY = "the samples of every host"
    EFFICIENCY = "counts, energy, clock and hardware.price_per_hour, once the run is closed"
    PARITY = "verify=N, once the clock has stopped"


class Combine(Enum):
    """What becomes of the values of several segments, or of several ranks."""

    FIRST = "the first one's"
    LAST = "the last one's"
    EACH = "the last one's; the record keeps every segment's"
    SAME = "equal in all, or the run is refused"
    SUM = "their sum; unknown if one of them is"
    HIGHEST = "the highest"
    MEAN = "their mean over the clock; unknown if one of them is"
    JOINED = "all of them, where they differ"
    HASHED = "a hash of theirs, where they differ"
    WHOLE = "computed from all completions, or over the whole clock"


@dataclass(frozen=True, slots=True)
class Figure:
    """How ``harness.compare`` shows a column as a figure: the median of a group's runs.

    Attributes:
        place: among the figures of ``--csv``, ``--json`` and the page.
        terminal: its heading in the terminal; None where that has no column for it.
        room: the place in the order in which figures get what room the terminal has left.
        page: its heading on the page; None where that has another place for it.
        scale: times which, then formatted by ``form`` in the terminal and rounded to ``digits`` on the page.
        page_scale: ``scale`` on the page, where that differs.
    """

    place: int
    terminal: str | None = None
    room: int = 0
    form: str = ",.2f"
    page: str | None = None
    digits: int = 2
    scale: float = 1.0
    page_scale: float | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """One column of ``runs.csv``.

    Attributes:
        unit: empty for text and plain numbers.
        meaning: as in ``results/README.md``.
        kind: of its values; an int is an exact count.
        segments: how the segments of a resumed run make one value.
        ranks: how the ranks of a launch do; ranks are in the order of their numbers.
        config: the key of the config that settles it before a run knows better.
        setting: the name that ``compare`` gives it as a setting of a run; None for what is none.
        digest: whether it is shown by its first digits.
        repeats: whether repeated runs of one job agree in it.
        rate_of: the column that it is per second of ``elapsed_s``.
        figure: how ``compare`` shows it; None if it does not.
    """

    name: str
    unit: str
    meaning: str
    kind: type
    source: Source
    segments: Combine = Combine.LAST
    ranks: Combine = Combine.FIRST
    config: str | None = None
    setting: str | None = None
    digest: bool = False
    repeats: bool = False
    rate_of: str | None = None
    figure: Figure | None = None


# fmt: off
TABLE: tuple[Column, ...] = (
    Column("run_id", "", "the run's directory",
           str, Source.RECORDER, Combine.FIRST),
    Column("started_at", "UTC", "when it began",
           str, Source.RECORDER, Combine.FIRST),
    Column("status", "", "`ok`, `failed`, `oom`, `timeout`, `interrupted`, `invalid` (refused before it began)",
           str, Source.RECORDER, Combine.EACH),
    Column("error", "", "why it is not ok",
           str, Source.RECORDER, Combine.EACH),
    Column("engine", "", "who scheduled",
           str, Source.CONFIG, config="engine.name", setting="engine"),
    Column("kernels", "", "what computed the forward pass: `native`, `triton`, `torch`, `deepspeed`, `injected`, "
           "`mii`, `huggingface`",
           str, Source.ENGINE, Combine.JOINED, setting="engine.kernels", repeats=True),
    Column("model", "", "the option's name; the checkpoint's own where none was chosen, or another than it describes",
           str, Source.CONFIG, Combine.SAME, config="model.name", setting="model", repeats=True),
    Column("weights", "", "`pretrained` or `dummy`",
           str, Source.CONFIG, Combine.SAME, config="model.weights", setting="model.weights"),
    Column("dtype", "", "of weights and activations, `auto` resolved",
           str, Source.CONFIG, Combine.SAME, config="model.dtype", setting="model.dtype", repeats=True),
    Column("quantization", "", "of the weights",
           str, Source.CONFIG, config="engine.quantization", setting="engine.quantization", repeats=True),
    Column("dataset", "", "the option",
           str, Source.CONFIG, config="dataset.name", setting="dataset"),
    Column("dataset_sha256", "", "fingerprint of its file as stored, and of a file that lengths are from",
           str, Source.WORKLOAD, Combine.SAME, setting="dataset_sha256", digest=True, repeats=True),
    Column("stop", "", "the stop rule",
           str, Source.CONFIG, config="generation.stop", setting="generation.stop"),
    Column("requests", "requests", "how many there were",
           int, Source.WORKLOAD, setting="dataset.num_samples", repeats=True),
    Column("completed", "requests", "finished",
           int, Source.COUNT, Combine.WHOLE, Combine.WHOLE),
    Column("rejected", "requests", "could not fit",
           int, Source.COUNT, Combine.WHOLE, Combine.WHOLE),
    Column("prompt_tokens", "tokens", "fed, of completed requests; or shared, with `engine.prefix_sharing`",
           int, Source.COUNT, Combine.WHOLE, Combine.WHOLE),
    Column("output_tokens", "tokens", "generated, of completed requests",
           int, Source.COUNT, Combine.WHOLE, Combine.WHOLE),
    Column("total_tokens", "tokens", "their sum",
           int, Source.COUNT, Combine.WHOLE, Combine.WHOLE),
    Column("elapsed_s", "s", "the clock, as above",
           float, Source.CLOCK, Combine.WHOLE, Combine.HIGHEST,
           figure=Figure(6, page="elapsed\n(s)", digits=1)),
    Column("load_s", "s", "loading, outside the clock",
           float, Source.CLOCK, Combine.EACH),
    Column("warmup_s", "s", "warm-up, outside the clock",
           float, Source.CLOCK, Combine.EACH),
    Column("requests_per_s", "1/s", "`completed` / `elapsed_s`",
           float, Source.RATE, Combine.WHOLE, Combine.WHOLE, rate_of="completed"),
    Column("total_tokens_per_s", "tokens/s", "`total_tokens` / `elapsed_s`",
           float, Source.RATE, Combine.WHOLE, Combine.WHOLE, rate_of="total_tokens",
           figure=Figure(1)),
    Column("output_tokens_per_s", "tokens/s", "`output_tokens` / `elapsed_s`",
           float, Source.RATE, Combine.WHOLE, Combine.WHOLE, rate_of="output_tokens",
           figure=Figure(2, "output\ntok/s", 5, ",.1f", "output\ntokens/s", 1)),
    Column("ttft_p50_s", "s", "median time to first token, from the start of the clock, since all requests are there "
           "from the start",
           float, Source.TIME, Combine.WHOLE, Combine.WHOLE,
           figure=Figure(3, "ttft\np50 s", 4, page="first token\np50 (s)")),
    Column("ttft_p99_s", "s", "its 99th percentile",
           float, Source.TIME, Combine.WHOLE, Combine.WHOLE),
    Column("latency_p50_s", "s", "median time to the whole completion, from the start of the clock",
           float, Source.TIME, Combine.WHOLE, Combine.WHOLE,
           figure=Figure(4, "latency\np50 s", 1, page="latency\np50 (s)")),
    Column("latency_p99_s", "s", "its 99th percentile",
           float, Source.TIME, Combine.WHOLE, Combine.WHOLE,
           figure=Figure(5, "latency\np99 s", 7, page="latency\np99 (s)")),
    Column("tp", "ranks", "that share one model",
           int, Source.CONFIG, Combine.EACH, config="parallel.tp", setting="parallel.tp", repeats=True),
    Column("dp", "", "replicas",
           int, Source.CONFIG, Combine.EACH, config="parallel.dp", setting="parallel.dp", repeats=True),
    Column("device", "", "`cpu` or `cuda`",
           str, Source.ENGINE, setting="device", repeats=True),
    Column("device_name", "", "of one device",
           str, Source.MACHINE, Combine.JOINED, setting="device_name", repeats=True),
    Column("token_budget", "tokens", "most in a pass",
           int, Source.ENGINE, setting="engine.token_budget", repeats=True),
    Column("max_sequences", "sequences", "most in a pass; of ds_inference, rows of a batch",
           int, Source.ENGINE, setting="engine.max_sequences", repeats=True),
    Column("steps", "passes", "forward passes (baseline: requests) of all ranks",
           int, Source.ENGINE, Combine.SUM, Combine.SUM),
    Column("preemptions", "", "preempted sequences",
           int, Source.ENGINE, Combine.SUM, Combine.SUM,
           figure=Figure(10, "pre-\nempted", 10, ",.0f", "preemptions", 0)),
    Column("kv_peak_utilisation", "0 to 1", "highest share of the KV cache in use",
           float, Source.ENGINE, Combine.HIGHEST, Combine.HIGHEST,
           figure=Figure(11, "KV\npeak", 8, ".1%", "KV cache\npeak (%)", 1, page_scale=100.0)),
    Column("peak_memory_bytes", "bytes", "highest of any rank: resident memory on a CPU, device memory on a GPU",
           int, Source.MACHINE, Combine.HIGHEST, Combine.HIGHEST,
           figure=Figure(7, "peak\nGiB", 2, page="peak memory\n(GiB)", scale=1 / GIB)),
    Column("model_flops_utilisation", "0 to 1", "arithmetic the completed requests need / (`elapsed_s` x peak of all "
           "devices); empty where it is not known",
           float, Source.MODEL, Combine.WHOLE, Combine.WHOLE,
           figure=Figure(8, "FLOP\nutil.", 6, ".1%", "FLOP\nutilisation (%)", 1, page_scale=100.0)),
    Column("energy_j", "J", "within the clock: of all GPUs the run used, on a CPU of the processor packages; empty "
           "where nothing measures them",
           float, Source.TELEMETRY, Combine.SUM, Combine.SUM,
           figure=Figure(9, "energy\nJ", 9, ",.0f", "energy\n(J)", 0)),
    Column("config_hash", "", "equal hashes are the same job",
           str, Source.RECORDER, Combine.HASHED, repeats=True),
    Column("git_commit", "", "the code that ran it",
           str, Source.MACHINE, Combine.JOINED, setting="git_commit", digest=True, repeats=True),
    Column("parity_checked", "requests", "with `verify=N`: checked",
           int, Source.PARITY, Combine.WHOLE, Combine.WHOLE,
           figure=Figure(12, page="outputs\nchecked", digits=0)),
    Column("parity_exact_share", "0 to 1", "of them, exact",
           float, Source.PARITY, Combine.WHOLE, Combine.WHOLE,
           figure=Figure(13, "exact\nshare", 3, ".1%", "outputs\nexact (%)", 1, page_scale=100.0)),
    Column("parity_explained_share", "0 to 1", "of them, different by near-ties only; what is left of 1 is wrong",
           float, Source.PARITY, Combine.WHOLE, Combine.WHOLE,
           figure=Figure(14, page="outputs\nexplained (%)", digits=1, page_scale=100.0)),
    Column("simulated", "", "empty: measured; else what the times were computed from, `data sheet` or `fit`",
           str, Source.ENGINE, Combine.JOINED, setting="simulated", repeats=True),
    Column("device_busy_share", "0 to 1", "of the clock, in which a GPU had a pass to compute, by its own clock; empty "
           "on CPUs and where the engine does not measure it",
           float, Source.ENGINE, Combine.EACH, Combine.WHOLE),
    Column("tokens_per_joule", "tokens/J", "`total_tokens` / `energy_j`",
           float, Source.EFFICIENCY, Combine.WHOLE, Combine.WHOLE,
           figure=Figure(15, "tokens\nper J", 12, ",.2f", "tokens\nper joule")),
    Column("cost_per_million_tokens", "currency", "`hardware.price_per_hour` x devices x hours of the clock / million "
           "`total_tokens`; devices are GPUs, on a CPU hosts",
           float, Source.EFFICIENCY, Combine.WHOLE, Combine.WHOLE,
           figure=Figure(16, "cost\nper M", 11, ",.4g", "cost per\nmillion tokens", 4)),
    Column("others_cpu_share", "0 to 1", "of the CPU time of the cores that the run may use, what other processes and "
           "other virtual machines took during the clock; of several hosts the highest",
           float, Source.TELEMETRY, Combine.MEAN, Combine.HIGHEST,
           figure=Figure(17, "taken by\nothers", 13, ".1%", "CPU taken by\nothers (%)", 1, page_scale=100.0)),
    Column("draft_tokens", "tokens", "with `engine.draft`: drafted and computed; 0 without",
           int, Source.ENGINE, Combine.SUM, Combine.SUM),
    Column("accepted_draft_tokens", "tokens", "of them, those that became output",
           int, Source.ENGINE, Combine.SUM, Combine.SUM),
)
# fmt: on
COLUMNS: tuple[str, ...] = tuple(column.name for column in TABLE)
FIGURES: dict[str, Figure] = dict(
    sorted(
        ((column.name, column.figure) for column in TABLE if column.figure is not None),
        key=lambda item: item[1].place,
    )
)


def names_of(columns: Iterable[Column]) -> tuple[str, ...]:
    """Returns the names of columns."""
    return tuple(column.name for column in columns)


def combined_over_segments(*ways: Combine) -> tuple[str, ...]:
    """Returns the columns of which the segments of a run make one value in one of these ways."""
    return names_of(column for column in TABLE if column.segments in ways)


def columns_from_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns that the config alone settles, so that a run which fails at once has them too."""
    found = {}
    for column in TABLE:
        if column.config is not None:
            group, _, key = column.config.partition(".")
            section = config.get(group)
            value = section.get(key) if isinstance(section, dict) else None
            found[column.name] = None if value == "auto" else value  # "auto" is known only once the device is
    return found
