"""A hundred JSON schemas of the kinds that JSON-Schema-Test-Suite has, each with finite answers.

Strings, arrays and numbers have bounds, so that whatever is sampled ends. Beside them schemas that
must be refused: some for a keyword, some because they are bombs.
"""

from typing import Any

Schema = dict[str, Any]

WORD: Schema = {"type": "string", "pattern": "^[a-z]{1,8}$"}
SMALL: Schema = {"type": "integer", "minimum": 0, "maximum": 99}
FLAG: Schema = {"type": "boolean"}


def an_object(
    properties: dict[str, Any], *, required: list[str] | None = None, **rest: Any
) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
        **rest,
    }


def an_array(items: Schema, *, least: int = 0, most: int = 3, **rest: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most, **rest}


def with_definitions(root: Schema, /, **definitions: Schema) -> Schema:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": definitions, **root}


def ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _nested(depth: int) -> Schema:
    return an_object({"inner": _nested(depth - 1)} if depth else {"leaf": SMALL})


_TYPES: dict[str, Schema] = {
    "null": {"type": "null"},
    "boolean": FLAG,
    "small integer": SMALL,
    "negative integer": {"type": "integer", "minimum": -500, "maximum": -1},
    "exclusive integer": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 7},
    "large integer": {"type": "integer", "minimum": 10**9, "maximum": 10**12},
    "integer across zero": {"type": "integer", "minimum": -17, "maximum": 1234},
    "even integer": {"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 1000},
    "multiple of seven": {"type": "integer", "multipleOf": 7, "minimum": 7, "maximum": 700},
    "one integer alone": {"type": "integer", "minimum": 5, "maximum": 5},
    # Without a step a small model may go on with digits for as long as it is let.
    "number": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    "number with fractions": {"type": "number", "minimum": -2.5, "maximum": 17}
    | {"multipleOf": 0.5},
    "exclusive number": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 10}
    | {"multipleOf": 0.125},
    "word": WORD,
    "short string": {"type": "string", "maxLength": 10},
    "string of one length": {"type": "string", "minLength": 4, "maxLength": 4},
    "string with a least length": {"type": "string", "minLength": 3, "maxLength": 12},
    "empty string": {"type": "string", "maxLength": 0},
    "two types": {"type": ["integer", "null"], "minimum": 1, "maximum": 9},
    "three types": {"type": ["string", "boolean", "null"], "maxLength": 5},
    "empty object": an_object({}),
    "empty array": an_array(SMALL, most=0),
}

_ENUMS: dict[str, Schema] = {
    "enum of words": {"enum": ["red", "green", "blue"]},
    "enum of numbers": {"enum": [1, 2.5, -3]},
    "enum of all kinds": {"enum": ["a", 1, None, True, [1, 2], {"x": "y"}]},
    "enum with one prefix": {"enum": ["a", "ab", "abc", "abcd"]},
    "enum with escapes": {"enum": ['say "hi"', "back\\slash", "new\nline", "tab\t"]},
    "enum beyond ASCII": {"enum": ["größe", "naïve", "日本", "🙂", "Ω"]},
    "enum with a type": {"type": "string", "enum": ["yes", "no"]},
    "large enum": {"enum": [f"choice {number}" for number in range(300)]},
    "constant string": {"const": "fixed"},
    "constant number": {"const": 42},
    "constant object": {"const": {"a": [1, {"b": None}]}},
    "constant null": {"const": None},
    "enum of one": {"enum": [False]},
}

