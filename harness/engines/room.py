"""What an engine says of itself before anything heavy is imported: the declaration that its folder holds.

Whoever must know something of an engine asks its room; no one else tests engines by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from harness.config.engine_schemas import keys_of
from harness.config.schema import Config, EngineConfig
from harness.engines.known_model import KnownModel

if TYPE_CHECKING:
    from harness.engines.base import EngineSettings

Change = tuple[str, object, object]  # of a setting: its key, the value to try, the value now


class Unrecorded(Exception):
    """A limit of a run is not in its record; says which."""


class Passes(Enum):
    """What a line of ``passes.csv`` is: a step that gives each sequence at most one token, or a whole request."""

    steps = "steps"
    requests = "requests"


@dataclass(frozen=True, slots=True)
class Share:
    """What an engine makes of the memory that it finds.

    Attributes:
        tokens: the most that it ever holds at a time.
        part: of what the weights leave free, that becomes its KV cache.
        given: bytes of a rank's KV cache where the config says them.
        weight_bytes: of a weight in a matrix, where it is not that of the type.
        pass_tokens: of its largest pass; None where that is one prompt.
        rows: sequences of a pass, at most.
    """

    tokens: int = 2**62
    part: float = 1.0
    given: int | None = None
    weight_bytes: float | None = None
    pass_tokens: int | None = None
    rows: int = 1


@dataclass(frozen=True, slots=True)
class Here:
    """What an engine would compute a model with on this machine.

    Attributes:
        kernels: as ``Engine.kernels`` calls them.
        passed_over: why not those that it would rather have taken, by name.
    """

    kernels: str
    passed_over: Mapping[str, str] = field(default_factory=dict)


class Room:
    """One engine. A subclass sets what is not as here; an instance of it, ``ROOM``, is the declaration.

    Attributes:
        name: what ``engine=NAME`` chooses.
        config: its keys, a dataclass that needs no torch.
        engine: its class as ``module:Class``, imported by the rank alone.
        packages: that its module imports, beside torch and transformers.
        install: how to come by those that the set-up does not install.
        scores: whether it can score given tokens.
        replicas: whether a launch may have several of it.
        shards: whether several ranks may share its model.
        spreads: whether one rank takes all the GPUs there are.
        simulates: whether one process plays all ranks, on the machine that ``conf/hardware`` describes.
        passes: what a line of its ``passes.csv`` is; None leaves them unchecked.
        resume_keys: its keys that a resumed run must have as before, since the tokens depend on them.
        proof_keys: its keys that choose the code of a pass, so that a proof holds for them alone; None for all.
    """

    name = ""
    config: type[EngineConfig] = EngineConfig
    engine = ""
    packages: tuple[str, ...] = ()
    install = ""
    scores = True
    replicas = True
    shards = True
    spreads = False
    simulates = False
    passes: Passes | None = None
    resume_keys: tuple[str, ...] = ()
    proof_keys: tuple[str, ...] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Its own keys, without ``engine.`` and without ``name``."""
        return tuple(keys_of(self.config))

    def check(self, config: Config, accelerator: str) -> None:
        """Raises UserError for what the engine cannot do.

        Args:
            accelerator: ``cpu`` or ``cuda``, what the ranks will run on.
        """

    def check_model(self, known: KnownModel) -> None:
        """Raises UserError for a model that the engine does not compute, however many ranks share it."""

    def check_shards(self, config: Config, known: KnownModel, accelerator: str) -> None:
        """Raises UserError for a model that ``known.tp`` ranks cannot share, or not with the kernels asked for."""

    def here(self, settings: EngineSettings[Any], capability: tuple[int, int] | None) -> Here:
        """Returns what it would compute with on this machine, as far as it can be told without loading the model.

        Args:
            capability: the CUDA device's compute capability; None on a CPU, or where nobody can tell.

        Raises:
            UserError: it lacks something here.
        """
        return Here("torch")

    def share(self, config: Config) -> Share:
        """Returns what the engine makes of the memory."""
        return Share()

    def loads_whole(self, config: Config, accelerator: str) -> bool:
        """Whether each rank of those that share a model certainly loads all of it on the host, to keep its part."""
        return False

    def less_memory(self, engine: Mapping[str, Any], phase: object) -> list[Change] | None:
        """Returns which of its settings to lower when memory ran out; None where none of them has to do with it.

        Args:
            engine: the config's section, from a record: nothing in it is certain.
            phase: ``cache`` while the KV cache was made; anything else is a pass.
        """
        return None

    def refusal(self, part: Mapping[str, Any], prompt_tokens: int, output_len: int) -> str | None:
        """Returns why it had to reject a request that the model has room for; None when it had room.

        Args:
            part: a run's record, or a segment of it.

        Raises:
            Unrecorded: nothing in the record rejects it, and the record does not tell everything.
        """
        return None


def section(part: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a section of a record's config; raises Unrecorded where there is none."""
    config = part.get("config")
    found = config.get(name) if isinstance(config, dict) else None
    if not isinstance(found, dict):
        raise Unrecorded(f"its config has no {name}")
    return found


def count(found: Mapping[str, Any], key: str) -> int:
    """Returns a whole number of a section; raises Unrecorded where it is none."""
    value = found.get(key)
    if type(value) is not int or value < 1:
        raise Unrecorded(f"its config has no {key}")
    return value
