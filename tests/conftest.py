"""What the tests share: real runs of the harness, and Hugging Face's own answers to compare with."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from support import answers, interpreter, repeats, warm
from support.runs import Run, ran

from harness.machine import numa

interpreter.interpret()
os.environ.setdefault(numa.ROOT_VARIABLE, os.devnull)  # one rank where none is asked for, whatever machine this is
# A shell has what it starts in the background ignore Ctrl-C, and so would the runs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, so that a change is judged by what it changes; other ones: --hypothesis-profile=search
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: more threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the tiers: nothing for the one of minutes, ``--all``, ``--full``."""
    parser.addoption("--all", action="store_true", help="the tests marked slow too: what CI runs (20 to 30 minutes)")
    parser.addoption(
        "--full", action="store_true", help="--all, and all repetitions of the tests marked endurance (an hour or two)"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spares the imports of collection what no test needs: looks for garbage, and MLflow (``support/absent``)."""
    gc.disable()
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        return (yield)
    finally:
        del sys.modules["mlflow"]
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves ``full`` cases to ``--full``, ``slow`` ones and those of repeats.txt to ``--all`` or who names them."""
    full = config.getoption("--full")
    if not full:
        for item in items:
            if item.get_closest_marker("full") is not None:
                item.add_marker(pytest.mark.skip(reason="with --full"))
    if not (full or config.getoption("--all") or any("::" in argument for argument in config.args)):
        left = {item for item in items if item.get_closest_marker("slow") is not None}
        left |= set(repeats.beyond([item for item in items if item not in left]))
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


def pytest_collection_finish() -> None:
    """Has garbage collections pass over what imports have left.

    Engines ask for one where a model goes, and to look at a million objects each time takes a third of a second.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Has them see it again: what is left as Python ends, Triton's bindings would report line by line."""
    gc.unfreeze()


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Returns a function that picks how often to repeat: ``scale(few, every)``, the latter with ``--full``.

    A third value stands for the first in the tier of minutes.
    """
    full, more = (request.config.getoption(option) for option in ("--full", "--all"))

    def pick(few: Any, every: Any, fewest: Any = None) -> Any:
        return every if full else few if more or fewest is None else fewest

    return pick


@pytest.fixture
def quick_python(scale: Callable[..., Any]) -> str:
    """Returns the Python of what tests start by scripts of their own: of forks, or with ``--full`` the true one."""
    return sys.executable if scale(False, True) else str(warm.interpreter())


@pytest.fixture
def harness(tmp_path: Path) -> Callable[..., Run]:
    """Returns :func:`support.runs.ran` with results of the test's own."""

    def run(*overrides: str, results: Path = tmp_path / "results", **how: Any) -> Run:
        return ran(results, *overrides, **how)

    return run


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Returns the demo model's directory, fetched and converted if this is the first time."""
    from harness.models import demo

    return demo.ensure()


@pytest.fixture(scope="session")
def reference(demo_model: Path, request: pytest.FixtureRequest) -> dict[int, list[int]]:
    """Returns, by index, the ids that Hugging Face's ``generate`` gives for prompts of ``sample`` in fp32.

    These are the first 24, or with ``--full`` all 72; from the file of them if it is of this model and this sample.
    """
    count = 72 if request.config.getoption("--full") else 24
    known = answers.kept(demo_model)
    return answers.computed(demo_model, count) if known is None else {index: known[index] for index in range(count)}
