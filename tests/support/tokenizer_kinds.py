"""Tokenizers of few tokens, so that text and characters are split over them.

Three kinds: bytes in an alphabet of their own (GPT-2's, Llama 3's), pieces of text with bytes to fall back on (Llama
2's), and whole words (BERT's).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "Hello the world. The cat sat on the mat, 日本語の世界。 안녕하세요! User: hi\n\nUser: the end 👍🏽 naïve café "
EOS = "<|end|>"
KINDS = ("byte_level", "byte_fallback", "words")


@cache
def tokenizer(kind: str) -> Any:
    """Returns a transformers tokenizer of few tokens, so that text and characters are split over them."""
    if kind == "byte_level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator([TEXT] * 2, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    elif kind == "byte_fallback":
        pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        pieces += [
            "▁",
            *"aehilnorst",
            "th",
            "the",
            "▁the",
            "▁th",
            "er",
            "User",
            "▁c",
            "at",
            "en",
            "▁User",
            "本",
            "語の",
        ]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        merges = [("t", "h"), ("th", "e"), ("▁", "th"), ("▁th", "e"), ("a", "t"), ("e", "n")]
        made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
        made.normalizer = None
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        strip = decoders.Strip(" ", 1, 0)
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    else:
        letters = [f"{place}{letter}" for letter in "abcdefhinorstu" for place in ("", "##")]
        words = [
            "[UNK]",
            *letters,
            "the",
            "cat",
            "sat",
            "on",
            "##he",
            "User",
            ":",
            "é",
            "caf",
            "##é",
            "世",
            "##界",
            "。",
        ]
        made = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.add_special_tokens([AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=EOS, clean_up_tokenization_spaces=False)
