"""The shared queue between real ranks: two processes under DeepSpeed's launcher, talking over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import launched

RANK = """
import json, os, sys, time
sys.path.insert(0, os.getcwd())
from harness.ranks import rank as ranks
from harness.ranks.rendezvous import RankFailed, Rendezvous
from harness.ranks.replicas import Replicas
from harness.basics.errors import UserError
from harness.workload.records import Completion, Request

mode, place = sys.argv[-2:]
rank = ranks.current()
found, mine, stopped = [], [], []
rendezvous = Rendezvous(rank, failed=lambda: stopped.append(1))
rendezvous.open()
rendezvous.meet({"the same": True})
replicas = Replicas(rank, "cpu", rendezvous)
replicas.join()
requests = [Request(index, "x", 1) for index in range(50)]

def completion(request):
    return Completion(request.index, 1, 1, "length", [7], "text \\u2028", 0.5, 1.0)

def deliver(completion):
    if mode == "full" and len(found) == 2:
        raise UserError("completions.jsonl", "no space left on device", "free space")
    found.append(completion)

if rank.first:
    replicas.receive(deliver)
replicas.barrier()
if mode == "full":
    if rank.first:
        try:
            for request in replicas.take(requests):
                time.sleep(0.01)
            ended = "queue"
        except UserError as error:
            ended = str(error)
        outcome = {"ended": ended, "found": len(found), "taken": replicas.store.add("taken", 0)}
        open(place, "w").write(json.dumps(outcome))
        replicas.store.add("over", 1)
    else:
        for request in replicas.take(requests):
            replicas.send(completion(request))
            time.sleep(0.01)
        while not replicas.store.add("over", 0):
            time.sleep(0.01)
    sys.exit(0)
for request in replicas.take(requests):
    mine.append(request.index)
    if not rank.first:
        replicas.send(completion(request))
        if mode == "fails" and len(mine) == 3:
            replicas.stop()
            rendezvous.fail("out of luck", 1)
            time.sleep(1)  # the launcher ends rank 0 once this one is gone
            sys.exit(0)
    time.sleep(0.002 if rank.first else 0.01)  # a fast and a slow replica
if not rank.first:
    replicas.finish({"elapsed_s": 1.5})
else:
    outcome = {"mine": mine, "stopped": len(stopped)}
    try:
        outcome["results"] = replicas.wait()
    except RankFailed as failure:
        outcome["failure"] = str(failure)
    outcome["found"] = [[c.index, c.token_ids, c.text] for c in found]
    outcome["stopped"] = len(stopped)
    open(place, "w").write(json.dumps(outcome))
if mode == "works":
    replicas.leave()
"""


def test_each_request_is_taken_once_and_comes_back(tmp_path: Path) -> None:
    outcome = launched(tmp_path, RANK, 2, "works")
    theirs = [index for index, _, _ in outcome["found"]]
    assert sorted(outcome["mine"] + theirs) == list(range(50))
    assert len(outcome["mine"]) > len(theirs) > 0  # the fast replica did more
    assert theirs == sorted(theirs)  # in the order of finishing
    assert outcome["found"][0][1:] == [[7], "text \u2028"]
    assert outcome["results"] == {"1": {"elapsed_s": 1.5}}
    assert outcome["stopped"] == 0


@pytest.mark.slow
def test_a_completion_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    outcome = launched(tmp_path, RANK, 2, "full")
    assert outcome["ended"].startswith("completions.jsonl: no space left on device")
    assert outcome["found"] == 2
    assert outcome["taken"] < 50


@pytest.mark.slow
def test_a_failing_rank_is_heard_with_its_own_message(tmp_path: Path) -> None:
    outcome = launched(tmp_path, RANK, 2, "fails")
    assert outcome["failure"] == "rank 1: out of luck"
    assert outcome["stopped"] == 1
    assert len(outcome["found"]) == 3
