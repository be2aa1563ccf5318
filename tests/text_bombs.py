"""Text files that do harm: each makes an upload refused, with a finding of a known code.

A bomb is made for a base model's bundle, so that nothing but the harm tells it from honest files.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from adapters.text_bundle import TextBundle

Files = dict[str, bytes]
Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bomb:
    """What is uploaded beside the weights, by file name, and one code that must come back."""

    name: str
    files: Callable[[TextBundle], Files]
    code: str


def small_bundle() -> TextBundle:
    """A base model's bundle with a byte-level vocabulary of some 300 tokens, 8 rows unused."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(each, special=True) for each in ("<s>", "</s>", "<reserved>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    return TextBundle(
        # As transformers loads it.
        tokenizer_json=json.dumps(
            json.loads(tokenizer.to_str()) | {"post_processor": _post_processor([])}
        ).encode(),
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        eos_token_ids=(1,),
        generation_defaults={},
        context_length=512,
        vocab_size=tokenizer.get_vocab_size() + 8,
    )


def _post_processor(around: list[Fields], texts: int = 1, **specials: Fields) -> Fields:
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*around, *[text] * texts],
        "pair": [*around, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": specials,
    }


# Templates.

REACHES_ALWAYS = [
    (
        "nested loops",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    ),
    ("text times a number", "{{ 'a' * 10000000000 }}"),
    ("text times a smaller number", "{{ 'a' * 100000000 }}"),
    ("list times a number", "{{ ([0] * 10000000000) | length }}"),
    ("percent format width", "{{ '%10000000000d' % 1 }}"),
    ("brace format width", "{{ '{:>9999999999}'.format(1) }}"),
    ("format filter width", "{{ '%*d' | format(2000000000, 1) }}"),
    ("power", "{{ 9 ** (9 ** 9) }}"),
    ("recursive macro", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    ("recursive loop", "{% for m in [messages] recursive %}{{ loop([messages]) }}{% endfor %}"),
    ("large range", "{{ range(10000000000) | list }}"),
    (
        "doubling",
        "{% set ns = namespace(t='aaaaaaaa') %}{% for i in range(60) %}"
        "{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
    ),
    ("indented JSON", "{{ messages | tojson(indent=2000000000) }}"),
    ("indent filter", "{{ 'a\nb' | indent(2000000000) }}"),
    ("center filter", "{{ 'a' | center(2000000000) }}"),
    ("replace filter", "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}"),
    ("join filter", "{{ (['a' * 100000] * 100000) | join }}"),
    ("batch filter", "{{ messages | batch(1000000000, 'x') | list }}"),
    ("lipsum", "{{ lipsum(n=90000) }}"),
    ("date format", "{{ strftime_now('%c' * 100000000) }}"),
    ("long output", "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}"),
    (
        "only with a system message",
        "{% if messages|length == 2 %}{{ 'a' * 10000000000 }}{% endif %}",
    ),
    ("only with tools", "{% if tools %}{{ 'a' * 10000000000 }}{% endif %}"),
    ("only with an answer before", "{% if messages|length > 2 %}{{ 9 ** (9 ** 9) }}{% endif %}"),
]
_UNSAFE = [
    ("attribute walk", "{{ ''.__class__.__mro__ }}"),
    ("item walk", "{{ ''['__class__'] }}"),
    ("attr filter walk", "{{ '' | attr('__class__') }}"),
    ("map filter walk", "{{ messages | map(attribute='__class__') | list }}"),
    ("hidden walk", "{% if messages[0].content == 'now' %}{{ ''.__class__ }}{% endif %}"),
    ("changing the messages", "{% set _ = messages.append({}) %}"),
    ("include", "{% include '/etc/passwd' %}"),
    ("import", "{% import 'os' as os %}"),
    ("extends", "{% extends 'base' %}"),
]
_BROKEN = [
    ("no Jinja", "{% for %}", "template_syntax"),
    ("deep nesting", "{{ " + "[" * 20_000 + "]" * 20_000 + " }}", "template_syntax"),
    ("refuses everything", "{{ raise_exception('no') }}", "template_fails"),
    ("divides by zero", "{{ 1 // 0 }}", "template_fails"),
    ("100 MB", "a" * 100_000_000, "text_file_too_large"),
    ("200 kB", "a" * 200_000, "template_too_large"),
]
# Harmless on whatever a gateway may try them on.
HIDDEN = {
    "loops": "{% if 'now' in messages[0].content %}{% for i in range(90000) %}"
    "{% for j in range(90000) %}{% endfor %}{% endfor %}{% endif %}ok",
    "memory": "{% if 'now' in messages[0].content %}{{ 'a' * 10000000000 }}{% endif %}ok",
    "output": "{% if 'now' in messages[0].content %}{{ 'a' * 20000000 }}{% endif %}ok",
    # Not with 9 alone, which Jinja would work out when it compiles.
    "power": "{% if 'now' in messages[0].content %}"
    "{{ 9 ** (9 ** (8 + messages|length)) }}{% endif %}ok",
}


def _template(source: str) -> Callable[[TextBundle], Files]:
    return lambda _: {"chat_template.jinja": source.encode()}


TEMPLATE_BOMBS = [
    *(Bomb(name, _template(source), "template_bomb") for name, source in REACHES_ALWAYS),
    *(Bomb(name, _template(source), "template_unsafe") for name, source in _UNSAFE),
    *(Bomb(name, _template(source), code) for name, source, code in _BROKEN),
    Bomb(
        "template in the configuration",
        lambda _: {
            "tokenizer_config.json": json.dumps({"chat_template": "{{ 9**(9**9) }}"}).encode()
        },
        "template_bomb",
    ),
]


# Tokenizers.


def _tokenizer(change: Callable[[Fields], object]) -> Callable[[TextBundle], Files]:
    """The base's tokenizer after a change in place."""

    def files(base: TextBundle) -> Files:
        fields = json.loads(base.tokenizer_json)
        change(fields)
        return {"tokenizer.json": json.dumps(fields).encode()}

    return files


def _put(**fields: Any) -> Callable[[TextBundle], Files]:
    return _tokenizer(lambda tokenizer: tokenizer.update(fields))


def _raw(data: bytes, name: str = "tokenizer.json") -> Callable[[TextBundle], Files]:
    return lambda _: {name: data}


def _file(name: str, **fields: Any) -> Callable[[TextBundle], Files]:
    return _raw(json.dumps(fields).encode(), name)


def _split(regex: str) -> Fields:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _replace(old: str, new: str, kind: str = "String") -> Fields:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def _sequence(*parts: Fields) -> Fields:
    return {"type": "Sequence", "normalizers": list(parts)}


def _nested(depth: int) -> Fields:
    part: Fields = {"type": "NFC"}
    for _ in range(depth):
        part = _sequence(part)
    return part


def _add(content: str, token_id: int | None = None) -> Callable[[TextBundle], Files]:
    """One more token; by default with the next id."""

    def change(fields: Fields) -> None:
        ids = {*fields["model"]["vocab"].values(), *(t["id"] for t in fields["added_tokens"])}
        fields["added_tokens"].append(
            {
                "id": max(ids) + 1 if token_id is None else token_id,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": False,
            }
        )

    return _tokenizer(change)


def _swap(fields: Fields) -> None:
    vocab = fields["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def _merges(fields: Fields) -> None:
    fields["model"]["merges"] += [["a", "b"]] * 200_000


_ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 1], "trim_offsets": True}
_OUTSIDE = _post_processor(
    [{"SpecialToken": {"id": "x", "type_id": 0}}], x={"id": "x", "ids": [10**6], "tokens": ["x"]}
)

