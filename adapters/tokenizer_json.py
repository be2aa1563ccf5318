"""What a stranger's tokenizer.json may hold, so that its work stays in proportion to the text.

A tokenizer is a program: its parts may repeat text, and its regular expressions may backtrack for
years. Known parts only, each in amounts that cannot multiply; ids that mean what the base model's
mean. Reads parsed JSON and nothing else: runs no tokenizer.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from adapters.errors import Finding

FILE_NAME = "tokenizer.json"
# The longest tokens of published vocabularies are runs of some 128 spaces.
MAX_TOKEN_CHARACTERS = 256
MAX_PARTS = 16
# Of one kind, where one mistake shows at every token.
MAX_FINDINGS = 8
# Trainers add no merges for the tokens they add; this leaves room for those who do.
MAX_MERGES_PER_NEW_TOKEN = 64
# WordPiece tries every prefix of what is left of a word.
MAX_WORD_CHARACTERS = 200
MAX_PATTERN_CHARACTERS = 1024

Check = Callable[[Any], bool]


def check(fields: Mapping[str, Any], base: Mapping[str, Any], *, num_rows: int) -> list[Finding]:
    """Return what keeps a tokenizer from being served beside the base model's.

    `fields` and `base` are parsed tokenizer.json files, the base's one that the library wrote;
    `num_rows` is how many embedding rows there are, the adapter's own among them.
    """
    findings = [
        _finding("tokenizer_field_unknown", field[:100], "is no field of a tokenizer.json")
        for field in fields
        if field not in _FIELDS
    ]
    findings += _check_model(fields.get("model"), base["model"], num_rows=num_rows)
    findings += _check_added_tokens(fields.get("added_tokens"))
    if findings:
        # Nothing below can be read where the vocabulary cannot.
        return findings
    own = vocabulary(fields)
    findings += _check_vocabulary(own, vocabulary(base), fields, base, num_rows=num_rows)
    for kind in _PARTS:
        findings += _check_pipeline(kind, fields.get(kind), base.get(kind), regexes(base))
    return findings + _check_post_processor(fields.get("post_processor"), own)


def vocabulary(fields: Mapping[str, Any]) -> dict[str, int]:
    """Return token -> id of a checked tokenizer.json, added tokens among them."""
    vocab = fields["model"]["vocab"]
    ids = (
        {token: place for place, (token, _) in enumerate(vocab)}
        if isinstance(vocab, list)
        else dict(vocab)
    )
    return ids | {token["content"]: token["id"] for token in fields.get("added_tokens") or ()}


def regexes(value: Any) -> frozenset[str]:
    """Return every regular expression of a tokenizer's parts."""
    parts = [value.get(kind) for kind in _PARTS]
    return frozenset(
        pattern["Regex"]
        for part in parts
        for leaf in _leaves(part)
        if isinstance(pattern := leaf.get("pattern"), dict) and "Regex" in pattern
    )


# The vocabulary.


def _check_model(model: Any, base: Mapping[str, Any], *, num_rows: int) -> list[Finding]:
    if not isinstance(model, dict):
        return [_finding("tokenizer_model_invalid", "model", "is no JSON object")]
    kind = model.get("type", base["type"])
    if kind != base["type"]:
        return [
            _finding("tokenizer_model_differs", "model.type", f"is {kind!r}, not {base['type']!r}")
        ]
    known = _MODELS[kind]
    findings = [
        _finding("tokenizer_model_invalid", f"model.{field[:100]}", "is not a value served here")
        for field, value in model.items()
        if not known.get(field, _never)(value)
    ]
    if "vocab" not in model:
        findings.append(_finding("tokenizer_model_invalid", "model.vocab", "is missing"))
    if findings or kind != "BPE":
        return findings
    num_merges, num_new = len(model.get("merges", ())), max(0, num_rows - len(base["vocab"]))
    most = len(base["merges"]) + MAX_MERGES_PER_NEW_TOKEN * num_new
    if num_merges > most:
        problem = f"has {num_merges} entries, above the limit of {most}"
        findings.append(_finding("too_many_merges", "model.merges", problem))
    return findings


