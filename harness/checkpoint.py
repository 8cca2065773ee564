"""Where weights and tokenizer come from: a checkpoint directory, a GGUF file, a hub id, or nowhere (dummy).

`locate` answers from headers alone and imports neither torch nor transformers, so that `plan` and wrong
configs are quick; `load_model` and `load_tokenizer` do the heavy part inside a rank.
"""

from __future__ import annotations

import errno
import io
import os
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from harness.checkpoint_files import (
    ESSENTIAL,
    GIVE_PATH,
    LLAMA_LIKE,
    Source,
    attention_heads,
    check_architecture,
    find,
    find_tokenizer,
    positive_integer,
    refuse_kernels,
)
from harness.config import ModelConfig, Weights
from harness.errors import UserError, one_line, quoted
from harness.model_config import dummy_config, refuse_encoders

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Where a family's config says how long a sequence may be; some keep it in the part of a larger model that reads text.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Weights of a model, in elements."""

    total: int  # what the checkpoint holds; tied embeddings count once
    matmul: int  # multiplied once per token in the layers: q, k, v, o, gate, up, down
    head: int  # the output projection: vocabulary * hidden


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
        from harness import demo_model

        found = find(str(demo_model.ensure()), model.trust_remote_code, need_weights=True)
    tokenizer = found.tokenizer if model.tokenizer is None else find_tokenizer(model.tokenizer)
    architecture = found.architecture
    if dummy:
        conf = {key: value for key, value in model.architecture.items() if value is not None}
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


def model_name(model: ModelConfig, source: Source) -> str:
    """Returns the name under which a run is recorded, so that no record claims a model that did not run.

    Args:
        model: the config, whose name and architecture are those of ``conf/model``.
        source: what `locate` found for it.

    Returns:
        ``model.name`` for dummy weights and for a checkpoint whose sizes are those of ``model.architecture``
        (as far as both state them); else the last part of the checkpoint's path: the name of the directory,
        of the GGUF file without ``.gguf``, or of the hub id.
    """
    if source.path is None or source.kind == "dummy":
        return model.name
    if source.architecture:
        conf, found = _sizes(model.architecture), _sizes(source.architecture)
        if all(conf[key] == found[key] for key in conf.keys() & found.keys()):
            return model.name
    if source.gguf_file is not None:
        return source.gguf_file.removesuffix(".gguf")
    path = os.path.normpath(source.path)  # "models/tiny/.." is called "models"
    return os.path.basename(path) or path


def _sizes(architecture: dict[str, Any]) -> dict[str, Any]:
    """Returns the sizes that tell one model of a family from another, without those that are not stated."""
    sizes = {key: architecture.get(key) for key in SIZES}
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
    return {key: value for key, value in sizes.items() if value is not None}


def context_length(architecture: dict[str, Any], max_context: int | None) -> int | None:
    """Returns the longest sequence in tokens, prompt and output together; None where the model does not say.

    Raises:
        UserError: ``max_context`` is not positive or more than the model was built for.
    """
    parts = [architecture, architecture.get("text_config"), architecture.get("decoder")]
    stated = [positive_integer(part.get(key)) for part in parts if isinstance(part, dict) for key in POSITIONS]
    limit = next((positions for positions in stated if positions), None)
    if max_context is None:
        return limit
    if max_context < 1:
        raise UserError("model.max_context", f"{max_context} is not positive", "give a number of tokens, or null")
    if limit is not None and max_context > limit:
        raise UserError("model.max_context", f"{max_context} is more than the model's {limit} positions", "lower it")
    return max_context


def parameters(architecture: dict[str, Any]) -> ParameterCount | None:
    """Counts the weights of a LLaMA-like model; None for another family or an incomplete architecture."""
    family = architecture.get("model_type")
    if family not in LLAMA_LIKE or not all(positive_integer(architecture.get(key)) for key in ESSENTIAL):
        return None
    hidden, inner, layers = (architecture[key] for key in ESSENTIAL[:3])
    heads, kv_heads, head_dim = attention_heads(architecture)
    matmul = layers * (2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim + 3 * hidden * inner)
    vectors = 2 * hidden  # the two norms of a layer
    if family == "qwen2" or (family != "mistral" and architecture.get("attention_bias")):
        vectors += (heads + 2 * kv_heads) * head_dim + (hidden if family != "qwen2" else 0)
    if family == "llama" and architecture.get("mlp_bias"):
        vectors += 2 * inner + hidden
    if family == "qwen3":
        vectors += 2 * head_dim  # q_norm and k_norm
    head = architecture["vocab_size"] * hidden
    embeddings = head if architecture.get("tie_word_embeddings") else 2 * head
    return ParameterCount(matmul + layers * vectors + hidden + embeddings, matmul, head)