TOKENIZER_BOMBS = [
    Bomb("nested repetition", _put(pre_tokenizer=_split("(a+)+$")), "pattern_refused"),
    Bomb("back-reference", _put(pre_tokenizer=_split(r"(.*)\1+x")), "pattern_refused"),
    Bomb("many repetitions", _put(pre_tokenizer=_split("a*a*a*a*a*a*b")), "pattern_refused"),
    Bomb("many options", _put(pre_tokenizer=_split("a?" * 30 + "b")), "pattern_refused"),
    Bomb("long pattern", _put(pre_tokenizer=_split("a" * 100_000)), "pattern_refused"),
    Bomb(
        "replacement by a regular expression",
        _put(normalizer=_replace("x*", "y", "Regex")),
        "pattern_refused",
    ),
    Bomb(
        "growing replacements",
        _put(normalizer=_sequence(*[_replace("a", "aaaaaaaa")] * 12)),
        "text_grows",
    ),
    Bomb("growing decoder", _put(decoder=_replace("a", "a" * 10_000)), "text_grows"),
    Bomb(
        "doubling bytes",
        _put(normalizer=_sequence(*[{"type": "ByteLevel"}] * 16)),
        "too_many_parts",
    ),
    Bomb("many parts", _put(normalizer=_sequence(*[_replace("a", "b")] * 99)), "too_many_parts"),
    Bomb("nested parts", _put(normalizer=_nested(200)), "unknown_component"),
    Bomb("unknown part", _put(pre_tokenizer={"type": "Python"}), "unknown_component"),
    Bomb("part of no type", _put(normalizer=["NFC"]), "unknown_component"),
    Bomb(
        "binary table",
        _put(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "unknown_component",
    ),
    Bomb("unknown setting", _put(normalizer={"type": "NFC", "times": 9}), "component_invalid"),
    Bomb("pattern missing", _put(normalizer={"type": "Replace"}), "component_invalid"),
    Bomb("unknown field", _put(plugin="os"), "tokenizer_field_unknown"),
    Bomb("text repeated", _put(post_processor=_post_processor([], texts=9)), "component_invalid"),
    Bomb("token outside", _put(post_processor=_OUTSIDE), "component_invalid"),
    Bomb(
        "tokens outside", _put(post_processor={**_ROBERTA, "cls": ["<s>", 99]}), "component_invalid"
    ),
    Bomb("unknown frame", _put(post_processor={"type": "Shell"}), "unknown_component"),
    Bomb("other model", _put(model={"type": "Neural"}), "tokenizer_model_differs"),
    Bomb("no model", _put(model=None), "tokenizer_model_invalid"),
    Bomb(
        "chance",
        _tokenizer(lambda fields: fields["model"].update(dropout=0.5)),
        "tokenizer_model_invalid",
    ),
    Bomb("merges", _tokenizer(_merges), "too_many_merges"),
    Bomb(
        "merge of nothing",
        _tokenizer(lambda fields: fields["model"]["merges"].append(["qqq", "zzz"])),
        "tokenizer_invalid",
    ),
    Bomb("swapped ids", _tokenizer(_swap), "token_differs"),
    Bomb("no vocabulary", _tokenizer(lambda f: f["model"].update(vocab={})), "token_differs"),
    Bomb(
        "another vocabulary",
        _tokenizer(lambda f: f["model"].update(vocab={chr(i): i for i in range(300)}, merges=[])),
        "token_differs",
    ),
    Bomb(
        "negative id",
        _tokenizer(lambda f: f["model"]["vocab"].update(a=-1)),
        "tokenizer_model_invalid",
    ),
    Bomb("id gap", _add("<new>", 305), "token_id_gap"),
    Bomb("id taken", _add("<new>", 40), "token_id_taken"),
    Bomb(
        "id shared",
        _tokenizer(lambda f: f["model"]["vocab"].update(zq=300, qz=300)),
        "token_id_shared",
    ),
    Bomb("no row", _add("<new>", 10**6), "token_without_row"),
    Bomb("long token", _add("x" * 100_000), "token_too_long"),
    Bomb("empty token", _add(""), "added_tokens_invalid"),
    Bomb("odd tokens", _put(added_tokens=[{"id": 0}]), "added_tokens_invalid"),
    Bomb(
        "deep JSON",
        _raw(b'{"model": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "text_file_unreadable",
    ),
    Bomb("no JSON", _raw(b"\x80\x04pickle"), "text_file_unreadable"),
    Bomb("a list", _raw(b"[]"), "text_file_unreadable"),
    Bomb("the same key twice", _raw(b'{"model": 1, "model": 2}'), "text_file_unreadable"),
    Bomb("no number", _raw(b'{"model": NaN}'), "text_file_unreadable"),
    Bomb("half a character", _raw(b'{"model": "\\ud800"}'), "text_file_unreadable"),
    Bomb("100 MB", _raw(b" " * 100_000_000), "text_file_too_large"),
    Bomb("no tokenizer", _file("added_tokens.json", **{"<new>": 300}), "added_tokens_differ"),
    Bomb(
        "other added tokens",
        _file("tokenizer_config.json", added_tokens_decoder={"7": {"content": "<new>"}}),
        "added_tokens_differ",
    ),
    Bomb("odd template", _file("tokenizer_config.json", chat_template=[1]), "template_invalid"),
    Bomb("no text", _raw(b"\xff\xfe", "chat_template.jinja"), "template_invalid"),
    Bomb("odd temperature", _file("generation_config.json", temperature=-1), "generation_invalid"),
    Bomb("odd end", _file("generation_config.json", eos_token_id="x"), "generation_invalid"),
    Bomb("end outside", _file("generation_config.json", eos_token_id=10**6), "eos_unknown"),
]

BOMBS = [*TEMPLATE_BOMBS, *TOKENIZER_BOMBS]
