"""fastgen, the committee's loop and other engines on the same requests, in turn; called by bench_cpu.sh.

Every request is generated to exactly its output_len (generation.stop=length). Each round measures the machine's rate of
matrix products, then runs the engines one after the other, each in a process of its own and pinned to --cores; loading
and a warm-up are outside the clock. The table has the median of the rounds. The baseline, one request at a time, runs
the first --baseline-requests only: its rate hardly depends on how many, and all of them would take it hours.

Percent of roofline: the floating-point operations that the requests need, at the highest matrix rate that was measured
on any of the model's shapes in any round (all cores at once), as a part of the measured time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "launch" / "peers"
sys.path.insert(0, str(ROOT))

import bench_engines
from hydra import compose, initialize_config_dir

from harness.basics.cache import cache_root
from harness.basics.errors import UserError, report
from harness.engines.catalogue import register
from harness.models.tokenizer import load_tokenizer
from harness.running import job

OURS, BASELINE = "fastgen", "baseline"
TITLES = {"openvino": "OpenVINO GenAI", "vllm": "vLLM"}


def main() -> int:
    """Sets up, runs the rounds and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", default=",".join(map(str, sorted(os.sched_getaffinity(0)))), help="as in 0,1")
    parser.add_argument("--peers", default="openvino,vllm", help="comma-separated; empty for none")
    parser.add_argument("--baseline-requests", type=int, default=16)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench_cpu")
    options, overrides = parser.parse_known_args()
    peers = [peer for peer in options.peers.split(",") if peer]
    unknown = [peer for peer in peers if peer not in TITLES] + [word for word in overrides if word.startswith("-")]
    if unknown:
        print(f"error: {unknown[0]}: no such option or peer; the peers are {', '.join(TITLES)}", file=sys.stderr)
        return 2
    try:
        bench = Bench(options.cores, options.results.absolute(), ["generation.stop=length", *overrides])
        for peer in peers:
            bench.set_up(peer)
        bench.run(options.rounds, peers, options.baseline_requests)
    except UserError as error:
        return report(error)
    except subprocess.CalledProcessError as error:
        words = " ".join(map(str, error.cmd))
        last = (error.stderr or "").strip().splitlines()[-1:] or ["no message"]
        print(f"error: {words} ended with status {error.returncode}: {last[0]}", file=sys.stderr)
        return 1
    return 0


