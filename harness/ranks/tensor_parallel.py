"""The ranks that share one model: who leads, who follows, and how the leader tells the others what to compute.

Only the leader takes requests, schedules and samples. What it decides reaches the followers as messages over
the host network (gloo), so that all ranks compute the same passes even where rounding differs between them.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place in its tensor-parallel group.

    Attributes:
        rank, size: number of this process in the group, and how many share the model.
        leader: global rank of the group's first process.
        group: for the model's own reductions (gloo on a CPU, nccl on CUDA).
        messages: a gloo group of the same ranks.
    """

    rank: int
    size: int
    leader: int
    group: Any
    messages: Any

    @property
    def leads(self) -> bool:
        """Whether this rank is the group's leader."""
        return self.rank == 0

    def share(self, message: Any = None) -> Any:
        """Returns the leader's ``message`` on every rank of the group; all must call it, in the same order.

        Raises:
            RuntimeError: another rank of the group is gone.
        """
        import torch
        import torch.distributed as dist

        if self.leads:
            data = torch.frombuffer(bytearray(pickle.dumps(message, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)
            length = torch.tensor([data.numel()])
        else:
            length = torch.empty(1, dtype=torch.int64)
        dist.broadcast(length, self.leader, group=self.messages)
        if not self.leads:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, self.leader, group=self.messages)
        return message if self.leads else pickle.loads(data.numpy().tobytes())

    def least(self, number: int) -> int:
        """Returns the smallest of the group's numbers; all ranks must call it."""
        import torch
        import torch.distributed as dist

        value = torch.tensor([number])
        dist.all_reduce(value, dist.ReduceOp.MIN, group=self.messages)
        return int(value)
