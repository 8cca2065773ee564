"""The tokenizer of a model, or one of bytes where dummy weights have none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.basics.errors import UserError
from harness.models.architecture import positive_integer
from harness.models.source import Source
from harness.models.transformers_quiet import as_user_error, quiet


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
