"""What an adapter says about text beside its weights: its own tokens, its own chat template.

Reads the files that trainers leave there and makes a text bundle of them, or none where they only
repeat the base model. Files of a stranger: `build` is for a process that may be killed. It runs
the tokenizer, and never the template.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.processors import TemplateProcessing

from adapters import tokenizer_json
from adapters.errors import Finding
from adapters.text_bundle import TextBundle

TOKENIZER_FILE = tokenizer_json.FILE_NAME
CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
OLD_TEMPLATE_FILE = "chat_template.json"
GENERATION_FILE = "generation_config.json"

_MIB = 1 << 20
# The largest published tokenizer of today (262,144 tokens) has 33 MB; templates reach 30 kB.
MAX_FILE_BYTES = {
    TOKENIZER_FILE: 48 * _MIB,
    CONFIG_FILE: 4 * _MIB,
    SPECIALS_FILE: _MIB,
    ADDED_TOKENS_FILE: 4 * _MIB,
    TEMPLATE_FILE: 256 << 10,
    OLD_TEMPLATE_FILE: _MIB,
    GENERATION_FILE: _MIB,
}
MAX_TEMPLATE_CHARACTERS = 128 << 10
# As the tokenizers of transformers name them; each may stand in a template.
_NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# What each may be: (lowest, highest).
_SAMPLING = {"temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "top_k": (0, 1 << 31)}
# Runs that make pre-tokens long, and characters of every length.
TRIAL_TEXTS = (
    "",
    "The quick brown fox jumps over 13 lazy dogs.",
    "  leading, trailing  \n\n\t and  spaces ",
    "naïve café — “quotes” … 价格 ¥100 🦜🦜 👨‍👩‍👧 ﷺ",
    "def f(x):\n\treturn {'a': [1, 2.50]}\r\n",
    "a" * 20_000,
    " " * 20_000,
    "\n" * 5_000 + "x",
    "ab" * 10_000 + "!",
    "1234567890" * 2_000,
    "価" * 5_000,
)
# Byte fallback makes one token of each byte, templates add a few.
_MAX_TOKENS_PER_BYTE = 2


def read(files: Mapping[str, Path]) -> tuple[dict[str, bytes], list[Finding]]:
    """Return the contents of those files that say something about text, by name.

    Reads no file whose size is above its limit: there is a finding for it instead.
    """
    contents: dict[str, bytes] = {}
    findings = []
    for name, limit_bytes in MAX_FILE_BYTES.items():
        if name not in files:
            continue
        size_bytes = files[name].stat().st_size
        if size_bytes > limit_bytes:
            problem = f"has {size_bytes} bytes, above the limit of {limit_bytes}"
            findings.append(_finding("text_file_too_large", name, problem))
        else:
            contents[name] = files[name].read_bytes()
    return contents, findings


def build(
    files: Mapping[str, bytes], base: TextBundle, *, num_added_tokens: int
) -> tuple[TextBundle | None, list[Finding]]:
    """Return an adapter's own bundle, None where it is the base's, and all that is wrong.

    `files` holds contents by name, as `read` gives them; `num_added_tokens` is how many embedding
    rows the weights bring beyond the base model's. Where there are findings there is no bundle.
    """
    parsed, findings = _parse(files)
    template, problems = _template(files, parsed)
    findings += problems
    specials = _specials(parsed, base)
    tokenizer, problems = _tokenizer(parsed, base, specials, num_added_tokens=num_added_tokens)
    findings += problems
    defaults, eos_ids, problems = _generation(parsed.get(GENERATION_FILE, {}), base)
    findings += problems
    if findings:
        return None, findings
    own_eos = tokenizer.eos_token_id if tokenizer else None
    own = TextBundle(
        tokenizer_json=tokenizer.json if tokenizer else base.tokenizer_json,
        chat_template=base.chat_template if template is None else template,
        special_tokens=specials,
        # Those of the base model always end an answer; an adapter may add to them.
        eos_token_ids=_unique([*base.eos_token_ids, *eos_ids, own_eos]),
        generation_defaults=defaults,
        context_length=base.context_length,
        vocab_size=base.vocab_size + num_added_tokens,
        pooling=base.pooling,
    )
    own = _without_idle_names(own, base)
    outside = [each for each in own.eos_token_ids if not 0 <= each < own.vocab_size]
    if outside:
        problem = f"names {outside[0]}, which is no token's id"
        return None, [_finding("eos_unknown", GENERATION_FILE, problem)]
    return (None if own == base else own), []


def chat_template(
    files: Mapping[str, bytes], base: TextBundle
) -> tuple[str | None, dict[str, str]]:
    """Return the template that these files bring, and the special tokens that it would see.

    None where they bring none that can be read, or the base model's.
    """
    parsed, _ = _parse({name: data for name, data in files.items() if name != TOKENIZER_FILE})
    template, _ = _template(files, parsed)
    return None if template == base.chat_template else template, _specials(parsed, base)


# Files.


def _parse(files: Mapping[str, bytes]) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    parsed: dict[str, dict[str, Any]] = {}
    findings = []
    for name, data in files.items():
        if not name.endswith(".json") or name not in MAX_FILE_BYTES:
            continue
        try:
            parsed[name] = _object(data)
        except (ValueError, RecursionError) as error:
            problem = f"is not a JSON object: {str(error)[:200] or 'it is nested too deep'}"
            findings.append(_finding("text_file_unreadable", name, problem))
    return parsed, findings


def _object(data: bytes) -> dict[str, Any]:
    fields = json.loads(data, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    # Half a surrogate pair can be written in JSON, and is no text.
    json.dumps(fields, ensure_ascii=False).encode()
    if not isinstance(fields, dict):
        raise ValueError("it is another value")
    return fields


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("the same key appears twice in one object")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


# The template.


def _template(
    files: Mapping[str, bytes], parsed: Mapping[str, dict[str, Any]]
) -> tuple[str | None, list[Finding]]:
    """The template that transformers would take, None where the files bring none."""
    where, value = _template_source(files, parsed)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return None, [_finding("template_invalid", where, f"is not UTF-8: {error}")]
    if isinstance(value, list):
        value = _named_template(value)
    if value is None:
        return None, []
    if not isinstance(value, str):
        return None, [_finding("template_invalid", where, "is neither text nor named texts")]
    if len(value) > MAX_TEMPLATE_CHARACTERS:
        problem = f"has {len(value)} characters, above the limit of {MAX_TEMPLATE_CHARACTERS}"
        return None, [_finding("template_too_large", where, problem)]
    # As Python reads text files.
    return value.replace("\r\n", "\n").replace("\r", "\n"), []


def _template_source(
    files: Mapping[str, bytes], parsed: Mapping[str, dict[str, Any]]
) -> tuple[str, Any]:
    if TEMPLATE_FILE in files:
        return TEMPLATE_FILE, files[TEMPLATE_FILE]
    for name in (CONFIG_FILE, OLD_TEMPLATE_FILE):
        value = parsed.get(name, {}).get("chat_template")
        if value is not None:
            return f"{name}: chat_template", value
    return TEMPLATE_FILE, None


def _named_template(entries: list[Any]) -> Any:
    """Of several the one named "default"; what is not a list of names and texts is refused."""
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("template"), str):
            return entries
        if entry.get("name") == "default":
            return entry["template"]
    return None


# Special tokens.


def _specials(parsed: Mapping[str, dict[str, Any]], base: TextBundle) -> dict[str, str]:
    """The names that templates see: the base's, and over them what the adapter says."""
    config = parsed.get(CONFIG_FILE, {})
    named = {name: value for name, value in config.items() if _is_name(name)}
    # As transformers does: the older file counts where the newer way of telling is not used.
    if "added_tokens_decoder" not in config:
        older = parsed.get(SPECIALS_FILE, {})
        named |= {name: value for name, value in older.items() if _is_name(name)}
    specials = dict(base.special_tokens)
    for name, value in named.items():
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and len(content) <= tokenizer_json.MAX_TOKEN_CHARACTERS:
            specials[name] = content
        elif content is None:
            specials.pop(name, None)
    return specials