def kv_bytes_per_token(architecture: dict[str, Any], bytes_per_element: int) -> int:
    """Returns the bytes that one token's keys and values take in all layers.

    Raises:
        UserError: the architecture lacks the sizes (a hub id that is not cached, or an unusual model).
    """
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if not positive_integer(architecture.get(key)):
            raise UserError("model.path", f"the checkpoint's {key} is not known", GIVE_PATH)
    _, kv_heads, head_dim = attention_heads(architecture)
    return int(2 * architecture["num_hidden_layers"] * kv_heads * head_dim * bytes_per_element)


def required_bytes(architecture: dict[str, Any], bytes_per_element: int) -> int | None:
    """Returns the bytes that the weights alone take; None where `parameters` cannot count them."""
    count = parameters(architecture)
    return None if count is None else count.total * bytes_per_element


@dataclass(frozen=True, slots=True)
class Encoding:
    """What a tokenizer returns: ids, nested one deeper for a list of texts."""

    input_ids: list[Any]


class ByteTokenizer:
    """One id a UTF-8 byte (byte + 3), BOS first: for dummy weights, whose text means nothing anyway."""

    name_or_path = "bytes"
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2
    vocab_size = 259

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> Encoding:
        """Returns the ids of one text, or of each text in a list; never padded."""
        if isinstance(text, list):
            return Encoding([self(one, add_special_tokens).input_ids for one in text])
        data = text.encode(errors="surrogatepass")
        return Encoding([self.bos_token_id] * add_special_tokens + [byte + 3 for byte in data])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of ``ids``; ids beyond the bytes and broken UTF-8 become U+FFFD."""
        special = [b"", b"", b""] if skip_special_tokens else [b"<pad>", b"<s>", b"</s>"]
        table = (*special, *(bytes([byte]) for byte in range(256)))
        return b"".join(table[i] if i < len(table) else b"\xff" for i in map(int, ids)).decode(errors="replace")

    def __len__(self) -> int:
        return self.vocab_size


def load_tokenizer(source: Source) -> Any:
    """Returns the transformers tokenizer of ``source``, or a `ByteTokenizer`.

    Raises:
        UserError: it cannot be read, or it knows more tokens than the model.
    """
    if source.tokenizer is None:
        return ByteTokenizer()
    from transformers import AutoTokenizer

    path, name = source.tokenizer, None
    if path.endswith(".gguf"):
        path, name = os.path.split(path)
    local = os.path.isdir(path)
    extra = {} if name is None else {"gguf_file": name}
    with quiet(downloads=not local), as_user_error("model.tokenizer", source.tokenizer):
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=local, trust_remote_code=source.trust_remote_code, **extra
        )
    vocabulary = positive_integer(source.architecture.get("vocab_size"))
    if vocabulary and tokenizer.vocab_size > vocabulary:
        raise UserError(
            "model.tokenizer",
            f"{source.tokenizer} has {tokenizer.vocab_size} tokens, the model's vocabulary {vocabulary}",
            "give the tokenizer that belongs to the model",
        )
    return tokenizer


def load_model(
    source: Source,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    device: str = "cpu",
    device_map: Any = None,
    seed: int = 0,
    layers: int | None = None,
) -> PreTrainedModel:
    """Returns the model, ready for inference: eval mode, no gradients.

    Args:
        source: from `locate`.
        dtype: type of the weights.
        attention: a name that transformers' ``attn_implementation`` takes; None for its own choice.
        device: where the weights go, if ``device_map`` is None.
        device_map: accelerate's, e.g. ``"auto"`` for a model larger than one device.
        seed: of dummy weights; the same seed gives the same weights on the same kind of device.
        layers: load the first so many alone, of a checkpoint.

    Raises:
        UserError: transformers cannot read the checkpoint, or its weights do not fit its config.
    """
    if device_map is None and device != "cpu":
        device_map = {"": device}
    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "device_map": device_map}
    model = _load_dummy(source, seed, kwargs) if source.kind == "dummy" else _load_pretrained(source, kwargs, layers)
    model.requires_grad_(False)
    return model.eval()


def _load_pretrained(source: Source, kwargs: dict[str, Any], layers: int | None) -> PreTrainedModel:
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    hub = source.kind == "hub"
    kwargs |= {
        "local_files_only": not hub,
        "use_safetensors": None if source.pickled else True,
        "weights_only": True,  # out of a pickle, tensors alone
        "trust_remote_code": source.trust_remote_code,
    }
    if source.gguf_file is not None:
        kwargs["gguf_file"] = source.gguf_file
        try:
            from transformers.utils.quantization_config import GgufConfig

            kwargs["quantization_config"] = GgufConfig(dequantize=True)
        except ImportError:
            pass  # transformers before GgufConfig always dequantizes
    where = os.path.join(str(source.path), source.gguf_file or "")
    gguf = source.gguf_file is not None
    with quiet(downloads=hub, stderr=not gguf), as_user_error("model.path", where.rstrip(os.sep)):
        if hub:  # whose config nobody has read yet
            raw, _ = transformers.PretrainedConfig.get_config_dict(source.path)
            refuse_kernels(raw, f"model.path, {source.path}, ", source.trust_remote_code)
        if layers is not None:
            kwargs["config"] = _first_layers(source, layers)
        # Mismatches are let through here because the report below names them better than an exception.
        model, info = auto.from_pretrained(
            source.path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    refuse_encoders(model.config)
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    # Older LLaMA checkpoints also hold each layer's rotary frequencies, which follow from the config.
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq")]
    if layers is not None:
        unexpected = [key for key in unexpected if _layer_of(key) < layers]
    refuse_other_weights(source, info["missing_keys"], mismatched, unexpected)
    if source.kind == "gguf":  # the weights are plain now, and must look so to whoever saves or shards them
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return model


def _first_layers(source: Source, layers: int) -> Any:
    """Returns the checkpoint's config with so many layers."""
    from transformers import AutoConfig

    extra = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    config = AutoConfig.from_pretrained(source.path, trust_remote_code=source.trust_remote_code, **extra)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = list(kinds)[:layers]
    return config