def _check_added_tokens(tokens: Any) -> list[Finding]:
    if tokens is None:
        return []
    is_list = isinstance(tokens, list) and all(map(_is_added_token, tokens))
    if is_list and len({token["content"] for token in tokens}) == len(tokens):
        return []
    problem = "is no list of tokens with their ids and flags"
    return [_finding("added_tokens_invalid", "added_tokens", problem)]


def _is_added_token(token: Any) -> bool:
    if not isinstance(token, dict) or set(token) != set(_ADDED_TOKEN):
        return False
    return all(is_valid(token[field]) for field, is_valid in _ADDED_TOKEN.items())


def _check_vocabulary(
    own: Mapping[str, int],
    base: Mapping[str, int],
    fields: Mapping[str, Any],
    base_fields: Mapping[str, Any],
    *,
    num_rows: int,
) -> list[Finding]:
    # Reserved tokens may be given names: their rows stay where they are.
    reserved = {token["id"] for token in base_fields["added_tokens"]}
    base_ids, own_ids = set(base.values()), set(own.values())
    differing = [
        token
        for token, token_id in base.items()
        if own.get(token) != token_id
        and not (token not in own and token_id in reserved and token_id in own_ids)
    ]
    findings = _each("token_differs", differing, lambda token: _moved(token, own, base))
    new = {token: token_id for token, token_id in own.items() if token not in base}
    taken = [token for token in new if new[token] in base_ids - reserved]
    findings += _each("token_id_taken", taken, lambda token: f"has the base's id {new[token]}")
    findings += _each(
        "token_too_long",
        [token for token in new if len(token) > MAX_TOKEN_CHARACTERS],
        lambda _: f"is longer than {MAX_TOKEN_CHARACTERS} characters",
    )
    findings += _each(
        "token_without_row",
        [token for token in new if new[token] >= num_rows],
        lambda token: f"has id {new[token]}, and there are {num_rows} embedding rows",
    )
    return findings + _check_ids(own, new, base_ids, vocab=fields["model"]["vocab"])


def _check_ids(
    own: Mapping[str, int], new: Mapping[str, int], base_ids: set[int], *, vocab: Any
) -> list[Finding]:
    uses = Counter(own.values())
    shared = [token for token in own if uses[own[token]] > 1]
    findings = _each("token_id_shared", shared, lambda token: f"shares id {own[token]}")
    first = max(base_ids, default=-1) + 1
    beyond = sorted({token_id for token_id in new.values() if token_id >= first})
    if beyond and beyond[-1] != first + len(beyond) - 1:
        missing = next(each for each, named in enumerate(beyond, first) if each != named)
        problem = f"leaves id {missing} without a token, and names id {beyond[-1]}"
        findings.append(_finding("token_id_gap", "vocabulary", problem))
    if isinstance(vocab, dict):
        moved = [token for token, token_id in vocab.items() if own[token] != token_id]
        findings += _each("token_id_shared", moved, lambda _: "has two ids")
    return findings


def _moved(token: str, own: Mapping[str, int], base: Mapping[str, int]) -> str:
    if token not in own:
        return "is a token of the base model, and is missing"
    return f"has id {own[token]}, and {base[token]} in the base model"


def _each(code: str, tokens: Iterable[str], say: Callable[[str], str]) -> list[Finding]:
    """One finding for each token, and one for all beyond the first few."""
    all_tokens = list(tokens)
    findings = [
        _finding(code, f"token {token[:100]!r}", say(token)) for token in all_tokens[:MAX_FINDINGS]
    ]
    if len(all_tokens) > MAX_FINDINGS:
        rest = len(all_tokens) - MAX_FINDINGS
        findings.append(_finding(code, "vocabulary", f"{rest} more tokens have the same fault"))
    return findings


# The parts that text passes through.


