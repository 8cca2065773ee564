"""Each causal LM of transformers on each engine: Hugging Face's tokens, or a refusal in one line; nothing between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.version import Version
from support import families, families_table
from support.machine import needs_native

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = ("llama", "mistral", "qwen2", "gemma2/short", "phi3/longrope", "bloom", "stablelm", "gpt_oss")


@pytest.mark.slow
@needs_native
@pytest.mark.endurance
def test_every_family_is_computed_rightly_or_refused(scale: Callable[[int, int], int], tmp_path: Path) -> None:
    """In one process and on two ranks, in float32 and bfloat16; see the table with ``-s``."""
    every = bool(scale(0, 1))
    outcomes = families_table.collect(families.entries() if every else FEW, tmp_path)
    print(f"\n{families_table.shown(outcomes)}")
    plain = [name for name in outcomes if "/" not in name]
    built = [name for name in plain if "not built" not in outcomes[name]]
    assert len(built) >= 0.9 * len(plain)
    assert not families_table.failures(outcomes)
    if every:  # the document says what has been found, and nothing else
        (tmp_path / "FAMILIES.md").write_text(families_table.markdown(outcomes))
        assert families_table.DOCUMENT.read_text() == families_table.markdown(outcomes), f"new: {tmp_path}/FAMILIES.md"


def test_the_document_lists_what_transformers_has() -> None:
    """A newer transformers has new families: ``tests/support/families_table.py`` tries them. An older one has fewer."""
    if not families_table.DOCUMENT.exists():
        pytest.skip("it has not been written yet")
    import transformers

    document = families_table.DOCUMENT.read_text()
    listed, there = families_table.listed(document), families.names()
    if Version(transformers.__version__) < families_table.version(document):
        assert set(there) <= set(listed)
    else:
        assert listed == there
