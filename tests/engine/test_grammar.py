"""Answers keep to their grammars, whatever else the engine does, and nobody else notices.

The model is random and says bytes, so that what it says keeps to no form by itself.
"""

import json
import re
import string
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from adapters.text_bundle import TextBundle
from engine import grammar
from engine.protocol import Grammar, SequenceState
from tests.model_lab import FolderSource, Lab, open_lab

PROMPT = [5, 42, 7, 99, 3]
EOS = 256
ADAPTER, OTHER_ADAPTER = "all-linear", "attention"
WORD_AND_NUMBER = "[a-z]{3,6}-[0-9]{2}"
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z]{1,4}$"},
            "sizes": {"type": "array", "items": {"enum": ["s", "m", "l"]}, "maxItems": 2},
        },
        "required": ["name", "sizes"],
        "additionalProperties": False,
    }
)
LARK = 'start: "<" WORD ">" start? \nWORD: /[xyz]{2}/'


def text_bundle(*, rotated_by: int = 0) -> TextBundle:
    """256 tokens that are a byte each, and the end; `rotated_by` gives the bytes other ids."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {symbol: (place + rotated_by) % 256 for place, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab={**ids, "<end>": EOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return TextBundle(
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template=None,
        special_tokens={},
        eos_token_ids=(EOS,),
        generation_defaults={},
        context_length=256,
        vocab_size=257,
    )


BASE, OWN = "b" * 64, "a" * 64
BUNDLES = {BASE: text_bundle(), OWN: text_bundle(rotated_by=77)}


def said(token_ids: list[int], bundle: str = BASE) -> str:
    text: str = Tokenizer.from_buffer(BUNDLES[bundle].tokenizer_json).decode(token_ids)
    return text


def of_regex(pattern: str = WORD_AND_NUMBER, bundle: str = BASE) -> Grammar:
    return Grammar("regex", pattern, bundle)


def free(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": 60,
        "temperature": 1.0,
        "stop_token_ids": (EOS,),
    }
    return settings | changes


@pytest.fixture
def lab(model: str, adapters: FolderSource) -> Iterator[Lab]:
    with open_lab(model, adapters, bundles=BUNDLES, num_blocks=400) as lab:
        yield lab
        lab.assert_nothing_is_left()


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 5.0, "seed": 2},
    {"temperature": 1.0, "seed": 3, "top_k": 3},
    {"temperature": 3.0, "seed": 4, "top_p": 0.5},
    {"temperature": 1.0, "seed": 5, "min_p": 0.3, "frequency_penalty": 2.0},
    {"temperature": 0.0, "repetition_penalty": 1.8, "logit_bias": {7: 100.0, EOS: -100.0}},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_an_answer_keeps_to_its_pattern_and_ends_when_it_is_whole(
    lab: Lab, sampling: dict[str, Any]
) -> None:
    key = lab.submit(**free(grammar=of_regex(), **sampling))
    lab.run()
    answer = lab.answers[key]
    assert answer.state is SequenceState.STOPPED
    assert answer.token_ids[-1] == EOS
    assert re.fullmatch(WORD_AND_NUMBER, said(answer.token_ids))


def test_an_answer_keeps_to_a_schema_and_to_a_grammar(lab: Lab) -> None:
    keys = {
        kind: lab.submit(**free(grammar=Grammar(kind, text, BASE), seed=9))
        for kind, text in (("json_schema", SCHEMA), ("lark", LARK))
    }
    lab.run()
    texts = {kind: said(lab.answers[key].token_ids) for kind, key in keys.items()}
    assert {lab.answers[key].state for key in keys.values()} == {SequenceState.STOPPED}
    assert list(json.loads(texts["json_schema"])) == ["name", "sizes"]
    assert re.fullmatch("(<[xyz]{2}>)+", texts["lark"])


def test_between_the_words_of_json_there_is_only_so_much_space(lab: Lab) -> None:
    space_and_newline = dict.fromkeys(token_ids_of(" \n"), 100.0)
    key = lab.submit(
        **free(
            grammar=Grammar("json_schema", '{"const": [1, 2]}', BASE),
            logit_bias=space_and_newline,
            max_tokens=250,
        )
    )
    lab.run()
    text = said(lab.answers[key].token_ids)
    assert json.loads(text) == [1, 2]
    assert len(text) > 50


def token_ids_of(text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_buffer(BUNDLES[BASE].tokenizer_json).encode(text).ids
    return ids


def mixed_jobs() -> list[dict[str, Any]]:
    """Those with and without a grammar, of several adapters and two tokenizers."""
    schema = Grammar("json_schema", SCHEMA, BASE)
    return [
        free(seed=1),
        free(seed=2, grammar=schema),
        free(seed=3, grammar=schema, adapter=ADAPTER),
        free(seed=4, grammar=of_regex(bundle=OWN), adapter=OTHER_ADAPTER),
        free(seed=5, adapter=ADAPTER, temperature=0.0),
        free(seed=6, grammar=of_regex(), temperature=0.0),
        free(seed=7, grammar=of_regex(), top_k=4, presence_penalty=1.0),
        free(seed=8, grammar=of_regex("(yes|no|yes, but)"), adapter=ADAPTER, min_p=0.1),
        free(seed=9, frequency_penalty=1.0, adapter=OTHER_ADAPTER),
        *(free(seed=10 + number, grammar=schema) for number in range(10)),
    ]


def test_each_answers_in_a_batch_of_many_as_it_does_alone(lab: Lab) -> None:
    alone = [lab.generate(**job) for job in mixed_jobs()]
    keys = [lab.submit(**job) for job in mixed_jobs()]
    lab.run()
    assert [lab.answers[key].token_ids for key in keys] == alone
    assert re.fullmatch(WORD_AND_NUMBER, said(alone[3], OWN))
    assert said(alone[7]) in ("yes", "no", "yes, but")
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(said(alone[0]))


def test_chunks_and_preemption_change_nothing(model: str, adapters: FolderSource) -> None:
    with open_lab(model, adapters, bundles=BUNDLES, num_blocks=400) as lab:
        alone = [lab.generate(**job) for job in mixed_jobs()[:9]]
    with open_lab(
        model,
        adapters,
        bundles=BUNDLES,
        num_blocks=52,
        max_model_len=80,
        max_num_batched_tokens=9,
        max_num_seqs=9,
    ) as lab:
        keys = [lab.submit(**job) for job in mixed_jobs()[:9]]
        lab.run()
        assert [lab.answers[key].token_ids for key in keys] == alone
        lab.assert_nothing_is_left()


def test_an_answer_goes_on_after_what_an_earlier_attempt_delivered(lab: Lab) -> None:
    job = free(seed=3, grammar=Grammar("json_schema", SCHEMA, BASE))
    whole = lab.generate(**job)
    key = lab.submit(**job, generated=whole[:7])
    lab.run()
    assert lab.answers[key].token_ids == whole[7:]


def test_what_was_generated_before_must_fit(lab: Lab) -> None:
    key = lab.submit(**free(grammar=of_regex(), generated=token_ids_of("12")))
    lab.run()
    fault = lab.answers[key].last.fault
    assert fault is not None
    assert (fault.code, fault.is_retryable) == ("invalid_grammar", False)


# The end


def test_min_tokens_puts_the_end_off_for_as_long_as_the_grammar_can_go_on(lab: Lab) -> None:
    job = free(grammar=of_regex("a{1,9}"), logit_bias={EOS: 100.0})
    assert len(lab.generate(**job)) == 2
    assert said(lab.generate(**job, min_tokens=5)) == "aaaaa"
    assert said(lab.generate(**job, min_tokens=30)) == "aaaaaaaaa"


def test_an_answer_that_is_too_long_is_cut(lab: Lab) -> None:
    key = lab.submit(**free(grammar=of_regex("a{9}"), max_tokens=4))
    lab.run()
    assert lab.answers[key].state is SequenceState.LENGTH


def test_log_probabilities_tell_what_the_model_thought_without_the_grammar(lab: Lab) -> None:
    job = free(temperature=0.0, logprobs=1, max_tokens=1)
    unbound, bound = lab.submit(**job), lab.submit(**job, grammar=of_regex("q"))
    lab.run()
    (expected,), (found,) = lab.answers[unbound].logprobs, lab.answers[bound].logprobs
    assert found.top[0] == (expected.top[0][0], pytest.approx(expected.top[0][1], abs=1e-5))
    assert found.logprob < expected.logprob


# Faults


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("regex", "(a", "unclosed group"),
        ("json_schema", "{", "EOF"),
        ("json_schema", '{"not": {}}', "not"),
        ("lark", "start: nothing", "nothing"),
        ("regex", "a" * 200_000, "200000 characters"),
    ],
)
def test_a_grammar_that_cannot_be_used_fails_its_sequence_alone(
    lab: Lab, kind: Any, text: str, reason: str
) -> None:
    expected = lab.generate(**free())
    wrong, fine = lab.submit(**free(grammar=Grammar(kind, text, BASE))), lab.submit(**free())
    lab.run()
    fault = lab.answers[wrong].last.fault
    assert fault is not None
    assert (fault.code, fault.is_retryable) == ("invalid_grammar", False)
    assert reason in fault.message
    assert lab.answers[fine].token_ids == expected


def test_a_tokenizer_that_cannot_be_had_may_come_back(lab: Lab) -> None:
    key = lab.submit(**free(grammar=of_regex(bundle="c" * 64)))
    lab.run()
    fault = lab.answers[key].last.fault
    assert fault is not None
    assert (fault.code, fault.is_retryable) == ("grammar_unavailable", True)


def test_a_grammar_that_holds_up_the_others_is_given_up(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = lab.generate(**free())
    monkeypatch.setattr(grammar, "MAX_MASK_BURST_NS", 0)
    monkeypatch.setattr(grammar, "MAX_MASK_NS_PER_TOKEN", 0)
    slow, fine = lab.submit(**free(grammar=of_regex())), lab.submit(**free())
    lab.run()
    fault = lab.answers[slow].last.fault
    assert fault is not None
    assert fault.code == "grammar_too_complex"
    assert lab.answers[fine].token_ids == expected


def test_an_abort_ends_a_sequence_whose_grammar_is_not_compiled_yet(lab: Lab) -> None:
    # Nothing is taken over from the threads between these two.
    key = lab.submit(**free(grammar=of_regex(string.ascii_letters)))
    lab.core.abort(key)
    assert [event.state for event in lab.step()] == [SequenceState.ABORTED]
    lab.run()
    assert lab.answers[key].token_ids == []


def test_rows_without_a_grammar_make_no_masks(lab: Lab) -> None:
    lab.generate(**free())
    assert lab.core._sampler._rows is not None
    assert lab.core._sampler._rows._masks is None