def _check_pipeline(kind: str, part: Any, base: Any, known: frozenset[str]) -> list[Finding]:
    if part is None or part == base:
        return []
    leaves, base_leaves = list(_leaves(part)), list(_leaves(base))
    if len(leaves) > MAX_PARTS:
        return [_finding("too_many_parts", kind, f"has more than {MAX_PARTS} parts")]
    findings: list[Finding] = []
    for leaf in leaves:
        if leaf not in base_leaves:
            findings += _check_leaf(kind, leaf, known)
    # Some make two bytes of one: twice is four, ten times a thousand.
    uses = Counter(str(leaf.get("type")) for leaf in leaves)
    allowed = Counter(str(leaf.get("type")) for leaf in base_leaves)
    findings += [
        _finding("too_many_parts", kind, f"has {name[:100]} {count} times")
        for name, count in uses.items()
        if name not in _REPEATABLE and count > max(1, allowed[name])
    ]
    return findings


def _check_leaf(kind: str, leaf: Mapping[str, Any], known: frozenset[str]) -> list[Finding]:
    name = leaf.get("type")
    spec = _PARTS[kind].get(name) if isinstance(name, str) else None
    if spec is None:
        return [_finding("unknown_component", kind, f"has a part of the type {str(name)[:100]!r}")]
    findings = [
        _finding("component_invalid", f"{kind}.{name}.{field[:100]}", "is not a value served here")
        for field, value in leaf.items()
        if field != "type" and not spec.get(field, _never)(value)
    ]
    findings += [
        _finding("component_invalid", f"{kind}.{name}.{field}", "is missing")
        for field in spec
        if field in _REQUIRED and field not in leaf
    ]
    if not findings and "pattern" in leaf:
        findings = _check_pattern(f"{kind}.{name}", leaf, known)
    return findings


def _check_pattern(where: str, leaf: Mapping[str, Any], known: frozenset[str]) -> list[Finding]:
    """What a pattern finds is split off or replaced, in time and space of the text's own length."""
    text, regex = leaf["pattern"].get("String"), leaf["pattern"].get("Regex")
    if "content" in leaf:
        if regex is not None:
            problem = "replaces by a regular expression that the base model's tokenizer lacks"
            return [_finding("pattern_refused", where, problem)]
        if len(leaf["content"]) > len(text):
            return [_finding("text_grows", where, "replaces text by longer text")]
    if regex is None or regex in known or is_linear(regex):
        return []
    problem = f"may take very long: {regex[:100]!r} is none of the base model's"
    return [_finding("pattern_refused", where, problem)]


def is_linear(regex: str) -> bool:
    """Whether a backtracking engine needs time of the text's length alone, whatever the text.

    So it is where alternatives are plain characters and classes of which only the last repeats:
    after it nothing can fail. (RE2's consent would not do: the tokenizers library does not run
    RE2, and `(a+)+$`, which is harmless there, is not in its own engine.)
    """
    return len(regex) <= MAX_PATTERN_CHARACTERS and _LINEAR.fullmatch(regex) is not None


_ESCAPE = r"\\[dDsSwWnrt]|\\[pP]\{\^?[A-Za-z_]{1,24}\}|\\[^A-Za-z0-9]"
_CLASS = rf"\[\^?(?:{_ESCAPE}|[^\\\[\]&^])+\]"
_ATOM = rf"(?:{_ESCAPE}|{_CLASS}|[^\\\[\](){{}}|*+?.^$])"
_BRANCH = rf"(?:{_ATOM}\?)?{_ATOM}{{1,32}}(?:\+|\{{[1-9]\d?(?:,[1-9]?\d?\d?)?\}})?"
_LINEAR = re.compile(rf"{_BRANCH}(?:\|{_BRANCH}){{0,15}}")


