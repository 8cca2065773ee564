"""Keys that greedy decoding has no place for, and lists of stops, as they are typed: one line each."""

from __future__ import annotations

import pytest
from omegaconf.errors import OmegaConfBaseException

from harness.basics.errors import UserError
from harness.config.checks import check_generation
from harness.config.compose import compose, to_config
from harness.config.explain import explain
from harness.config.schema import GenerationConfig, Stop
from harness.engines import catalogue

NOTHING = "decoding is greedy, the challenge's rule, and nothing is drawn; leave it out"
ANYWAY = "decoding is greedy, the challenge's rule anyway; leave it out"
LIST = "put each text in quotes, and all of it: \"generation.stop_strings=['###','User:']\""


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("generation.temperature=0.7", f"generation.temperature: 0.7: {NOTHING}"),
        ("generation.temperature=0", f"generation.temperature: 0: {ANYWAY}"),
        ("+generation.temperature=0.7", f"generation.temperature: {NOTHING}"),
        ("temperature=1", f"temperature: 1: {NOTHING}"),
        ("engine.top_p=0.9", f"engine.top_p: 0.9: {NOTHING}"),
        ("generation.top_k=1", f"generation.top_k: 1: {ANYWAY}"),
        ("generation.do_sample=False", f"generation.do_sample: False: {ANYWAY}"),
        ("generation.do_sample=true", f"generation.do_sample: true: {NOTHING}"),
        ("generation.seed=3", f"generation.seed: 3: {NOTHING}"),
        ("generation.n=4", f"generation.n: 4: {NOTHING}"),
        ("seed=3", "seed: no such key; did you mean dataset.seed?"),
        ("generation.logit_bias={}", f"generation.logit_bias: {{}}: {NOTHING}"),
        ("generation.stop_words=[a]", "generation.stop_words: no such key; use generation.stop_strings=['...']"),
        ("generation.eos_token_id=5", "generation.eos_token_id: no such key; use generation.stop_token_ids=[ID]"),
        ("generation.ignore_eos=true", "generation.ignore_eos: no such key; use generation.stop=length"),
        ("max_tokens=9", "max_tokens: no such key; use generation.max_output_len=N, a cap on what the dataset asks"),
        ("generation.stop=User", "choose one of eos, length; for a text generation.stop_strings=['User']"),
        (
            "generation.stop_strings=User",
            "generation.stop_strings: 'User' is no list; write \"generation.stop_strings=[",
        ),
        ("generation.stop_strings='a b'", "write \"generation.stop_strings=['a b']\""),
        (
            "generation.stop_token_ids=2",
            "generation.stop_token_ids: '2' is no list; write \"generation.stop_token_ids=",
        ),
        ("generation.stop_token_ids=[a]", "generation.stop_token_ids[0]: 'a' is no whole number"),
        ("generation.stop_strings=[###]", f"cannot be read; {LIST}"),
        ("generation.foo=1", "generation.foo: no such key; see --help for the keys"),
    ],
)
def test_what_is_not_done_is_said_in_one_line(override: str, line: str) -> None:
    catalogue.register()
    with pytest.raises(UserError) as caught:
        composed = compose([override])
        try:
            to_config(composed)
        except OmegaConfBaseException as error:
            raise explain(error) from error
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("generation", "line"),
    [
        (GenerationConfig(stop_strings=["a", ""]), "generation.stop_strings: ''; give texts of 1 to 256 characters"),
        (GenerationConfig(stop_strings=["x" * 257]), "generation.stop_strings: 'xxx"),
        (GenerationConfig(stop_strings=["\ud800"]), "without lone surrogates"),
        (GenerationConfig(stop_strings=[["a"]]), "generation.stop_strings: ['a']; give texts"),  # type: ignore[list-item]
        (GenerationConfig(stop_strings=["a"] * 65), "generation.stop_strings: 65 of them; give at most 64"),
        (GenerationConfig(stop_token_ids=[3, -1]), "generation.stop_token_ids: -1; give ids of the model's tokens"),
        (GenerationConfig(Stop.length, stop_token_ids=[3]), "[3] contradicts generation.stop=length; use generation."),
        (GenerationConfig(Stop.length, stop_strings=["a"]), "['a'] contradicts generation.stop=length"),
    ],
)
def test_stops_that_cannot_end_a_request_are_refused(generation: GenerationConfig, line: str) -> None:
    with pytest.raises(UserError) as caught:
        check_generation(generation)
    assert line in str(caught.value)
    check_generation(GenerationConfig(stop_strings=["\n", "世"], stop_token_ids=[0, 2**31 - 1]))