def _layer_of(key: str) -> int:
    """Returns the number of the layer that a weight belongs to; -1 for one of the rest."""
    found = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", key)
    return int(found[1]) if found else -1


def refuse_other_weights(
    source: Source, missing: Collection[str], mismatched: Collection[str], unexpected: Collection[str]
) -> None:
    """Raises UserError for a checkpoint whose weights are not those that its config describes."""
    for names, what in (
        (missing, "lacks weights"),
        (mismatched, "has weights of another shape than its config says"),
        (unexpected, "has weights that its config has no place for"),
    ):
        if names:
            found = f"{source.path} {what}: {len(names)}, for example {min(names)}"
            raise UserError("model.path", found, "use a complete checkpoint with its own config.json")


def _load_dummy(source: Source, seed: int, kwargs: dict[str, Any]) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    architecture = source.architecture
    with quiet(), as_user_error("model.architecture", quoted(architecture.get("model_type"))):
        config = dummy_config(source)
        config.initializer_range = 0.02  # small enough for activations to stay finite in half precision
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        # Loading "nothing" allocates each weight once, on its own device, and has transformers initialise
        # weights, tied embeddings and rotary buffers as it does for a checkpoint that lacks them.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(skeleton).from_pretrained(None, config=config, state_dict={}, **kwargs)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (value := architecture.get(key)) is not None:
            setattr(model.generation_config, key, value)
    return model


@contextmanager
def quiet(downloads: bool = False, stderr: bool = True) -> Iterator[None]:
    """Silences transformers, then restores what was set.

    Args:
        downloads: keep the hub's progress bars, since gigabytes in silence look like a hang.
        stderr: False also drops stderr, for the GGUF reader's bar, which has no switch.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings(), nullcontext() if stderr else redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if downloads:
            enable_progress_bars()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


@contextmanager
def as_user_error(field: str, where: str) -> Iterator[None]:
    """Turns what transformers raises for a bad checkpoint into a `UserError`; out of memory stays."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    caught = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
    try:
        with _unpickling(where):
            yield
    except (*caught, StrictDataclassError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOMEM:
            raise
        lines = str(error).strip().splitlines() or [""]
        first = lines[0] if not lines[0].endswith(":") else " ".join(lines[:2])
        if "connect to" in first:
            first, remedy = "not in the local cache, and no network", "give a local directory"
        else:
            remedy = "use a checkpoint that the installed transformers can read"
        if isinstance(error, LookupError | TypeError | AttributeError):
            first = f"{type(error).__name__}: {first}"
        raise UserError(field, f"{where}: {one_line(first, 300)}", remedy) from error


@contextmanager
def _unpickling(where: str) -> Iterator[None]:
    """Says what a pickle is that torch, reading tensors alone, refuses: torch advises to run what is in it."""
    try:
        yield
    except (UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        found = f"{where}: its pickled weights are damaged, or hold more than tensors; nothing in them was run"
        raise UserError("model.allow_pickle", found, "get them from where you trust, as safetensors") from error
