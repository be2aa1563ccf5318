"""The OpenAPI document: what every route takes, and everything that it may answer.

Litestar knows routes and parameters. Bodies are described by msgspec, which reads and writes them,
and refusals by `gateway.errors`, so neither can differ from what is served. A route itself says
what cannot be seen from outside: `also_as` names other media types of its answer, `events` what the
events of its streams are (of several kinds, each is sent under its name), and `refuses` errors
beyond those that its kind of route has.
"""

import types
import typing
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Litestar, Request
from litestar import Router as Routes
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, RedocRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.response import Response, Stream
from litestar.routes import HTTPRoute
from litestar.utils import get_enum_string_value

from gateway.api.sse import EVENTS
from gateway.api.wire import PROBLEM, OpenAIError, Problem, is_openai
from gateway.auth import OPERATOR, PUBLIC
from gateway.errors import (
    BodyTooLarge,
    Conflict,
    EngineFailed,
    GatewayError,
    InvalidKey,
    InvalidRequest,
    LimitReached,
    ModelNotFound,
    NotAllowed,
    NotFound,
    OtherBody,
    Overloaded,
    StillRunning,
    Unavailable,
)

REDOC = "redoc-2.5.4.js"
# Browsers hold the page to it: nothing of it comes from another host, not even an icon.
OFFLINE = (
    "<meta http-equiv='Content-Security-Policy'"
    " content=\"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:\">"
    "<link rel='icon' href='data:,'>"
)
JSON, JSON_LINES = "application/json", "application/jsonl"
_COMPONENT = "#/components/schemas/{name}"
_REQUEST_ID = {
    "description": "What to ask about this answer by.",
    "required": True,
    "schema": {"type": "string"},
}
# What other headers say, where there is something to say.
_OF_LIMITS = {
    f"x-ratelimit-{what}-{kind}": f"{says} of {kind}."
    for what, says in (
        ("limit", "The ceiling"),
        ("remaining", "What is left"),
        ("reset", "How long until all is there again"),
    )
    for kind in ("requests", "tokens")
}
_OF_GENERATIONS = _OF_LIMITS | {
    "x-adapter-version": "Which version of the adapter answered.",
    "x-adapter-digest": "The digest of what answered.",
    "x-cost-nano": "What a whole answer cost, in nano-USD.",
    "idempotent-replayed": "`true` where this answer was given before.",
}
_OF_REFUSALS_FOR_NOW = _OF_LIMITS | {
    "retry-after": "In how many seconds to try again.",
    "retry-after-ms": "The same in milliseconds.",
    "x-should-retry": "`false` where trying again does not help.",
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "With the same one and the same body, the same answer, once billed.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}

Document = dict[str, Any]


def document_of(app: Litestar) -> Document:
    """The document of all routes of an application that are meant to be seen."""
    document: Document = app.openapi_schema.to_schema()
    shown = [
        (document["paths"][route.path_format][method.lower()], handler)
        for route in app.routes
        if isinstance(route, HTTPRoute)
        for method, (handler, _) in route.route_handler_map.items()
        if handler.resolve_include_in_schema() and method != "OPTIONS"
    ]
    bodies = list(dict.fromkeys(kind for _, handler in shown for kind in _kinds(handler)))
    references, components = msgspec.json.schema_components(bodies, ref_template=_COMPONENT)
    document["components"]["schemas"] = components
    schemas = dict(zip(bodies, references, strict=True))
    for operation, handler in shown:
        _complete(operation, handler, schemas)
    return document


def _complete(operation: Document, handler: HTTPRouteHandler, schemas: Mapping[Any, Any]) -> None:
    operation["responses"] = _answers(handler, schemas) | _refusals(handler, operation, schemas)
    if (body := _body(handler)) is not None:
        operation["requestBody"]["content"] = {JSON: {"schema": schemas[body]}}
    if _is_generation(handler):
        operation.setdefault("parameters", []).append(_IDEMPOTENCY_KEY)
    if handler.opt["scope"] == PUBLIC:
        operation["security"] = []


def _kinds(handler: HTTPRouteHandler) -> Iterator[Any]:
    """Every type that is read or written by a route, refusals too."""
    yield from (kind for kind in (_body(handler), _answer(handler)) if kind is not None)
    yield from (each.data_container for each in (handler.responses or {}).values())
    yield from (kind for kind in (handler.opt.get("events"),) if kind is not None)
    yield _error_body(handler)


def _body(handler: HTTPRouteHandler) -> Any:
    """What the route reads as JSON; None where it reads none, or something else."""
    found = handler.parsed_fn_signature.parameters.get("data")
    return None if found is None else found.annotation


def _answer(handler: HTTPRouteHandler) -> Any:
    """What the route writes where all is well; None where that is nothing.

    A route that streams says it by `responses`; other notations of the same have no type.
    """
    returned = handler.parsed_fn_signature.return_type.annotation
    arms = typing.get_args(returned) if _is_union(returned) else (returned,)
    bodies = [
        inner
        for arm in arms
        if arm is not Stream and arm is not None and arm is not types.NoneType
        for inner in (typing.get_args(arm) if typing.get_origin(arm) is Response else (arm,))
    ]
    if not bodies:
        spec = (handler.responses or {}).get(handler.status_code)
        return None if spec is None else spec.data_container
    [body] = bodies
    if _is_union(body) and "also_as" in handler.opt:
        [body] = (arm for arm in typing.get_args(body) if arm is not str)
    return body


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def _answers(handler: HTTPRouteHandler, schemas: Mapping[Any, Any]) -> Document:
    kind, also_as = _answer(handler), handler.opt.get("also_as", ())
    media = _media_type(handler)
    contents = {} if kind is None else {media: {"schema": _schema(kind, media, schemas)}}
    contents |= {each: {"schema": _schema(bytes, each, schemas)} for each in also_as}
    if (event := handler.opt.get("events")) is not None:
        contents[EVENTS] = {"schema": _event(event, schemas)}
    phrase = HTTPStatus(handler.status_code).phrase
    told = _OF_GENERATIONS if _is_generation(handler) else {}
    answers = {handler.status_code: _response(phrase, contents, told)}
    for status, spec in (handler.responses or {}).items():
        if status != handler.status_code:
            kind, media = spec.data_container, get_enum_string_value(spec.media_type)
            content = {media: {"schema": _schema(kind, media, schemas)}}
            answers[status] = _response(spec.description, content)
    return {str(status): answer for status, answer in answers.items()}


def _media_type(handler: HTTPRouteHandler) -> str:
    spec = (handler.responses or {}).get(handler.status_code)
    named = handler.media_type or JSON if spec is None else spec.media_type
    return get_enum_string_value(named)


def _schema(kind: Any, media_type: str, schemas: Mapping[Any, Any]) -> Document:
    if kind not in (str, bytes) or media_type == JSON:
        schema: Document = schemas[kind]
        return schema
    is_text = media_type.startswith("text/") or media_type == JSON_LINES
    return {"type": "string"} if is_text else {"type": "string", "format": "binary"}


def _event(kind: Any, schemas: Mapping[Any, Any]) -> Document:
    """One of a stream: before OpenAPI 3.2 that is what the schema of a stream describes."""
    return _named_event(kind, schemas) if _is_union(kind) else _plain_event(kind, schemas)


def _plain_event(kind: Any, schemas: Mapping[Any, Any]) -> Document:
    said = {"anyOf": [schemas[kind], schemas[OpenAIError]]}
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": said}
    data["description"] = "Of the last one: [DONE], or the error that ended the stream."
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _named_event(kinds: Any, schemas: Mapping[Any, Any]) -> Document:
    tags = [kind.__struct_config__.tag for kind in typing.get_args(kinds)]
    name = {"type": "string", "enum": tags, "description": "The `type` of its data."}
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": schemas[kinds]}
    properties = {"event": name, "data": data}
    return {"type": "object", "properties": properties, "required": list(properties)}


def _response(
    description: str, content: Document, told: Mapping[str, str] = types.MappingProxyType({})
) -> Document:
    optional = {
        name: {"description": says, "schema": {"type": "string"}} for name, says in told.items()
    }
    headers = {"x-request-id": _REQUEST_ID, **optional}
    response: Document = {"description": description, "headers": headers}
    return {**response, "content": content} if content else response


def _refusals(
    handler: HTTPRouteHandler, operation: Document, schemas: Mapping[Any, Any]
) -> Document:
    """By status; the errors' own docstrings say why."""
    by_status: dict[int, dict[str, None]] = defaultdict(dict)
    for error in _errors(handler, operation):
        by_status[error.status][(error.__doc__ or "").strip()] = None
    kind = _error_body(handler)
    media = JSON if kind is OpenAIError else PROBLEM
    return {
        str(status): _response(
            " ".join(reasons),
            {media: {"schema": schemas[kind]}},
            _OF_REFUSALS_FOR_NOW if status in (409, 429, 503) else {},
        )
        for status, reasons in sorted(by_status.items())
        if status not in (handler.responses or {})
    }


def _error_body(handler: HTTPRouteHandler) -> type[msgspec.Struct]:
    return OpenAIError if all(map(is_openai, handler.paths)) else Problem


def _errors(handler: HTTPRouteHandler, operation: Document) -> Iterable[type[GatewayError]]:
    places = {each["in"] for each in operation.get("parameters", [])}
    has_body, scope = "requestBody" in operation, handler.opt["scope"]
    yield from (GatewayError, Unavailable)
    if scope != PUBLIC:
        yield from (InvalidKey, NotAllowed, LimitReached)
    if has_body or places:
        yield InvalidRequest
    if has_body:
        yield BodyTooLarge
    if "path" in places or (scope == OPERATOR and (has_body or places)):
        yield NotFound
    if scope == "inference":
        yield ModelNotFound
    elif handler.http_methods != {"GET"}:
        yield Conflict
    if _is_generation(handler):
        yield from (StillRunning, OtherBody, EngineFailed, Overloaded)
    yield from handler.opt.get("refuses", ())


def _is_generation(handler: HTTPRouteHandler) -> bool:
    return "desk" in handler.parsed_fn_signature.parameters


class _Page(RedocRenderPlugin):
    """The document for people, served without any other host."""

    def __init__(self) -> None:
        super().__init__(js_url=f"/static/{REDOC}", google_fonts=False, favicon=OFFLINE)

    def render(self, request: Request[Any, Any, Any], openapi_schema: Document) -> bytes:
        return super().render(request, _kept(request.app))


class _File(JsonRenderPlugin):
    def render(self, request: Request[Any, Any, Any], openapi_schema: Document) -> bytes:
        return self.render_json(request, _kept(request.app))


def _kept(app: Litestar) -> Document:
    """Made when it is asked for the first time: it takes longer than the rest of the start."""
    if "document" not in app.state:
        app.state.document = document_of(app)
    document: Document = app.state.document
    return document


def openapi_config() -> OpenAPIConfig:
    """Where the document is served, and what is said of the whole."""
    return OpenAPIConfig(
        title="Manylora",
        version="1",
        description="LoRA fine-tunes of a few base models, served to many tenants.",
        path="/docs",
        render_plugins=[_Page(), _File()],
        openapi_router=Routes(
            "/docs", route_handlers=[], opt={"scope": PUBLIC}, include_in_schema=False
        ),
        components=Components(
            security_schemes={"key": SecurityScheme(type="http", scheme="bearer")}
        ),
        security=[{"key": []}],
    )