def _is_name(name: str) -> bool:
    return name.removesuffix("_token") in _NAMED_TOKENS and name.endswith("_token")


def _without_idle_names(own: TextBundle, base: TextBundle) -> TextBundle:
    """Keep the base's names where no template reads the others: trainers choose a padding token."""
    template = own.chat_template or ""
    names = {*own.special_tokens, *base.special_tokens}
    specials = {
        name: source[name]
        for name in names
        if name in (source := own.special_tokens if name in template else base.special_tokens)
    }
    return msgspec.structs.replace(own, special_tokens=specials)


# The tokenizer.


@dataclass(frozen=True, slots=True)
class _OwnTokenizer:
    """A tokenizer that was checked and tried."""

    # The base's own bytes where it says the same.
    json: bytes
    # None where the adapter names none.
    eos_token_id: int | None


def _tokenizer(
    parsed: Mapping[str, dict[str, Any]],
    base: TextBundle,
    specials: Mapping[str, str],
    *,
    num_added_tokens: int,
) -> tuple[_OwnTokenizer | None, list[Finding]]:
    base_fields = json.loads(base.tokenizer_json)
    fields = parsed.get(TOKENIZER_FILE)
    num_rows = base.vocab_size + num_added_tokens
    if fields is None:
        if TOKENIZER_FILE in parsed:
            return None, []
        fields = base_fields
        if num_added_tokens:
            return None, [_missing(f"the weights bring {num_added_tokens} rows for added tokens")]
    else:
        # How a trainer batched its texts does not matter here.
        fields |= {"truncation": None, "padding": None}
        try:
            findings = tokenizer_json.check(fields, base_fields, num_rows=num_rows)
        except RecursionError:
            findings = [_finding("text_file_unreadable", TOKENIZER_FILE, "is nested too deep")]
        if findings:
            return None, findings
    findings = _listed_tokens(parsed, tokenizer_json.vocabulary(fields))
    if findings:
        return None, findings
    return _run(fields, base, base_fields, specials, num_rows=num_rows)


