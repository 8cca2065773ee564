"""Forward passes in C++ for CPUs with AVX2, AVX-512 or AMX, from the weights of the Hugging Face model.

The model is read layer by layer where it can be, else loaded by transformers and taken apart: its weights are packed in
the order in which ``native/matrix.h`` reads them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.engines.base import EngineSettings
from harness.engines.fastgen.batch import RaggedBatch, Sequence
from harness.engines.fastgen.runners.base import AtOnce
from harness.engines.fastgen.runners.native import build, library
from harness.engines.fastgen.runners.native.library import LINE, LONGEST_BLOCK, WIDTH
from harness.engines.shared import auto_tp
from harness.engines.shared.attention_checks import refuse_unusual_attention
from harness.engines.shared.kv_memory import affordable_blocks, free_memory
from harness.models import tensors
from harness.models.generation import stop_ids
from harness.models.tensors import Checkpoint


class NativeRunner(AtOnce):
    """One ragged forward a pass through the compiled library, on all of torch's threads."""

    name = "native"
    device_time = None
    every_token = True

    def __init__(self, settings: EngineSettings) -> None:
        """Raises BuildError where the library cannot be compiled or loaded."""
        self.settings = settings
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        wish = settings.engine.kv_block_size
        self.block_size = min(-(-wish // WIDTH) * WIDTH, LONGEST_BLOCK)
        try:
            self.library = library.load(build.library(settings.dtype))
        except OSError as error:
            raise build.BuildError(f"the compiled kernels cannot be loaded: {error}") from error
        self.panel: int = self.library.harness_panel()  # columns of weights that are laid out together
        self.handle = self.library.harness_new(self.dtype is torch.bfloat16)
        if not self.handle:  # so little memory there always is
            raise build.BuildError("the system keeps AMX's registers from this process")
        weakref.finalize(self, self.library.harness_delete, self.handle)
        self.kept: list[Any] = []  # what the structures have the addresses of
        self.ids: frozenset[int] = frozenset()

    def load(self) -> None:
        """Loads and packs the weights; raises UserError for what the user can mend."""
        checkpoint = tensors.plain(self.settings.source)
        model = auto_tp.load_whole(self.settings, None) if checkpoint is None else checkpoint.model
        refuse_unusual_attention(model.config.to_dict(), self.settings.max_context, "fastgen")
        self.ids = stop_ids(model, self.settings.generation)
        with torch.inference_mode():
            self._take(model, checkpoint)

    def stop_ids(self) -> frozenset[int]:
        """Returns the checkpoint's end-of-sequence ids, none under ``generation.stop=length``."""
        return self.ids

    def allocate(self, max_blocks: int) -> int:
        """Makes the cache: ``engine.kv_memory`` worth of blocks, at most ``max_blocks``."""
        model, block_size = self.model, self.block_size
        block_bytes = 2 * model.layer_count * model.kv_heads * model.head_dim * block_size * self.dtype.itemsize
        setting, free = self.settings.engine.kv_memory, free_memory(self.settings)
        blocks = affordable_blocks(setting, free, max_blocks, block_size, block_bytes)
        positions = blocks * block_size
        self._make_cache(blocks, min(positions, self.settings.max_context or positions))
        return blocks

    @contextmanager
    def warming(self) -> Iterator[None]:
        """See :meth:`Runner.warming`: two layers do, the last being another than those before it."""
        layers = self.model.layer_count
        self.model.layer_count = min(2, layers)
        try:
            yield
        finally:
            self.model.layer_count = layers

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Returns the greedy token ids, int64 ``[rows]``, one for each of ``batch.sampled``.

        Raises:
            FloatingPointError: a row has no logit that is a number.
            IndexError: a token id is outside the model's vocabulary.
            MemoryError: there is no room for the pass's activations.
        """
        return self._run(batch.chunks, batch.sampled)

    def logits(self, batch: RaggedBatch, rows: list[int] | None = None) -> Tensor:
        """Returns logits, float32 ``[rows, vocab]``, of ``batch.sampled`` or ``rows``; raises as ``forward``."""
        rows = batch.sampled if rows is None else rows
        logits = torch.empty(len(rows), self.model.vocab)
        self._run(batch.chunks, rows, logits)
        return logits

    def stages(self) -> dict[str, float]:
        """Returns the seconds of each stage of all passes so far; zeros unless the library takes them."""
        return dict(zip(library.STAGES, self.library.harness_stages(self.handle), strict=False))

    def free(self, sequence: Sequence) -> None:
        """Nothing to do: the blocks are the scheduler's, and their next holder overwrites them."""

    def _run(
        self, chunks: SequenceOf[tuple[Sequence, int, int, bool]], rows: list[int], logits: Tensor | None = None
    ) -> Tensor:
        tokens: list[int] = []
        blocks: list[int] = []
        begins: list[int] = []
        for sequence, start, length, _ in chunks:
            tokens += sequence.tokens[start : start + length]
            begins.append(len(blocks))
            blocks += sequence.blocks
        arrays = [
            np.array(values, np.int32)
            for values in (tokens, [c[1] for c in chunks], [c[2] for c in chunks], blocks, begins, rows)
        ]
        if not 0 <= min(tokens) <= max(tokens) < self.model.vocab:
            strange = next(token for token in tokens if not 0 <= token < self.model.vocab)
            raise IndexError(f"token id {strange} is outside the model's vocabulary of {self.model.vocab}")
        next_ids = np.empty(len(rows), np.int64)
        outcome = self.library.harness_forward(
            self.handle,
            self.model,
            library.Pass(
                len(tokens),
                len(chunks),
                len(rows),
                *(array.ctypes.data for array in arrays),
                next_ids.ctypes.data,
                None if logits is None else logits.data_ptr(),
            ),
            torch.get_num_threads(),
        )
        if outcome:
            raise MemoryError(f"no memory for a pass of {len(tokens)} tokens")
        if (next_ids < 0).any():
            raise FloatingPointError("the model's logits are not numbers")
        return torch.from_numpy(next_ids)

    def _take(self, model: Any, checkpoint: Checkpoint | None) -> None:
        """Packs the weights into one piece of memory; the model's own go meanwhile, layer by layer.

        Args:
            checkpoint: has them, where the model has none yet.
        """

        def read(*names: str) -> None:
            if checkpoint is not None:
                for name in names:
                    checkpoint.read(name, self.dtype)

        config, decoder = model.config, model.model
        attention = decoder.layers[0].self_attn
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        query, key = heads * head_dim, kv_heads * head_dim
        layers = len(decoder.layers)
        self.gemma = config.model_type == "gemma"
        hidden, intermediate = config.hidden_size, config.intermediate_size
        shapes = [(query + 2 * key, hidden), (hidden, query), (2 * intermediate, hidden), (hidden, intermediate)]
        shapes = [*shapes * layers, (config.vocab_size, hidden)]
        self.packed = _Words(
            sum(self._whole_panels(columns) * depth for columns, depth in shapes) * self.dtype.itemsize // 4
        )
        self.layers = (library.Layer * layers)()
        for number, layer in enumerate(decoder.layers):
            read(f"model.layers.{number}")
            self.layers[number] = self._layer(layer)
            decoder.layers[number] = nn.Identity()
        tied = checkpoint is not None and checkpoint.tied
        read("model.embed_tokens", "model.norm", *(() if tied else ("lm_head",)))
        embedding_scale, residual_scale, logits_divisor = _scales(config, self.dtype)
        self.rotary = type(decoder.rotary_emb)(config)
        self.model = library.Model(
            layer_count=layers,
            hidden=hidden,
            intermediate=intermediate,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=config.vocab_size,
            block_size=self.block_size,
            norms_all_heads=hasattr(attention, "q_norm") and attention.q_norm.weight.numel() > head_dim,
            gelu=config.hidden_act == "gelu_pytorch_tanh",
            epsilon=config.rms_norm_eps,
            scaling=attention.scaling,
            embedding_scale=embedding_scale,
            residual_scale=residual_scale,
            embedding=self._keep(decoder.embed_tokens.weight.detach().contiguous()),
            norm=self._vector(self._norm_weight(decoder.norm) / logits_divisor),  # where it costs nothing
            head=self._pack((decoder.embed_tokens if tied else model.lm_head).weight),
            layers=self.layers,
        )

    def _layer(self, layer: Any) -> library.Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, qkv_bias = _query_key_value(attention)
        gate, up = _gate_and_up(mlp)
        attention_norm, attended_norm, mlp_norm, mlp_out_norm = _norms(layer)
        mixed = (-1, self.panel // 2, gate.shape[1])  # half a panel of the one, then half a panel of the other
        return library.Layer(
            qkv=self._pack(qkv),
            output=self._pack(attention.o_proj.weight),
            gate_up=self._pack(torch.stack([gate.view(mixed), up.view(mixed)], 1).flatten(0, 2)),
            down=self._pack(mlp.down_proj.weight),
            qkv_bias=self._vector(qkv_bias),
            output_bias=self._vector(attention.o_proj.bias),
            attention_norm=self._norm(attention_norm),
            mlp_norm=self._norm(mlp_norm),
            attended_norm=self._norm(attended_norm),
            mlp_out_norm=self._norm(mlp_out_norm),
            query_norm=self._norm(getattr(attention, "q_norm", None)),
            key_norm=self._norm(getattr(attention, "k_norm", None)),
        )

    def _norm(self, norm: Any) -> int | None:
        """Returns the address of a norm's weights, None where there is no such norm."""
        return None if norm is None else self._vector(self._norm_weight(norm))

    def _norm_weight(self, norm: Any) -> Tensor:
        """Returns what a norm multiplies by, float32: in gemma one more than its weights say."""
        return norm.weight.float() + self.gemma

    def _pack(self, weight: Tensor) -> int:
        """Returns the address of packed ``weight``, ``[columns, depth]``."""
        words = weight.detach().to(self.dtype).contiguous().view(torch.int32)
        columns, depth = words.shape
        to = self.packed.take(self._whole_panels(columns) * depth)
        self.library.harness_pack(words.data_ptr(), columns, depth, to, torch.get_num_threads())
        return to

    def _vector(self, values: Tensor | None) -> int | None:
        """Returns the address of a float32 copy, which ends with zeros up to a whole panel; None for nothing."""
        if values is None:
            return None
        padded = torch.zeros(self._whole_panels(len(values)))
        padded[: len(values)] = values.detach()
        return self._keep(padded)

    def _whole_panels(self, columns: int) -> int:
        """Returns the columns of as many panels as hold ``columns``."""
        return -(-columns // self.panel) * self.panel

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _make_cache(self, blocks: int, positions: int) -> None:
        """Makes a cache of ``blocks`` blocks and the rotary tables of ``positions`` positions, float32."""
        model = self.model
        words = blocks * model.kv_heads * model.head_dim * self.block_size * self.dtype.itemsize // 4
        self.cache = _Words(2 * model.layer_count * words)
        for layer in self.layers:
            layer.keys, layer.values = self.cache.take(words), self.cache.take(words)
        with torch.inference_mode():
            tables = self.rotary(torch.zeros(1), torch.arange(positions)[None])
        half = model.head_dim // 2
        self.tables = [table[0, :, :half].contiguous() for table in tables]
        model.cosines, model.sines = (table.data_ptr() for table in self.tables)
        # The blocks that are used are a dense prefix. Touched now, in the clock their pages need not be found.
        used = min(blocks, -(-self.settings.held_tokens // self.block_size))
        self.library.harness_touch(model, used * words // blocks, torch.get_num_threads())


def _scales(config: Any, dtype: torch.dtype) -> tuple[float, float, float]:
    """Returns what embeddings and what a layer adds are multiplied by, and what logits are divided by."""
    if config.model_type == "granite":
        return config.embedding_multiplier, config.residual_multiplier, config.logits_scaling
    if config.model_type == "gemma":  # a number of the model's own type
        return torch.tensor(config.hidden_size**0.5).to(dtype).item(), 1.0, 1.0
    return 1.0, 1.0, 1.0


def _query_key_value(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Returns the three weights as one, and the biases; phi3 has them so already."""
    if hasattr(attention, "qkv_proj"):
        return attention.qkv_proj.weight, attention.qkv_proj.bias
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [linear.bias for linear in projections]
    return torch.cat([linear.weight for linear in projections]), None if biases[0] is None else torch.cat(biases)


def _gate_and_up(mlp: Any) -> tuple[Tensor, Tensor]:
    """Returns the two weights; phi3 has them in one."""
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj.weight.chunk(2)
        return gate, up
    return mlp.gate_proj.weight, mlp.up_proj.weight


def _norms(layer: Any) -> tuple[Any, Any, Any, Any]:
    """Returns the norms before and after attention, before and after the MLP; None where a layer has none."""
    if not hasattr(layer, "post_feedforward_layernorm"):
        return layer.input_layernorm, None, layer.post_attention_layernorm, None
    return None, layer.post_attention_layernorm, None, layer.post_feedforward_layernorm


class _Words:
    """Zeroed memory, 32-bit words, handed out in pieces that start at a cache line.

    NumPy asks for large pages, which torch does not: measured, passes are 2 to 6% faster. Pages count once they are
    used.
    """

    def __init__(self, count: int) -> None:
        self.array = np.zeros(count + LINE, np.int32)
        self.at = self.array.ctypes.data + -self.array.ctypes.data % (4 * LINE)

    def take(self, count: int) -> int:
        """Returns the address of ``count`` words, a multiple of 16."""
        address = self.at
        self.at += 4 * count
        return address