_PATTERNS: dict[str, Schema] = {
    "date by pattern": {"type": "string", "pattern": "^\\d{4}-\\d{2}-\\d{2}$"},
    "anchored pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{1,4}$"},
    "pattern with choices": {"type": "string", "pattern": "^(cat|dog|bird)s?$"},
    "pattern and length": {"type": "string", "pattern": "^[ab]*$", "minLength": 2, "maxLength": 6},
    "pattern in the middle": {"type": "string", "pattern": "[0-9]{2}", "maxLength": 8},
    "pattern with a quote": {"type": "string", "pattern": '^"[a-z]{1,3}"$'},
    "pattern with a backslash": {"type": "string", "pattern": "^\\\\[a-z]{1,3}$"},
    "pattern with classes": {"type": "string", "pattern": "^\\w{1,6}\\s\\w{1,6}$"},
    "pattern beyond ASCII": {"type": "string", "pattern": "^[äöü]{1,4}$"},
    "telephone": {"type": "string", "pattern": "^(\\([0-9]{3}\\))?[0-9]{3}-[0-9]{4}$"},
    "hexadecimal": {"type": "string", "pattern": "^#([0-9a-f]{3}|[0-9a-f]{6})$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time", "maxLength": 20},
    "date and time": {"type": "string", "format": "date-time", "maxLength": 30},
    "UUID": {"type": "string", "format": "uuid"},
    "IPv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email", "maxLength": 30},
    "optional pattern": an_object({"id": {"type": "string", "pattern": "^x\\d+$", "maxLength": 5}}),
}

_ARRAYS: dict[str, Schema] = {
    "array of words": an_array(WORD),
    "array of two to four": an_array(SMALL, least=2, most=4),
    "array of exactly three": an_array(FLAG, least=3),
    "array of arrays": an_array(an_array(SMALL, most=2), most=2),
    "array of objects": an_array(an_object({"n": SMALL}), least=1),
    "tuple": {"type": "array", "prefixItems": [WORD, SMALL, FLAG], "items": False, "minItems": 3},
    "tuple of at least one": {"type": "array", "prefixItems": [WORD, SMALL], "items": False}
    | {"minItems": 1},
    "tuple with a tail": {"type": "array", "prefixItems": [WORD], "items": SMALL}
    | {"minItems": 2, "maxItems": 4},
    "tuple of old": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array"}
    | {"items": [WORD, SMALL], "additionalItems": False, "minItems": 2},
    "array of enums": an_array({"enum": ["n", "e", "s", "w"]}, least=1, most=5),
    "array of unions": an_array({"anyOf": [WORD, SMALL, {"type": "null"}]}, least=2),
    "array that says it may repeat": an_array(SMALL, uniqueItems=False),
}

_OBJECTS: dict[str, Schema] = {
    "person": an_object({"name": WORD, "age": SMALL, "active": FLAG}),
    "optional properties": an_object({"a": SMALL, "b": WORD, "c": FLAG}, required=["b"]),
    "all optional": an_object({"a": SMALL, "b": SMALL, "c": SMALL}, required=[]),
    "names that need escapes": an_object({'a "b"': SMALL, "c\\d": SMALL, "e f": SMALL, "": FLAG}),
    "names like keywords": an_object({"type": WORD, "title": SMALL, "$ref": FLAG, "enum": SMALL}),
    "names beyond ASCII": an_object({"größe": SMALL, "名前": WORD}),
    "two deep": _nested(2),
    "eight deep": _nested(8),
    "map of two patterns": {"type": "object", "additionalProperties": False, "maxProperties": 2}
    | {"patternProperties": {"^n[0-9]$": SMALL, "^w[a-c]{1,2}$": WORD}},
    "map of patterns": {"type": "object", "patternProperties": {"^k[0-9]$": SMALL}}
    | {"additionalProperties": False, "minProperties": 1, "maxProperties": 3},
    "many properties": an_object({f"p{number}": SMALL for number in range(12)}),
    "many optional properties": an_object({f"p{n}": FLAG for n in range(12)}, required=["p11"]),
    "annotated": an_object({"x": SMALL | {"title": "X", "description": "an x", "default": 3}})
    | {"title": "T", "description": "D", "examples": [{"x": 1}], "deprecated": True},
    "order": an_object({"lines": an_array(an_object({"sku": WORD, "quantity": SMALL}), least=1)})
    | {"$comment": "as shops have them"},
    "required beyond what is listed": {"type": "object", "properties": {"a": SMALL}}
    | {"required": ["a", "b"], "additionalProperties": FLAG, "maxProperties": 2},
    "constant within": an_object({"kind": {"const": "circle"}, "radius": SMALL}),
}