def _listed_tokens(parsed: Mapping[str, dict[str, Any]], own: Mapping[str, int]) -> list[Finding]:
    """The other files name added tokens too: they must mean the same."""
    listed: list[tuple[str, Any, Any]] = [
        (ADDED_TOKENS_FILE, token, token_id)
        for token, token_id in parsed.get(ADDED_TOKENS_FILE, {}).items()
    ]
    decoder = parsed.get(CONFIG_FILE, {}).get("added_tokens_decoder")
    for token_id, token in decoder.items() if isinstance(decoder, dict) else ():
        content = token.get("content") if isinstance(token, dict) else None
        listed.append((CONFIG_FILE, content, int(token_id) if token_id.isdecimal() else token_id))
    differing = [entry for entry in listed if own.get(str(entry[1])) != entry[2]]
    return [
        _finding(
            "added_tokens_differ",
            f"{name}: {str(token)[:100]!r}",
            f"has id {str(token_id)[:20]}, and {own.get(str(token))} in the tokenizer",
            fix=f"upload the {TOKENIZER_FILE} that belongs to this file",
        )
        for name, token, token_id in differing[: tokenizer_json.MAX_FINDINGS]
    ]


def _run(
    fields: Mapping[str, Any],
    base: TextBundle,
    base_fields: Mapping[str, Any],
    specials: Mapping[str, str],
    *,
    num_rows: int,
) -> tuple[_OwnTokenizer | None, list[Finding]]:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.canonical(fields))
        _complete(tokenizer, specials)
    except Exception as error:  # the library raises no narrower one
        problem = f"is not taken by the tokenizers library: {str(error)[:300]}"
        return None, [_finding("tokenizer_invalid", TOKENIZER_FILE, problem)]
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    findings = _moved_by_loading(vocab, tokenizer_json.vocabulary(fields), num_rows=num_rows)
    text = tokenizer.to_str()
    is_base = json.loads(text) == {**base_fields, "truncation": None, "padding": None}
    if not findings and not is_base:
        findings = _try(tokenizer, num_rows=num_rows)
    if findings:
        return None, findings
    eos = specials.get("eos_token")
    is_named = eos is not None and eos != base.special_tokens.get("eos_token")
    return _OwnTokenizer(
        json=base.tokenizer_json if is_base else text.encode(),
        eos_token_id=vocab.get(eos) if eos is not None and is_named else None,
    ), []