class Bench:
    """The requests, as a file that every engine reads, and the ways to run them."""

    def __init__(self, cores: str, results: Path, overrides: list[str]) -> None:
        self.cores, self.results, self.overrides = cores, results, overrides
        self.threads = len(cores.split(","))
        results.mkdir(parents=True, exist_ok=True)
        register()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            self.job = job.prepare(compose("config", overrides=overrides))
        source = self.job.source
        if source.kind != "directory" or source.path is None:
            raise UserError("model", f"{source.kind}: the other engines read a checkpoint directory", "give model.path")
        self.model = source.path
        tokenizer = load_tokenizer(source)
        requests = job.resolve_requests(self.job, tokenizer).requests
        self.requests: list[tuple[list[int], int]] = []
        for request in requests:
            assert request.output_len is not None  # resolve_requests() has seen to it
            ids = tokenizer(request.prompt).input_ids if request.prompt_ids is None else list(request.prompt_ids)
            self.requests.append((ids, request.output_len))
        self.file = results / "requests.json"
        self.file.write_text(json.dumps(self.requests))

    def set_up(self, peer: str) -> None:
        """Makes the environment (and model files) of a peer, once for each version of its requirements."""
        for requirements in sorted(PEERS.glob(f"{peer}*.txt")):
            environment = self._environment(requirements.stem)
            done = environment / "installed"
            if done.exists() and done.read_text() == requirements.read_text():
                continue
            print(f"setting up {requirements.stem} in {environment} (once; minutes)", flush=True)
            shutil.rmtree(environment, ignore_errors=True)
            self._do([sys.executable, "-m", "venv", str(environment)])
            pip = [str(environment / "bin/python"), "-m", "pip", "--disable-pip-version-check"]
            self._do([*pip, "install", "-q", "-r", str(requirements)])
            # Dependencies that these engines can do without, in versions that do not load beside this torch.
            self._do([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"])
            done.write_text(requirements.read_text())
        if peer == "openvino" and not (self._exported / "openvino_model.xml").exists():
            print("exporting the model for OpenVINO (once)", flush=True)
            python = self._environment("openvino-export") / "bin/python"
            unfinished = self._exported.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            self._do([str(python), str(PEERS / "export_openvino.py"), self.model, str(unfinished)])
            os.replace(unfinished, self._exported)

    def run(self, rounds: int, peers: list[str], baseline_requests: int) -> None:
        """Runs all rounds and prints each figure as it comes, then the table."""
        rates: list[float] = []
        seconds: dict[str, list[float]] = {}
        flops = 0.0
        threads = {self.threads, 1}
        tokens = sum(len(prompt) + output for prompt, output in self.requests)
        few = self.requests[:baseline_requests]
        few_tokens = sum(len(prompt) + output for prompt, output in few)
        baseline: dict[int, list[float]] = {}
        for number in range(1, rounds + 1):
            rates.append(self._matrix_rate())
            self._say(number, "matrix rate", f"{rates[-1]:8.1f} GFLOP/s")
            ours = self._ours(["engine=fastgen"], self.threads)
            flops = ours["model_flops"]
            seconds.setdefault(OURS, []).append(ours["elapsed_s"])
            self._say(number, OURS, f"{tokens / ours['elapsed_s']:8.1f} total tokens/s in {ours['elapsed_s']:.1f} s")
            for peer in peers:
                elapsed = self._peer(peer)
                seconds.setdefault(peer, []).append(elapsed)
                self._say(number, TITLES[peer], f"{tokens / elapsed:8.1f} total tokens/s in {elapsed:.1f} s")
            for count in sorted(threads):
                words = ["engine=baseline", f"dataset.num_samples={len(few)}"]
                elapsed = self._ours(words, count)["elapsed_s"]
                baseline.setdefault(count, []).append(few_tokens / elapsed)
                line = f"{few_tokens / elapsed:8.1f} total tokens/s in {elapsed:.1f} s, {len(few)} requests"
                self._say(number, f"{BASELINE}, {count} threads", line)
            if number == 1:  # from now on at its best number of threads only
                threads = {max(baseline, key=lambda count: baseline[count][0])}
        best = threads.pop()
        totals = {name: tokens / statistics.median(found) for name, found in seconds.items()}
        totals[f"{BASELINE} ({best} threads, {len(few)} requests)"] = statistics.median(baseline[best])
        self._table(totals, rounds, max(rates), flops / tokens, peers)

    def _table(
        self, totals: dict[str, float], rounds: int, rate: float, flops_per_token: float, peers: list[str]
    ) -> None:
        prompt = sum(len(ids) for ids, _ in self.requests)
        output = sum(length for _, length in self.requests)
        roofline = rate * 1e9 / flops_per_token
        base = list(totals)[-1]
        rows = [["engine", "total tok/s", "x baseline", *(f"x {TITLES[peer]}" for peer in peers), "of roofline"]]
        for name, total in totals.items():
            ratios = [total / totals[other] for other in (base, *peers)]
            share = "" if name == base else f"{total / roofline:.0%}"
            rows.append([TITLES.get(name, name), f"{total:.1f}", *(f"{ratio:.2f}" for ratio in ratios), share])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            f"{Path(self.model).name} {self.job.dtype}, {self.job.workload.name}: {len(self.requests)} requests, "
            f"{prompt:,} prompt + {output:,} output tokens, cores {self.cores}, median of {rounds}",
            f"roofline {roofline:.0f} total tokens/s: {flops_per_token / 1e6:.0f} MFLOP a token at "
            f"{rate:.0f} GFLOP/s, the highest matrix rate of the rounds",
            "",
            *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        ]
        print("\n" + "\n".join(lines))
        (self.results / "table.txt").write_text("\n".join(lines) + "\n")

    def _matrix_rate(self) -> float:
        """Returns the best rate of matrix products on the model's shapes, all cores at once, in GFLOP/s."""
        words = [str(ROOT / "launch" / "matrix_rate.py"), self.model, self.job.dtype, self.cores]
        return float(self._answer([sys.executable, *words])["gflops"])

    def _ours(self, words: list[str], threads: int) -> dict[str, Any]:
        cores = ",".join(self.cores.split(",")[:threads])
        row = bench_engines.run(" ".join(words), self.overrides, cores, self.results)
        record = json.loads((self.results / row["run_id"] / "record.json").read_text())
        return {"elapsed_s": float(row["elapsed_s"]), "model_flops": record["model_flops"]}

    def _peer(self, peer: str) -> float:
        python = self._environment(peer) / "bin/python"
        model = self._exported if peer == "openvino" else self.model
        words = [str(PEERS / f"run_{peer}.py"), str(model), str(self.file), self.job.dtype, self.cores]
        answer = self._answer(["taskset", "-c", self.cores, str(python), *words])
        if answer["wrong_length"]:
            raise UserError(peer, f"{answer['wrong_length']} requests have another length", "see its own settings")
        return float(answer["seconds"])

    def _answer(self, command: list[str]) -> dict[str, Any]:
        """Runs a program and returns the JSON object that it printed among other things."""
        lines = [line for line in self._do(command).splitlines() if line.startswith("{")]
        if not lines:
            raise UserError(
                next(Path(word).name for word in command if word.endswith(".py")),
                "printed no figures",
                f"see {self.results / 'log.txt'}",
            )
        return json.loads(lines[-1])

    def _do(self, command: list[str]) -> str:
        """Runs a command and returns what it printed; its messages go to the log."""
        with (self.results / "log.txt").open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {' '.join(command)}\n")
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
            log.write(done.stderr[-20000:])
        done.check_returncode()
        return done.stdout

    def _say(self, number: int, name: str, figure: str) -> None:
        load = os.getloadavg()[0]
        print(f"round {number}  {name:20}  {figure}  (load average {load:.1f})", flush=True)

    def _environment(self, name: str) -> Path:
        return cache_root() / "peers" / name

    @property
    def _exported(self) -> Path:
        return cache_root() / "peers" / f"{Path(self.model).name}-openvino"


if __name__ == "__main__":
    sys.exit(main())
