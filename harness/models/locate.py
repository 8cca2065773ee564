"""Finds the model that a config names, from headers alone: imports neither torch nor transformers."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import OmegaConf

from harness.basics.errors import UserError
from harness.basics.places import CONF
from harness.config.schema import ModelConfig, Weights
from harness.models.architecture import check_architecture, positive_integer, sizes
from harness.models.directory import find, find_tokenizer
from harness.models.source import Source
from harness.models.tokenizer import ByteTokenizer


def locate(model: ModelConfig) -> Source:
    """Finds the checkpoint and checks, from headers alone, that it can be whole.

    Raises:
        UserError: nothing is there, a file is broken or missing, or only pickled weights exist.
    """
    dummy = model.weights is Weights.dummy
    found = Source("dummy", None, None, None, {}, model.trust_remote_code)
    if model.path is not None:
        found = find(model.path, model.trust_remote_code, not dummy, model.allow_pickle)
    elif not dummy:
        if not model.demo:
            remedy = "give the directory of a LLaMA-2 checkpoint as model.path=DIR, or model.weights=dummy"
            raise UserError("model.path", "not set", remedy)
        from harness.models import demo

        found = find(str(demo.ensure()), model.trust_remote_code, need_weights=True)
    tokenizer = found.tokenizer if model.tokenizer is None else find_tokenizer(model.tokenizer)
    architecture = found.architecture
    if dummy:
        conf = {key: value for key, value in _described(model).items() if value is not None}
        architecture = {**architecture, **conf}
        check_architecture(architecture, "model.architecture, ")
        if tokenizer is None and positive_integer(architecture.get("vocab_size")) < ByteTokenizer.vocab_size:
            raise UserError(
                "model.architecture, vocab_size",
                f"{architecture.get('vocab_size')!r} is too small for the byte tokenizer",
                f"give at least {ByteTokenizer.vocab_size}, or model.tokenizer=DIR",
            )
    elif tokenizer is None:
        raise UserError(
            "model.tokenizer",
            f"no tokenizer files in {found.path}",
            "give model.tokenizer=DIR with tokenizer.json",
        )
    return Source(
        "dummy" if dummy else found.kind,
        found.path,
        None if dummy else found.gguf_file,
        tokenizer,
        architecture,
        model.trust_remote_code,
        found.pickled and not dummy,
    )


def _described(model: ModelConfig) -> dict[str, Any]:
    """Returns what ``model.architecture`` says of the model that is to be drawn.

    Where nobody has chosen an option, it describes the demo model; of the one that ``path`` names instead it says what
    differs from that, as given on the command line.
    """
    option = CONF / "model" / f"{model.name}.yaml"
    if not model.demo or model.path is None or not option.is_file():
        return model.architecture
    demo = OmegaConf.to_container(OmegaConf.load(option))
    assert isinstance(demo, dict)
    return {key: value for key, value in model.architecture.items() if value != demo["architecture"].get(key)}


def described(model: ModelConfig) -> Source:
    """Returns the model as far as a plan needs it: the checkpoint where one is given, else ``model.architecture``.

    Raises:
        UserError: a checkpoint is given and is not whole, or the architecture lacks sizes.
    """
    if model.path is not None or model.weights is Weights.dummy or not model.architecture:
        return locate(model)
    architecture = {key: value for key, value in model.architecture.items() if value is not None}
    check_architecture(architecture, "model.architecture, ")
    tokenizer = None if model.tokenizer is None else find_tokenizer(model.tokenizer)
    return Source("described", None, None, tokenizer, architecture, model.trust_remote_code)


def model_name(model: ModelConfig, source: Source) -> str:
    """Returns the name under which a run is recorded, so that no record claims a model that did not run.

    Args:
        model: the config, whose name and architecture are those of ``conf/model``.
        source: what `locate` found for it.

    Returns:
        ``model.name`` for dummy weights and for a checkpoint whose sizes are those of ``model.architecture``
        (as far as both state them); else the last part of the checkpoint's path: the name of the directory,
        of the GGUF file without ``.gguf``, or of the hub id. The demo model's option names no other checkpoint.
    """
    chosen = not model.demo or model.path is None
    if source.path is None or (chosen and source.kind == "dummy"):  # as it is described
        return model.name
    if chosen and source.architecture:
        conf, found = sizes(model.architecture), sizes(source.architecture)
        if all(conf[key] == found[key] for key in conf.keys() & found.keys()):
            return model.name
    if source.gguf_file is not None:
        return source.gguf_file.removesuffix(".gguf")
    path = os.path.normpath(source.path)  # "models/tiny/.." is called "models"
    return os.path.basename(path) or path
