"""How the ranks of a launch meet, and learn of each other's end.

On one host DeepSpeed's launcher ends all ranks when one fails. On several hosts nobody does: the launchers know
nothing of each other. So every rank has a connection to rank 0, through which it says that it is there and what it
is about to run, and through which it learns at once when another rank fails. There is no torch in this: a rank that
refuses its config reports it, and leaves, within a second.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.basics.errors import INTERRUPTED, PAUSED, UserError, quoted
from harness.basics.outcome import STATUSES
from harness.ranks.network import place, use_interface
from harness.ranks.rank import GUIDE, Rank
from harness.ranks.wire import Line

MEET_S = 1800.0  # for all ranks to come: a host may have to fetch or convert the model first
NOTICE_S = 10.0  # until it is said who is waited for
TELL_S = 20.0  # that a failed rank takes to reach those that are not there yet
HELLO_S = 5.0  # for one connection
POLL_S = 0.2


class RankFailed(Exception):
    """Another rank failed; the message names it and says why.

    Attributes:
        exit_status: what that rank ended with.
        status: how it says the run ended, as in ``runs.csv``; None where it does not.
        died: the rank and its host, of one that ended without saying why; None for any other.
        host: the number of that one's host, None where it is not known.
        cause: what it says of its own end, without its name; empty where it said nothing.
    """

    def __init__(
        self,
        message: str,
        exit_status: int = 1,
        status: str | None = None,
        died: str | None = None,
        host: int | None = None,
        cause: str = "",
    ) -> None:
        super().__init__(message)
        self.exit_status = exit_status
        self.status = status
        self.died = died
        self.host = host
        self.cause = cause


class Rendezvous:
    """This rank's connections: rank 0 has one to every other rank, which have that one. A lone rank has none.

    Rank 0 listens at ``MASTER_ADDR:MASTER_PORT`` until all are there, then leaves the port to torch.

    Args:
        rank: this process.
        failed: called once, from a thread, when another rank has failed; :attr:`failure` then says why.
        say: prints a line for the user.
    """

    def __init__(self, rank: Rank, failed: Callable[[], None], say: Callable[[str], None] | None = None) -> None:
        self.rank = rank
        self.failure: RankFailed | None = None
        self._failed = failed
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._learnt = threading.Event()
        self._listener: socket.socket | None = None
        self._lines: dict[int, Line] = {}
        self._over = False
        self._lock = threading.Lock()

    def open(self) -> None:
        """Makes rank 0 reachable, so that it learns of a rank that fails, however early that is.

        Raises:
            UserError: the port is taken.
        """
        if not self.rank.first or self.rank.world == 1:
            return
        _, port = place()
        both = socket.has_dualstack_ipv6()
        try:
            self._listener = socket.create_server(
                ("", port),
                family=socket.AF_INET6 if both else socket.AF_INET,
                backlog=self.rank.world,
                dualstack_ipv6=both,
            )
        except OSError as error:
            found = f"{port} on {socket.gethostname()}: {os.strerror(error.errno) if error.errno else error}"
            raise UserError("--master_port", found, "give another: --master_port N") from error

    def meet(self, facts: Mapping[str, Any], choice: Sequence[int] = ()) -> list[int]:
        """Returns when every rank is there and all are about to run the same.

        Args:
            facts: what has to be equal on all ranks, by name; plain JSON.
            choice: what this rank has made of a question on which ranks may differ.

        Returns:
            The ``choice`` of rank 0.

        Raises:
            RankFailed: another rank failed.
            UserError: the ranks differ, do not come, or cannot reach rank 0.
        """
        if self.rank.world == 1:
            return list(choice)
        made = list(choice)
        if self.rank.first:
            address = self._gather(facts, made)
        else:
            address, made = self._register(facts)
        if self.rank.several_hosts:
            use_interface(address)
        for number, line in self._lines.items():
            threading.Thread(target=self._listen, args=(number, line), daemon=True).start()
        return made

    def _gather(self, facts: Mapping[str, Any], choice: list[int]) -> str | None:
        """Receives the other ranks; returns the address under which other hosts reach this one."""
        facts = json.loads(json.dumps(facts))  # as they arrive from elsewhere
        started, noticed = time.monotonic(), False
        while len(self._lines) < self.rank.world - 1:
            waited = time.monotonic() - started
            missing = [str(number) for number in range(1, self.rank.world) if number not in self._lines]
            if waited > MEET_S:
                raise UserError("launch", f"rank {', '.join(missing)} did not come within {MEET_S:.0f} s", GUIDE)
            if waited > NOTICE_S and not noticed:
                self._say("waiting for rank {} at {}:{}".format(", ".join(missing), *place()))
                noticed = True
            if (hello := self._hello()) is not None:
                self._check(hello, facts)
        elsewhere = [line for line in self._lines.values() if line.host != self.rank.host]
        address = elsewhere[0].address if elsewhere else None
        self._stop_listening()
        for line in self._lines.values():
            line.send({"met": address, "choice": choice})
        return address

    def _hello(self) -> dict[str, Any] | None:
        """Waits a moment for a rank that was not there before, and returns how it introduces itself."""
        assert self._listener is not None, "open() comes first"
        self._listener.settimeout(POLL_S)
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            return None
        connection.settimeout(HELLO_S)
        line = Line(connection)
        hello = line.receive() or {}
        connection.settimeout(None)
        number = hello.get("rank")
        if type(number) is not int or not 0 < number < self.rank.world or number in self._lines:
            # A stranger, or a rank of another launch.
            line.send({"failure": "rank 0 there is of another launch; give another --master_port N"})
            connection.close()
            return None
        line.host = hello.get("host")
        line.host_name = str(hello.get("name"))
        line.name = self._named(number, str(hello.get("name")))
        self._lines[number] = line
        return hello

    def _check(self, hello: dict[str, Any], facts: Mapping[str, Any]) -> None:
        name = self._lines[hello["rank"]].name
        if "failure" in hello:
            self.failure = _failure_of(hello, f"{name}: {hello['failure']}")
            raise self.failure
        theirs = hello.get("facts", {})
        for key in sorted({*facts, *theirs}):
            if facts.get(key) != theirs.get(key):
                raise UserError(
                    key,
                    f"{quoted(facts.get(key))} on rank 0, {quoted(theirs.get(key))} on {name}",
                    "start all ranks with the same command line, on the same files",
                )

    def _register(self, facts: Mapping[str, Any]) -> tuple[str | None, list[int]]:
        """Introduces this rank to rank 0 and waits for the others.

        Returns:
            The address that other hosts see, and what rank 0 has chosen.
        """
        line = self._connect(MEET_S)
        line.send(self._introduction() | {"facts": facts})
        answer = line.receive()
        if answer is None:
            answer = {"failure": f"{line.name} ended before all ranks were there"}
        if "met" not in answer:
            self.failure = _failure_of(answer, str(answer.get("failure")))
            raise self.failure
        return answer["met"] if self.rank.host == 0 else line.address, answer["choice"]

    def _named(self, number: int, host: str) -> str:
        return f"rank {number} on {host}" if self.rank.several_hosts else f"rank {number}"

    def _introduction(self) -> dict[str, Any]:
        return {"rank": self.rank.rank, "host": self.rank.host, "name": socket.gethostname()}

    def _connect(self, patience_s: float) -> Line:
        """Connects to rank 0, which may come later; raises UserError when it does not answer in time."""
        started, noticed = time.monotonic(), patience_s < NOTICE_S
        while True:
            try:
                connection = socket.create_connection(place(), timeout=HELLO_S)
                if connection.getsockname() != connection.getpeername():
                    break
                connection.close()  # on one host, a free port can be given to the very socket that tries it
                where = "{}:{}".format(*place())
            except OSError as error:
                where = "{}:{} ({})".format(*place(), error.strerror or error)
            waited = time.monotonic() - started
            if waited >= patience_s:
                raise UserError("--master_addr", f"rank 0 does not answer at {where}", GUIDE)
            if waited > NOTICE_S and not noticed:
                self._say(f"rank {self.rank.rank}: waiting for rank 0 at {where}")
                noticed = True
            time.sleep(POLL_S)
        connection.settimeout(None)
        line = self._lines[0] = Line(connection)
        line.host_name = place()[0] if self.rank.several_hosts else socket.gethostname()
        line.name = self._named(0, line.host_name)
        return line

    def _listen(self, number: int, line: Line) -> None:
        """Waits for what the other side has to say, which is how it ends."""
        message = line.receive()
        if self._over or (message is not None and "failure" not in message):
            return
        who = f"rank {number} on {line.host_name}"
        if line.lost is not None:
            failure = RankFailed(f"lost {who}: {line.lost}")
        elif message is None:
            host = line.host if self.rank.first else (self.rank.host if not self.rank.several_hosts else None)
            failure = RankFailed(f"another rank died: {who}", died=who, host=host)
        else:
            text = str(message["failure"])
            failure = _failure_of(message, f"{line.name}: {text}" if self.rank.first else text)
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
        self._learnt.set()
        self._failed()

    def heard(self, within_s: float) -> RankFailed | None:
        """Returns why another rank failed, waiting up to so long for the news; None when there is none."""
        self._learnt.wait(0 if self.rank.world == 1 else within_s)
        return self.failure

    def fail(self, message: str, exit_status: int, status: str | None = None) -> None:
        """Tells the other ranks that this one failed; waits a while for those that are still on their way.

        Args:
            status: how the run ended, as in ``runs.csv``.
        """
        self._over = True
        patience_s = TELL_S if self.rank.world > 1 and exit_status not in (INTERRUPTED, PAUSED) else 0.0
        news: dict[str, Any] = {"failure": message, "cause": message, "exit_status": exit_status, "status": status}
        if self.rank.first:
            if self.failure is None:
                news["failure"] = f"{self._named(0, socket.gethostname())}: {message}"
            deadline = time.monotonic() + (patience_s if self.rank.several_hosts else 0.0)
            while self._listener is not None and len(self._lines) < self.rank.world - 1 and time.monotonic() < deadline:
                self._hello()
            self._stop_listening()
        elif self.failure is not None:
            return  # rank 0 knows more than this rank
        elif not self._lines and self.rank.world > 1:
            try:
                line = self._connect(patience_s)
            except UserError:
                return
            line.send(news | self._introduction())
            # When this rank is gone, its launcher ends rank 0 if that is on the same host: not before it knows.
            line.socket.settimeout(patience_s)
            line.receive()
            return
        for line in self._lines.values():
            line.send(news)

    def leave(self) -> None:
        """Says that this rank is done."""
        self._over = True
        for line in self._lines.values():
            line.send({"done": True})

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None


def _failure_of(message: dict[str, Any], text: str) -> RankFailed:
    """Returns how another rank said it ended; ``text`` is the message."""
    said, exit_status = message.get("status"), int(message.get("exit_status", 1))
    return RankFailed(text, exit_status, said if said in STATUSES else None, cause=str(message.get("cause", "")))