_UNIONS: dict[str, Schema] = {
    "any of types": {"anyOf": [WORD, SMALL]},
    "any of objects": {"anyOf": [an_object({"a": SMALL}), an_object({"b": WORD})]},
    "one of by constant": {
        "oneOf": [
            an_object({"kind": {"const": "circle"}, "radius": SMALL}),
            an_object({"kind": {"const": "square"}, "side": SMALL}),
        ],
        "discriminator": {"propertyName": "kind"},
    },
    "one of types": {"oneOf": [WORD, SMALL, FLAG]},
    "nullable object": {"anyOf": [an_object({"a": SMALL}), {"type": "null"}]},
    "all of bounds": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    "all of objects": {
        "allOf": [
            {"type": "object", "properties": {"a": SMALL}, "required": ["a"]},
            {"properties": {"b": WORD}, "required": ["b"]},
        ],
        "properties": {"a": True, "b": True},
        "additionalProperties": False,
    },
    "all of patterns": {
        "allOf": [
            {"type": "string", "pattern": "^[a-f]+$"},
            {"pattern": "e", "maxLength": 6},
        ]
    },
    "any of beside properties": an_object(
        {"a": SMALL, "b": WORD}, required=[], anyOf=[{"required": ["a"]}, {"required": ["b"]}]
    ),
    "any of any of": {"anyOf": [{"anyOf": [WORD, FLAG]}, {"anyOf": [SMALL, {"type": "null"}]}]},
    "union within": an_object({"value": {"anyOf": [SMALL, an_array(SMALL), {"const": "none"}]}}),
}

_LEAF = an_object({"value": SMALL})
_REFERENCES: dict[str, Schema] = {
    "reference": with_definitions(ref("word"), word=WORD),
    "reference twice": with_definitions(an_object({"a": ref("n"), "b": ref("n")}), n=SMALL),
    "reference to a reference": with_definitions(ref("a"), a=ref("b"), b=ref("c"), c=SMALL),
    "reference with a sibling": with_definitions(
        {**ref("text"), "maxLength": 3}, text={"type": "string"}
    ),
    "old definitions": {
        "definitions": {"n": SMALL},
        **an_object({"n": {"$ref": "#/definitions/n"}}),
    },
    "reference by an escaped pointer": {
        "$defs": {"a/b": SMALL, "c~d": WORD},
        **an_array({"$ref": "#/$defs/a~1b"}, least=1),
    },
    "reference to a property": an_object({"a": SMALL, "b": {"$ref": "#/properties/a"}}),
    "references in a union": with_definitions({"anyOf": [ref("w"), ref("n")]}, w=WORD, n=SMALL),
    "tree two deep": with_definitions(
        ref("root"),
        root=an_object({"children": an_array(ref("leaf"), most=2)}),
        leaf=_LEAF,
    ),
    "reference in an array": with_definitions(an_array(ref("leaf"), least=1), leaf=_LEAF),
    "list that may end": with_definitions(
        ref("node"),
        node=an_object({"n": SMALL, "next": {"anyOf": [{"type": "null"}, ref("last")]}}),
        last=_LEAF,
    ),
}

SCHEMAS: dict[str, Schema] = {
    **_TYPES,
    **_ENUMS,
    **_PATTERNS,
    **_ARRAYS,
    **_OBJECTS,
    **_UNIONS,
    **_REFERENCES,
}

# Keyword -> a schema that has it, and would be answered wrongly without it.
UNSUPPORTED: dict[str, Schema] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 3}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": SMALL},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "dependencies": {"type": "object", "dependencies": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "contentEncoding": {"type": "string", "contentEncoding": "base64"},
    "nullable": {"type": "string", "nullable": True},
    "$dynamicRef": {"$dynamicRef": "#node"},
    "x-guidance": {"type": "object", "x-guidance": {"lenient": True}},
    "propertys": {"type": "object", "propertys": {"a": SMALL}},
}

BOMBS: dict[str, Schema] = {
    "multiples": {"type": "integer", "multipleOf": 999983},
    "exponential union": {
        "allOf": [
            {"anyOf": [{"type": "object", "required": [f"a{i}{j}"]} for j in range(4)]}
            for i in range(6)
        ]
    },
    "thousands of properties": an_object({f"p{number}": SMALL for number in range(3000)}),
    "huge enum": {"enum": [f"{number:09}" for number in range(12_000)]},
    "deep nesting": _nested(100),
    "ten megabytes": {"const": "x" * 10_000_000},
    "no way out": {"$ref": "#"},
}
