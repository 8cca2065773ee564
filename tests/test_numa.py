"""NUMA nodes: which there are, which cores and what memory of theirs a rank gets, and the replicas that they make.

Their trees are made up, as the kernel would show them; a run on two nodes has this machine's cores on them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from support.runs import RANDOM, ROOT, TINY, deepspeed, launched, ran

from harness.costs.memory import Memory
from harness.engines.catalogue import register
from harness.engines.shared import kv_memory
from harness.machine import numa
from harness.machine.memory import available_memory_bytes
from harness.machine.numa import Node, Place, places
from harness.ranks.rank import Rank
from harness.running import job, split

MIB = 2**20
PLENTY = 2**40
needs_two_cores = pytest.mark.skipif(len(numa.affinity()) < 2, reason="needs two cores to bind ranks to")


def tree(root: Path, nodes: dict[int, str], free: dict[int, int] | int = PLENTY, **files: str) -> Path:
    """Writes a tree like the kernel's of nodes with these lists of cores; returns its root.

    Args:
        free: bytes of each node's memory that are free; a node that is not named has none at all.
        files: further ones, by name: ``distance0`` is node 0's, ``mems`` the nodes whose memory may be used.
    """
    for number, cores in nodes.items():
        place = root / "sys/devices/system/node" / f"node{number}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(cores + "\n")
        has = free if isinstance(free, int) else free.get(number, 0)
        kinds = {"MemTotal": 4 * has, "MemFree": has // 2, "Active(file)": has // 2, "AnonPages": 3 * has}
        (place / "meminfo").write_text("".join(f"Node {number} {k}: {v // 1024:8} kB\n" for k, v in kinds.items()))
        if (distance := files.get(f"distance{number}")) is not None:
            (place / "distance").write_text(distance + "\n")
    if (allowed := files.get("mems")) is not None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/status").write_text(f"Name:\tpython\nMems_allowed_list:\t{allowed}\n")
    return root


def halves() -> list[str]:
    """Returns this machine's cores in two lists."""
    cores = numa.affinity()
    return [",".join(map(str, half)) for half in (cores[: len(cores) // 2], cores[len(cores) // 2 :])]


def test_the_nodes_are_those_whose_cores_and_memory_may_be_used(tmp_path: Path) -> None:
    root = tree(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15", 2: ""}, {0: 6 * MIB, 1: 4 * MIB, 2: 9 * MIB})
    assert numa.nodes(range(16), root) == [
        Node(0, (0, 1, 2, 3, 8, 9, 10, 11), 6 * MIB),
        Node(1, (4, 5, 6, 7, 12, 13, 14, 15), 4 * MIB),
    ]
    assert numa.nodes({2, 5, 13}, root) == [Node(0, (2,), 6 * MIB), Node(1, (5, 13), 4 * MIB)]
    assert numa.nodes({2, 3}, root) == [Node(0, (2, 3), 6 * MIB)]
    assert numa.free_bytes([1, 2], root) == 13 * MIB


def test_cores_without_memory_count_to_the_nearest_node(tmp_path: Path) -> None:
    cores = {0: "0-1", 1: "2-3", 2: "4-5", 3: "6-7"}
    far = {"distance1": "32 10 32 12", "distance2": "12 32 10 32"}
    found = numa.nodes(range(8), tree(tmp_path / "bare", cores, {0: MIB, 3: MIB}, **far))
    assert [(node.number, node.cores) for node in found] == [(0, (0, 1, 4, 5)), (3, (2, 3, 6, 7))]
    found = numa.nodes(range(8), tree(tmp_path / "cpuset", cores, mems="0,2-3"))
    assert [(node.number, node.cores) for node in found] == [(0, (0, 1, 2, 3)), (2, (4, 5)), (3, (6, 7))]


def test_a_host_that_does_not_show_its_nodes_has_none(tmp_path: Path) -> None:
    assert numa.nodes(range(4), tmp_path) == []
    assert numa.nodes(range(4), tree(tmp_path / "other", {0: "0-1", 1: "8-9"})) == []  # cores two and three are nowhere
    assert numa.nodes(range(2), tree(tmp_path / "bare", {0: "0", 1: "1"}, {})) == []


def test_this_machine_shows_all_of_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(numa.ROOT_VARIABLE, raising=False)
    if not Path("/sys/devices/system/node/node0").exists():
        pytest.skip("this system shows no nodes")
    found = numa.nodes()
    assert sorted(core for node in found for core in node.cores) == numa.affinity()
    assert 0 < sum(node.free for node in found) < 2 * available_memory_bytes() + 2**30


def made(*sizes: int) -> tuple[list[int], list[Node]]:
    """Returns the cores and the nodes of a host whose nodes have so many cores, dealt out in turn as kernels do."""
    left, nodes, core = list(sizes), [Node(number, (), 0) for number in range(len(sizes))], 0
    while any(left):
        for number in range(len(sizes)):
            if left[number]:
                nodes[number] = Node(number, (*nodes[number].cores, core), 0)
                left[number], core = left[number] - 1, core + 1
    return list(range(core)), nodes


@pytest.mark.parametrize(
    ("sizes", "ranks", "found"),
    [
        ((8,), 3, [(2, (), 3)] * 3),  # evenly, with a rest, where there is one node
        ((4, 4), 1, [(8, (0, 1), 1)]),
        ((4, 4), 2, [(4, (0,), 1), (4, (1,), 1)]),
        ((4, 4), 4, [(2, (0,), 2)] * 2 + [(2, (1,), 2)] * 2),
        ((8, 8), 3, [(4, (0,), 2)] * 2 + [(8, (1,), 1)]),  # no rank has cores of both
        ((4, 4, 4, 4), 2, [(8, (0, 1), 1), (8, (2, 3), 1)]),
        ((4, 4, 4, 4), 3, [(4, (0,), 1), (4, (1,), 1), (8, (2, 3), 1)]),
        ((1, 7), 4, [(1, (0,), 1)] + [(2, (1,), 3)] * 3),
        ((1, 7), 8, [(1, (0,), 1)] + [(1, (1,), 7)] * 7),
        ((2, 2), 5, []),
    ],
)
def test_ranks_get_whole_nodes_or_parts_of_one(
    sizes: tuple[int, ...], ranks: int, found: list[tuple[int, tuple[int, ...], int]]
) -> None:
    cores, nodes = made(*sizes)
    given = places(ranks, cores, nodes)
    assert [(len(place.cores), place.nodes, place.ranks) for place in given] == found
    taken = [core for place in given for core in place.cores]
    assert len(taken) == len(set(taken))
    of_node = {core: node.number for node in nodes for core in node.cores}
    for place in given:
        assert not place.nodes or {of_node[core] for core in place.cores} == set(place.nodes)


@pytest.mark.parametrize(
    ("sizes", "found"), [((8,), 1), ((8, 8), 2), ((8, 4), 2), ((8, 3), 1), ((8,) * 8, 8), ((8, 8, 8, 2), 3), ((), 1)]
)
def test_a_node_with_few_cores_gets_no_replica_of_its_own(sizes: tuple[int, ...], found: int) -> None:
    assert numa.replicas(made(*sizes)[1]) == found


def test_a_rank_finds_the_memory_of_its_nodes() -> None:
    nodes = [Node(0, (0, 1), 900), Node(1, (2, 3), 500), Node(2, (4, 5), 700)]
    bound = numa.least_bytes(4, range(6), nodes)
    assert bound == (2100, 900, 500, 450)  # one rank: all; the third and fourth share a node
    memory = Memory(2400, True, 7, bound)
    assert [memory.of_rank(ranks) for ranks in (1, 2, 3, 4, 5)] == [2400, 900, 500, 450, 480]
    assert replace(memory, size=3100).of_rank(3) == 1033  # a node that others have filled
    assert memory.in_nodes(2) == Memory(900, False, 7)
    assert numa.least_bytes(4, range(2), nodes[:1]) == ()
    assert len(numa.least_bytes(9, range(6), nodes)) == 6  # with more ranks than cores, none is bound


def test_a_share_of_the_memory_is_one_of_the_nodes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {0: "0", 1: "1"}, {0: 64 * MIB, 1: 96 * MIB})
    monkeypatch.setattr(kv_memory, "available_memory_bytes", lambda: 160 * MIB)
    monkeypatch.setenv(numa.ROOT_VARIABLE, str(tmp_path))

    def free(setting: Any, place: Place | None) -> int:
        settings: Any = SimpleNamespace(
            device="cpu", host_ranks=2, place=place, engine=SimpleNamespace(kv_memory=setting)
        )
        return kv_memory.free_memory(settings)

    assert free(0.5, Place((0,), (0,), 1)) == 64 * MIB
    assert free(0.5, Place((1,), (1,), 2)) == 48 * MIB
    # The host's, which bytes that are given may take, and where others have filled the node.
    for setting, place in ((0.5, None), (0.5, Place((0,), (), 2)), ("48MiB", Place((1,), (1,), 2))):
        assert free(setting, place) == 80 * MIB
    assert free(0.5, Place((1,), (1,), 3)) == 80 * MIB


@pytest.fixture
def conf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


@needs_two_cores
@pytest.mark.parametrize(
    ("words", "free", "found"),
    [
        ([], PLENTY, (2, split.NODES)),
        (["engine=baseline"], PLENTY, (2, split.NODES)),
        (["parallel=single"], PLENTY, (1, "as given")),
        (["parallel.dp=3"], PLENTY, (3, "dp follows")),
        ([], {0: PLENTY, 1: 300 * MIB}, (1, "one rank on 2 NUMA nodes: a rank of tp=1 needs 0.0 GiB of weights")),
        (["dataset.num_samples=1"], PLENTY, (1, "one rank where no launch brings more")),
    ],
)
def test_each_node_gets_a_replica_that_has_room_there(
    conf: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    free: dict[int, int] | int,
    found: tuple[int, str],
) -> None:
    tree(tmp_path, dict(enumerate(halves())), free)
    monkeypatch.setenv(numa.ROOT_VARIABLE, str(tmp_path))
    chosen = job.prepare(compose("config", [*TINY, *RANDOM, "dataset.num_samples=8", *words])).split
    assert (chosen.tp, chosen.dp) == (1, found[0])
    assert chosen.why.startswith(found[1]) or found[1] == "dp follows"


@needs_two_cores
def test_ranks_that_there_are_may_take_memory_of_other_nodes(
    conf: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TINY, *RANDOM, "dataset.num_samples=8"]
    found = {}
    for free in (PLENTY, 302 * MIB):  # two MiB more than what a rank takes for itself
        root = tree(tmp_path / str(free), dict(enumerate(halves())), free)
        monkeypatch.setenv(numa.ROOT_VARIABLE, str(root))
        prepared = job.prepare(compose("config", words), Rank(0, 2, 0, 2))
        assert (prepared.tp, prepared.dp, prepared.split.why) == (1, 2, split.FITS)
        found[free] = prepared.prediction["peak_memory_bytes"]
    assert found[PLENTY] == found[302 * MIB]


RANK = """
import json, os, sys
from harness.machine import numa
place = numa.bind(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_SIZE"]))
mine = [sorted(os.sched_getaffinity(0)), place.nodes, place.ranks]
with open(f"{sys.argv[-1]}.{os.environ['RANK']}", "w") as file:
    json.dump(mine, file)
if os.environ["RANK"] == "0":
    with open(sys.argv[-1], "w") as file:
        json.dump(mine, file)
"""


@needs_two_cores
def test_ranks_of_a_launch_are_bound_to_nodes(tmp_path: Path) -> None:
    low, high = halves()
    root = tree(tmp_path / "root", {4: high, 7: low})
    outcome = launched(tmp_path, RANK, 2, HARNESS_NUMA_ROOT=str(root))
    assert outcome == [[int(core) for core in high.split(",")], [4], 1]  # the order of nodes, not of cores
    other = json.loads((tmp_path / "outcome.json.1").read_text())
    assert other == [[int(core) for core in low.split(",")], [7], 1]


@needs_two_cores
@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), ("deepspeed",)])
def test_a_run_on_two_nodes_gives_the_ids_of_one(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    root = tree(tmp_path / "root", dict(enumerate(halves())))
    words = [*TINY, *RANDOM, "dataset.num_samples=12", "dataset.input_len=24", "dataset.output_len=8"]
    how: Any = {"launcher": deepspeed(2)} if launcher else {}
    two = ran(tmp_path / "two", *words, HARNESS_NUMA_ROOT=str(root), **how)
    one = ran(tmp_path / "one", *words, "parallel=single", HARNESS_NUMA_ROOT=str(root))
    assert two.status == one.status == 0, two.stderr + one.stderr
    assert (two.row["tp"], two.row["dp"], one.row["dp"]) == ("1", "2", "1")
    assert two.record["split"]["why"] == (split.FITS if launcher else split.NODES)
    assert launcher or f"chosen: {split.NODES}" in " ".join(two.stdout.split())
    assert two.token_ids == one.token_ids


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity to set")
@pytest.mark.parametrize("ranks", [1, 2, 3, 1000])
def test_ranks_are_bound_to_distinct_cores_where_there_are_enough(ranks: int) -> None:
    all_cores = os.sched_getaffinity(0)
    given: list[set[int]] = []
    for number in range(min(ranks, 3)):
        try:
            numa.bind(number, ranks)
            given.append(os.sched_getaffinity(0))
        finally:
            os.sched_setaffinity(0, all_cores)
    if ranks == 1 or ranks > len(all_cores):
        assert given == [all_cores] * len(given)
    else:
        assert all(len(cores) == len(all_cores) // ranks for cores in given)
        assert sum(map(len, given)) == len(set().union(*given))