def _complete(tokenizer: Tokenizer, specials: Mapping[str, str]) -> None:
    """What transformers adds to a tokenizer when it loads one."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.post_processor is None:
        tokenizer.post_processor = TemplateProcessing(
            single="$A:0", pair="$A:0 $B:1", special_tokens=[]
        )
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = _unique([token for token in specials.values() if token not in known])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in missing]
    )


def _moved_by_loading(
    vocab: Mapping[str, int], expected: Mapping[str, int], *, num_rows: int
) -> list[Finding]:
    """The library gives added tokens the next free ids, whatever the file says."""
    moved = [token for token, token_id in expected.items() if vocab.get(token) != token_id]
    beyond = [token for token, token_id in vocab.items() if token_id >= num_rows]
    findings = [
        _finding("token_id_gap", TOKENIZER_FILE, f"the token {token[:100]!r} gets another id")
        for token in moved[:1]
    ]
    return findings + [
        _finding(
            "token_without_row",
            TOKENIZER_FILE,
            f"the token {token[:100]!r} has id {vocab[token]}, and there are {num_rows} rows",
            fix="resize the embeddings before training and save them, or remove the token",
        )
        for token in beyond[:1]
    ]


def _try(tokenizer: Tokenizer, *, num_rows: int) -> list[Finding]:
    """Encode and decode fixed texts, and one of all added tokens."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for text in (*TRIAL_TEXTS, " ".join(added[:10_000])):
        try:
            problem = _trial_problem(tokenizer, text, num_rows=num_rows)
        except Exception as error:  # the library raises no narrower one
            problem = f"fails: {str(error)[:300]}"
        if problem:
            return [_finding("tokenizer_fails", TOKENIZER_FILE, f"on {text[:30]!r} it {problem}")]
    return []


def _trial_problem(tokenizer: Tokenizer, text: str, *, num_rows: int) -> str | None:
    most = _MAX_TOKENS_PER_BYTE * len(text.encode()) + 2 * tokenizer_json.MAX_PARTS
    for special in (False, True):
        ids = tokenizer.encode(text, add_special_tokens=special).ids
        if len(ids) > most:
            return f"makes {len(ids)} tokens of {len(text)} characters"
        if max(ids, default=0) >= num_rows:
            return f"makes id {max(ids)}, and there are {num_rows} embedding rows"
    tokenizer.decode(ids, skip_special_tokens=True)
    stream = DecodeStream(skip_special_tokens=True)
    for token_id in ids[:2000]:
        stream.step(tokenizer, token_id)
    return None


# Generation settings.


def _generation(
    fields: Mapping[str, Any], base: TextBundle
) -> tuple[dict[str, float | int], list[int], list[Finding]]:
    """The base's sampling defaults with the adapter's over them, and ids that end an answer."""
    defaults = dict(base.generation_defaults)
    findings = []
    for name, (lowest, highest) in _SAMPLING.items():
        value = fields.get(name)
        if value is None:
            continue
        kind = int if name == "top_k" else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not lowest <= value <= highest:
            problem = f"`{name}` is no number between {lowest} and {highest}"
            findings.append(_finding("generation_invalid", GENERATION_FILE, problem))
        else:
            defaults[name] = value
    eos = fields.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if len(ids) > 64 or not all(type(each) is int for each in ids):
        problem = "`eos_token_id` is neither an id nor a list of some"
        findings.append(_finding("generation_invalid", GENERATION_FILE, problem))
        ids = []
    return defaults, ids, findings


def _unique(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(value for value in values if value is not None))


def _missing(why: str) -> Finding:
    return _finding(
        "tokenizer_missing",
        TOKENIZER_FILE,
        f"is missing: {why}",
        fix=f"upload the {TOKENIZER_FILE} that `tokenizer.save_pretrained` wrote",
    )


def _finding(code: str, where: str, message: str, *, fix: str | None = None) -> Finding:
    return Finding(
        code=code,
        where=where,
        message=message,
        fix=fix or f"correct {where.split(':')[0]}, or leave it out to use the base model's",
    )
