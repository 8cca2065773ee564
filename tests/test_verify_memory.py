"""``verify=N`` at the end of a launch of several ranks: what they held is there for the reference."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness.ranks.rank import Rank
from harness.running import worker


class Holder:
    """What an engine is to the garbage collector: it refers to itself through its parts."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(device="cpu")
        self.part = self


@pytest.mark.parametrize(("number", "there"), [(0, True), (1, False)])
def test_other_ranks_give_their_memory_back_before_the_barrier(number: int, there: bool) -> None:
    delivery = SimpleNamespace(loaded=SimpleNamespace(engine=Holder()))
    engine = weakref.ref(delivery.loaded.engine)
    seen: list[bool] = []
    replicas = SimpleNamespace(barrier=lambda: seen.append(engine() is not None))
    run = SimpleNamespace(rank=Rank(number, 2, number, 2), replicas=replicas)
    worker._make_room(cast(Any, run), cast(Any, delivery))
    assert seen == [there]