def _leaves(part: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The parts of nested sequences, in order; what is no part at all comes out as it is named."""
    if part is None:
        return
    inner = None
    if isinstance(part, dict) and part.get("type") == "Sequence":
        inner = next((part[name] for name in _SEQUENCES if name in part), None)
    if not isinstance(inner, list) or depth > MAX_PARTS:
        yield part if isinstance(part, dict) else {"type": str(part)[:100]}
        return
    for each in inner:
        yield from _leaves(each, depth + 1)


# What is put around the tokens.


def _check_post_processor(part: Any, own: Mapping[str, int]) -> list[Finding]:
    leaves = list(_leaves(part))
    if len(leaves) > MAX_PARTS:
        return [_finding("too_many_parts", "post_processor", f"has more than {MAX_PARTS} parts")]
    return [finding for leaf in leaves for finding in _check_frame(leaf, own)]


def _check_frame(leaf: Mapping[str, Any], own: Mapping[str, int]) -> list[Finding]:
    name = leaf.get("type")
    where = f"post_processor.{str(name)[:100]}"
    match name:
        case "ByteLevel":
            return []
        case "BertProcessing" | "RobertaProcessing":
            is_valid = all(_names_token(leaf.get(field), own) for field in ("sep", "cls"))
        case "TemplateProcessing":
            is_valid = _is_template(leaf, own)
        case _:
            return [_finding("unknown_component", "post_processor", f"has a part {name!r}")]
    problem = "puts other tokens around a text than a tokenizer has, or the text twice"
    return [] if is_valid else [_finding("component_invalid", where, problem)]


def _names_token(value: Any, own: Mapping[str, int]) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and own.get(value[0]) == value[1]
    )


def _is_template(leaf: Mapping[str, Any], own: Mapping[str, int]) -> bool:
    specials = leaf.get("special_tokens", {})
    if not isinstance(specials, dict) or not all(
        isinstance(each, dict)
        and isinstance(each.get("tokens"), list)
        and all(isinstance(token, str) for token in each["tokens"])
        and len(each["tokens"]) <= MAX_PARTS
        and [own.get(token) for token in each["tokens"]] == each.get("ids")
        for each in specials.values()
    ):
        return False
    return all(_is_arrangement(leaf.get(field), specials) for field in ("single", "pair"))


def _is_arrangement(pieces: Any, specials: Mapping[str, Any]) -> bool:
    if not isinstance(pieces, list) or len(pieces) > MAX_PARTS:
        return False
    texts: list[Any] = []
    for piece in pieces:
        if not isinstance(piece, dict) or len(piece) != 1:
            return False
        [(what, named)] = piece.items()
        if not isinstance(named, dict) or not isinstance(named.get("id"), str):
            return False
        if what == "Sequence":
            texts.append(named["id"])
        elif what != "SpecialToken" or named["id"] not in specials:
            return False
    return texts in (["A"], ["A", "B"])


# What each part may be told.


def _never(_: Any) -> bool:
    return False


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _flag_or_null(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TOKEN_CHARACTERS


def _text_or_null(value: Any) -> bool:
    return value is None or _text(value)


def _affix(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= 16)


def _character(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 1


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _one_of(*names: str) -> Check:
    return lambda value: value in names


def _pattern(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and _only(value, ("String", "Regex"))


def _only(value: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    return all(name in names and isinstance(each, str) and each for name, each in value.items())


def _ids_by_token(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_count, value.values()))


def _scores(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, list)
        and len(each) == 2
        and isinstance(each[0], str)
        and isinstance(each[1], int | float)
        and math.isfinite(each[1])
        for each in value
    )


def _merges(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, str)
        or (isinstance(each, list) and len(each) == 2 and all(isinstance(e, str) for e in each))
        for each in value
    )


def _fixed(*values: Any) -> Check:
    return lambda value: any(value is each or value == each for each in values)


_FIELDS = (
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
)
_ADDED_TOKEN: dict[str, Check] = {
    "id": _count,
    "content": lambda value: isinstance(value, str) and bool(value),
    "single_word": _flag,
    "lstrip": _flag,
    "rstrip": _flag,
    "normalized": _flag,
    "special": _flag,
}
_MODELS: dict[str, dict[str, Check]] = {
    "BPE": {
        "type": _text,
        # Chance would give the same prompt other tokens each time.
        "dropout": _fixed(None, 0, 0.0),
        "unk_token": _text_or_null,
        "continuing_subword_prefix": _affix,
        "end_of_word_suffix": _affix,
        "fuse_unk": _flag,
        "byte_fallback": _flag,
        "ignore_merges": _flag,
        "vocab": _ids_by_token,
        "merges": _merges,
    },
    "Unigram": {
        "type": _text,
        "unk_id": lambda value: value is None or _count(value),
        "vocab": _scores,
        "byte_fallback": _flag,
    },
    "WordPiece": {
        "type": _text,
        "unk_token": _text_or_null,
        "continuing_subword_prefix": _affix,
        "max_input_chars_per_word": lambda value: _count(value) and value <= MAX_WORD_CHARACTERS,
        "vocab": _ids_by_token,
    },
    "WordLevel": {"type": _text, "unk_token": _text_or_null, "vocab": _ids_by_token},
}
_BYTE_LEVEL: dict[str, Check] = {
    "add_prefix_space": _flag,
    "trim_offsets": _flag,
    "use_regex": _flag,
}
_METASPACE: dict[str, Check] = {
    "replacement": _character,
    "str_rep": _character,
    "add_prefix_space": _flag,
    "prepend_scheme": _one_of("always", "never", "first"),
    "split": _flag,
}
_SPLIT_BEHAVIOUR = _one_of(
    "Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"
)
_REPLACE: dict[str, Check] = {"pattern": _pattern, "content": lambda v: isinstance(v, str)}
_REQUIRED = ("pattern", "content", "behavior")
_PARTS: dict[str, dict[str, dict[str, Check]]] = {
    "normalizer": {
        "BertNormalizer": {
            "clean_text": _flag,
            "handle_chinese_chars": _flag,
            "strip_accents": _flag_or_null,
            "lowercase": _flag,
        },
        "ByteLevel": {},
        "Lowercase": {},
        "NFC": {},
        "NFD": {},
        "NFKC": {},
        "NFKD": {},
        "Nmt": {},
        "Prepend": {"prepend": _affix},
        "Replace": _REPLACE,
        "Strip": {"strip_left": _flag, "strip_right": _flag},
        "StripAccents": {},
    },
    "pre_tokenizer": {
        "BertPreTokenizer": {},
        "ByteLevel": _BYTE_LEVEL,
        "CharDelimiterSplit": {"delimiter": _character},
        "Digits": {"individual_digits": _flag},
        "Metaspace": _METASPACE,
        "Punctuation": {"behavior": _SPLIT_BEHAVIOUR},
        "Split": {"pattern": _pattern, "behavior": _SPLIT_BEHAVIOUR, "invert": _flag},
        "UnicodeScripts": {},
        "Whitespace": {},
        "WhitespaceSplit": {},
    },
    "decoder": {
        "BPEDecoder": {"suffix": _affix},
        "ByteFallback": {},
        "ByteLevel": _BYTE_LEVEL,
        "Fuse": {},
        "Metaspace": _METASPACE,
        "Replace": _REPLACE,
        "Strip": {"content": _character, "start": _count, "stop": _count},
        "WordPiece": {"prefix": _affix, "cleanup": _flag},
    },
}
# Parts that make no text longer, however often they stand in a row.
_REPEATABLE = ("Replace", "Split", "Strip")
_SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")


def _finding(code: str, where: str, message: str) -> Finding:
    return Finding(
        code=code,
        where=f"{FILE_NAME}: {where}",
        message=message,
        fix=_FIXES.get(code, "use the base model's tokenizer, and only add tokens to it"),
    )


_FIXES = {
    "token_without_row": (
        "resize the embeddings before training and save them (modules_to_save), or remove the token"
    ),
    "token_differs": "train with the tokenizer of the base model that the adapter is for",
    "token_id_gap": "add tokens with `tokenizer.add_tokens`, which leaves no gaps",
}


def canonical(fields: Mapping[str, Any]) -> str:
    """Return the JSON of what was checked: the library reads this, and no byte beside it."""
    return json.dumps(fields, ensure_ascii=False)
