"""Conversations, as vLLM's ``benchmark_throughput`` reads them."""

from __future__ import annotations

from typing import Any

from harness.config.schema import DatasetConfig
from harness.workload.formats.base import FileFormat
from harness.workload.json_file import Layout
from harness.workload.records import Request
from harness.workload.stored_file import Record, describe


class ShareGpt(FileFormat):
    """The first turn is the prompt; the second, the reply, is as long as the output unless ``output_len`` is given.

    A conversation is left out, and counted, when it has fewer than two turns, an empty prompt, or an empty reply that
    should give the output length. vLLM shuffles the file; here dataset.shuffle does, the same way each time.
    """

    name = "sharegpt"
    optional = ("output_len",)
    layout = Layout.either
    what = "ShareGPT"
    record = '{"conversations": [{"from": ..., "value": ...}, ...]}'
    records = "conversations"

    def parse(self, record: Record, dataset: DatasetConfig) -> Request | None:
        """Returns the request of one conversation, or None when it cannot be used."""
        if not self.recognises(record.value):
            raise record.misshapen()
        turns = record.value["conversations"]
        if not isinstance(turns, list):
            raise record.error("conversations", f"{describe(turns)} is not a list")
        if len(turns) < 2:
            return None
        texts = []
        for number, turn in enumerate(turns[:2]):
            if not isinstance(turn, dict):
                raise record.error(f"conversations[{number}]", f"{describe(turn)} is not an object")
            texts.append(record.text(f"conversations[{number}].value", turn.get("value")))
        prompt, reply = texts
        if not prompt or (dataset.output_len is None and not reply):
            return None
        return Request(record.index, prompt, None, reply=reply)

    def recognises(self, value: Any) -> bool:
        """Returns whether ``value`` is an object with conversations."""
        return isinstance(value, dict) and "conversations" in value


FORMAT = ShareGpt()
