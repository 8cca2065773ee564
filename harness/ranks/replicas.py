"""Several ranks work through one list: replicas pull requests from a shared queue and send completions to rank 0.

The queue is a counter in a key-value store that rank 0 serves (torch's ``TCPStore``): taking the next
request is one atomic addition, so a slow replica or a long request never leaves the others idle. The ranks
find each other through ``deepspeed.comm``. Ranks ``r * tp`` to ``r * tp + tp - 1`` share replica ``r``'s model;
consecutive ranks, so that a model stays within one host where it fits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from harness.ranks.rank import Rank
from harness.ranks.rendezvous import Rendezvous
from harness.ranks.tensor_parallel import TensorParallel
from harness.workload.records import Completion, Request

if TYPE_CHECKING:
    from torch.distributed import TCPStore

POLL_S = 0.02
STOP_S = 5.0  # for what other ranks have sent already
PATIENCE = timedelta(days=1)  # for a message: a rank that is gone is noticed at once, by its closed connection


class Replicas:
    """This rank's end of the shared queue.

    Args:
        rank: this process.
        accelerator: ``cpu`` (gloo) or ``cuda`` (nccl).
        rendezvous: where the ranks have met.
        tp: ranks that share one model.
    """

    def __init__(self, rank: Rank, accelerator: str, rendezvous: Rendezvous, tp: int = 1) -> None:
        self.rank = rank
        self.accelerator = accelerator
        self.tp = tp
        self.tensor: TensorParallel | None = None
        self.sent = 0
        self.results: dict[int, dict[str, Any]] = {}
        self.rendezvous = rendezvous
        self._store: TCPStore | None = None
        self._receiver: threading.Thread | None = None
        self._leave = threading.Event()
        self._broken: Exception | None = None

    def join(self) -> None:
        """Joins the other ranks' process group; returns when all have."""
        import deepspeed
        import deepspeed.ops
        import torch.distributed as dist
        from torch.distributed import TCPStore

        if self.accelerator == "cpu":
            # Its shared-memory reductions ignore sub-groups, and building them costs a minute: gloo is right.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        else:
            import torch

            torch.cuda.set_device(self.rank.local_rank)
        deepspeed.init_distributed(
            dist_backend="nccl" if self.accelerator == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )
        self._hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
        if self.rank.first:
            self._store = TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False)
        self._port = self.share(self._store.port if self._store is not None else 0)
        if not self.rank.first:
            self._store = TCPStore(os.environ["MASTER_ADDR"], self._port, is_master=False)
        if self.tp > 1:
            self.tensor = self._join_model()

    def _join_model(self) -> TensorParallel:
        """Returns this rank's tensor-parallel group; all ranks make all groups, as torch demands."""
        import torch.distributed as dist

        mine: TensorParallel | None = None
        for leader in range(0, self.rank.world, self.tp):
            members = list(range(leader, leader + self.tp))
            group = dist.new_group(members)
            messages = dist.new_group(members, backend="gloo", timeout=PATIENCE)
            if self.rank.rank in members:
                mine = TensorParallel(self.rank.rank - leader, self.tp, leader, group, messages)
        assert mine is not None  # check_world() has seen to it that the groups cover all ranks
        return mine

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        import torch.distributed as dist

        dist.barrier(group=self._hosts)

    def share(self, message: Any = None) -> Any:
        """Returns rank 0's ``message`` on every rank; all must call it."""
        import torch.distributed as dist

        messages = [message]
        dist.broadcast_object_list(messages, src=0, group=self._hosts)
        return messages[0]

    def gather(self, message: Any) -> list[Any]:
        """Returns all ranks' messages on rank 0, by rank, and nothing elsewhere; all must call it."""
        import torch.distributed as dist

        messages = [None] * self.rank.world if self.rank.first else None
        dist.gather_object(message, messages, dst=0, group=self._hosts)
        return messages or []

    @property
    def store(self) -> TCPStore:
        assert self._store is not None, "join() comes first"
        return self._store

    def take(self, requests: list[Request]) -> Iterator[Request]:
        """Yields the requests that fall to this rank, each to one rank only; ``requests`` is the same on all."""
        while (number := self.store.add("taken", 1)) <= len(requests):
            self.check()
            yield requests[number - 1]

    def send(self, completion: Completion) -> None:
        """Hands a completion to rank 0."""
        self._put({"completion": dataclasses.asdict(completion)})

    def finish(self, result: dict[str, Any]) -> None:
        """Tells rank 0 that this rank is done, with its figures."""
        self._put({"result": result})

    def _put(self, message: dict[str, Any]) -> None:
        self.store.set(f"from {self.rank.rank}: {self.sent}", json.dumps(message))
        self.sent += 1

    def receive(self, deliver: Callable[[Completion], None]) -> None:
        """Starts handing over the completions that the other ranks send, in a thread of its own; rank 0 only."""
        self._receiver = threading.Thread(target=self._receive, args=(deliver,), daemon=True)
        self._receiver.start()

    def _receive(self, deliver: Callable[[Completion], None]) -> None:
        try:
            self._receive_all(deliver)
        except Exception as error:  # raised where it ends the run: nobody would notice the end of this thread
            self._broken = error

    def check(self) -> None:
        """Raises what has kept a completion of another rank from being delivered, a full disk for instance."""
        if self._broken is not None:
            raise self._broken

    def _receive_all(self, deliver: Callable[[Completion], None]) -> None:
        from torch.distributed import TCPStore

        # A connection of its own: the engine's thread takes requests through the other.
        store = TCPStore(os.environ["MASTER_ADDR"], self._port, is_master=False)
        next_of = dict.fromkeys(range(1, self.rank.world), 0)
        idle = False
        while next_of and not (idle and self._leave.is_set()):
            idle = True
            for rank, number in list(next_of.items()):
                key = f"from {rank}: {number}"
                if not store.check([key]):
                    continue
                idle = False
                message = json.loads(store.get(key))
                store.delete_key(key)
                next_of[rank] += 1
                if "completion" in message:
                    deliver(Completion(**message["completion"]))
                else:
                    self.results[rank] = message["result"]
                    del next_of[rank]
            if idle:
                time.sleep(POLL_S)

    def wait(self) -> dict[int, dict[str, Any]]:
        """Waits for the other ranks' results and returns them by rank; raises RankFailed, or as :meth:`check`."""
        assert self._receiver is not None
        while self._receiver.is_alive():
            self._receiver.join(POLL_S)  # in pieces, so that a signal is seen
            if self.rendezvous.failure is not None:
                self.stop()
                raise self.rendezvous.failure
        self.check()
        return self.results

    def stop(self) -> None:
        """Ends the exchange early: returns when all completions that were sent so far have arrived."""
        self._leave.set()
        if self._receiver is not None:
            self._receiver.join(STOP_S)
        elif self._store is not None and self.rendezvous.failure is None:
            try:
                self._store.check(["taken"])  # answered after what was sent before it
            except RuntimeError:  # rank 0 is gone already
                pass

    def leave(self) -> None:
        """Takes leave of the other ranks."""
        import deepspeed.comm as dist

        self._leave.set()
        self.rendezvous.leave()
        dist.destroy_process_group()
