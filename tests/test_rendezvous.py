"""How ranks meet and hear of each other: real connections, with a thread in place of a rank's process."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import psutil
import pytest

from harness.basics.errors import INTERRUPTED, REFUSED, UserError
from harness.ranks.network import use_interface
from harness.ranks.rank import Rank, free_port
from harness.ranks.rendezvous import RankFailed, Rendezvous

FACTS = {"engine.token_budget": 64, "dataset's sha256": "abc"}


def in_thread(call: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Runs ``call`` beside the test; a thread that waits for ever does not keep the test from failing."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Ranks:
    """The ranks of a launch, one on each host, and how often each heard that another failed."""

    def __init__(self, world: int) -> None:
        self.heard = [threading.Event() for _ in range(world)]
        self.said: list[str] = []
        self.ends = [
            Rendezvous(Rank(n, world, 0, 1, host=n), failed=self.heard[n].set, say=self.said.append)
            for n in range(world)
        ]
        self.ends[0].open()

    def meet(self, number: int, facts: dict[str, Any] = FACTS, choice: tuple[int, ...] = ()) -> Future[list[int]]:
        return in_thread(self.ends[number].meet, facts, choice)

    def all_meet(self) -> None:
        for end in [self.meet(number) for number in range(len(self.ends))]:
            end.result(20)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Ranks]]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen by the user")
    begun: list[Ranks] = []

    def begin(world: int) -> Ranks:
        begun.append(Ranks(world))
        return begun[-1]

    yield begin
    for ranks in begun:
        for end in ranks.ends:
            end.leave()


def test_ranks_meet_in_any_order_and_leave_in_peace(launch: Callable[[int], Ranks]) -> None:
    ranks = launch(3)
    others = [ranks.meet(2), ranks.meet(1)]
    time.sleep(0.5)
    assert not any(other.done() for other in others)
    ranks.meet(0).result(20)
    for other in others:
        other.result(20)
    # The port is torch's from here on.
    socket.create_server(("", int(os.environ["MASTER_PORT"]))).close()
    for end in reversed(ranks.ends):
        end.leave()
    time.sleep(0.5)
    assert not any(event.is_set() for event in ranks.heard)


def test_all_ranks_hear_what_rank_0_has_chosen(launch: Callable[[int], Ranks]) -> None:
    ranks = launch(3)
    meetings = [ranks.meet(number, choice=(number + 1, 2)) for number in range(3)]
    assert [meeting.result(20) for meeting in meetings] == [[1, 2]] * 3
    assert Rendezvous(Rank(), failed=lambda: None).meet(FACTS, (4, 1)) == [4, 1]


def test_a_lone_rank_meets_nobody() -> None:
    alone = Rendezvous(Rank(), failed=lambda: None)
    alone.open()
    alone.meet(FACTS)
    alone.fail("no matter", 1)
    assert alone.heard(0.0) is None


@pytest.mark.parametrize("late", [0.0, 0.6])
def test_a_rank_that_is_refused_is_heard_by_all(launch: Callable[[int], Ranks], late: float) -> None:
    ranks = launch(3)
    # Before rank 0 looks, which may still be converting its model; or while it waits.
    failing = in_thread(lambda: (time.sleep(late), ranks.ends[2].fail("model.path: no such file", REFUSED)))
    waiting = ranks.meet(1)
    with pytest.raises(RankFailed, match=r"^rank 2 on \S+: model.path: no such file$") as heard:
        ranks.ends[0].meet(FACTS)
    assert heard.value.exit_status == REFUSED
    ranks.ends[0].fail(str(heard.value), REFUSED)
    with pytest.raises(RankFailed, match=r"^rank 2 on \S+: model.path: no such file$"):
        waiting.result(20)
    failing.result(20)


def test_rank_0_tells_those_that_are_still_to_come(launch: Callable[[int], Ranks]) -> None:
    ranks = launch(2)
    failing = in_thread(ranks.ends[0].fail, "dataset.path: no such file", REFUSED)
    time.sleep(0.5)
    with pytest.raises(RankFailed, match=r"^rank 0 on \S+: dataset.path: no such file$"):
        ranks.ends[1].meet(FACTS)
    failing.result(5)  # at once, now that everyone knows


def test_ranks_that_would_run_different_things_do_not_meet(launch: Callable[[int], Ranks]) -> None:
    ranks = launch(2)
    other = ranks.meet(1, FACTS | {"engine.token_budget": 128})
    with pytest.raises(UserError, match=r"^engine.token_budget: 64 on rank 0, 128 on rank 1 on \S+; ") as refused:
        ranks.ends[0].meet(FACTS)
    ranks.ends[0].fail(str(refused.value), REFUSED)
    with pytest.raises(RankFailed, match=r"engine\.token_budget: 64 on rank 0"):
        other.result(20)


@pytest.mark.parametrize(("number", "others"), [(1, (0,)), (0, (1, 2))])
def test_a_failure_after_the_meeting(launch: Callable[[int], Ranks], number: int, others: tuple[int, ...]) -> None:
    ranks = launch(3)
    ranks.all_meet()
    ranks.ends[number].fail("interrupted", INTERRUPTED)
    for other in others:
        assert ranks.heard[other].wait(10)
        failure = ranks.ends[other].heard(0.0)
        assert failure is not None
        assert str(failure).startswith(f"rank {number} on ")
        assert str(failure).endswith(": interrupted") and failure.cause == "interrupted"
        assert failure.exit_status == INTERRUPTED


def test_a_connection_that_breaks_is_a_death(launch: Callable[[int], Ranks]) -> None:
    ranks = launch(2)
    ranks.all_meet()
    ranks.ends[1]._lines[0].socket.shutdown(socket.SHUT_RDWR)  # as the kernel does for a killed process
    assert ranks.heard[0].wait(10)
    assert str(ranks.ends[0].failure).startswith("another rank died: rank 1 on ")


def test_strangers_are_sent_away(launch: Callable[[int], Ranks]) -> None:
    ranks = launch(2)
    gathering = ranks.meet(0)
    place = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 7}\n', b'{"rank": true}\n', b"[]\n", b"\xff\n"):
        with socket.create_connection(place, timeout=20) as stranger:
            stranger.sendall(words)
            assert b"another launch" in stranger.recv(1000)
    ranks.meet(1).result(20)
    gathering.result(20)


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=rf"^--master_port: {port} on \S+: Address already in use; give another"):
            Rendezvous(Rank(0, 2, 0, 2), failed=lambda: None).open()


def test_gloo_uses_the_network_that_leads_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what is set below is taken back
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    for address in (None, "203.0.113.7", "not an address"):
        use_interface(address)
        assert "GLOO_SOCKET_IFNAME" not in os.environ
    addresses = {
        entry.address.split("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    (loopback,) = {name for address, name in addresses.items() if address == "127.0.0.1"}
    for address, name in (addresses | {"127.0.0.2": loopback, "::ffff:127.0.0.1": loopback}).items():
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        use_interface(address)
        assert os.environ["GLOO_SOCKET_IFNAME"] == name
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    use_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
