"""How the gateway says things over HTTP: error bodies for both planes.

`/v1` speaks OpenAI's error object, everything else RFC 9457 problem documents. Decides nothing.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException, ValidationException

from adapters.errors import Finding
from gateway.database import is_away
from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    InvalidRequest,
    LimitReached,
    NotFound,
    RejectedUpload,
    Unavailable,
    UnknownField,
)

logger = logging.getLogger(__name__)

PROBLEM = "application/problem+json"
# How msgspec words the two faults that concern a field by name.
_FIELD_IN_MESSAGE = re.compile(r"(unknown|required) field `(.+?)`")


class OpenAIErrorBody(msgspec.Struct, frozen=True):
    """The inner object of OpenAI's error answer."""

    message: str
    type: str
    param: str | None
    code: str | None
    # Of a 429: which rule, whose, its ceiling, where it stands, when it clears.
    rule: Mapping[str, Any] | msgspec.UnsetType = msgspec.UNSET


class OpenAIError(msgspec.Struct, frozen=True):
    """OpenAI's error answer."""

    error: OpenAIErrorBody


def openai_error(error: GatewayError) -> OpenAIError:
    rule = error.rule if isinstance(error, LimitReached) else None
    return OpenAIError(
        OpenAIErrorBody(error.message, error.type, error.param, error.code, rule or msgspec.UNSET)
    )


class Problem(msgspec.Struct, frozen=True):
    """RFC 9457's problem document, with `code`, `param` and what a program needs to go on."""

    type: str
    title: str
    status: int
    detail: str
    code: str | None
    param: str | msgspec.UnsetType = msgspec.UNSET
    # Of an upload: everything that is wrong with it.
    findings: tuple[Finding, ...] | msgspec.UnsetType = msgspec.UNSET
    # Of a quota.
    limit: int | msgspec.UnsetType = msgspec.UNSET
    used: int | msgspec.UnsetType = msgspec.UNSET
    needed: int | msgspec.UnsetType = msgspec.UNSET
    # Of a range: which file goes on where.
    file: str | msgspec.UnsetType = msgspec.UNSET
    expected_offset: int | msgspec.UnsetType = msgspec.UNSET


def problem_document(error: GatewayError) -> Problem:
    facts: dict[str, Any] = dict(error.facts)
    if error.param is not None:
        facts["param"] = error.param
    if isinstance(error, RejectedUpload):
        facts["findings"] = error.findings
    return Problem(
        type=f"urn:manylora:error:{error.code or error.type}",
        title=(type(error).__doc__ or "").strip(),
        status=error.status,
        detail=error.message,
        code=error.code,
        **facts,
    )


def is_openai(path: str) -> bool:
    """Whether this is the plane that OpenAI's clients speak with."""
    return path.startswith("/v1/")


def answer_error(request: Request[Any, Any, Any], error: GatewayError) -> Response[Any]:
    """Answer in the words of the plane that was called."""
    if is_openai(request.url.path):
        return Response(
            openai_error(error),
            status_code=error.status,
            headers=error.headers,
            media_type=MediaType.JSON,
        )
    return Response(
        problem_document(error),
        status_code=error.status,
        headers=error.headers,
        media_type=PROBLEM,
    )


def answer_http_exception(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """What Litestar itself refuses: unknown routes, wrong methods, bodies it cannot decode."""
    return answer_error(request, _translate(error))


def answer_unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Our own fault, mostly: logged whole, told in one sentence."""
    if isinstance(error, RecursionError):
        # Decoders are the only code here whose depth a client decides.
        return answer_error(request, InvalidRequest("The JSON is nested too deeply."))
    if is_away(error):
        logger.warning("database_away", extra={"path": request.url.path, "reason": str(error)})
        return answer_error(
            request, Unavailable("The database does not answer. Try again shortly.")
        )
    logger.error("request_failed", exc_info=error, extra={"path": request.url.path})
    return answer_error(request, GatewayError("Something went wrong on our side."))


def _translate(error: HTTPException) -> GatewayError:
    if isinstance(error, ValidationException):
        return _translate_validation(error)
    if error.status_code == 413:
        return BodyTooLarge()
    if error.status_code == 404:
        return NotFound("There is no such route.")
    translated = InvalidRequest(error.detail)
    translated.status = error.status_code
    translated.headers = dict(error.headers or {})
    return translated


def _translate_validation(error: ValidationException) -> InvalidRequest:
    entries = [entry for entry in error.extra or [] if isinstance(entry, dict)]
    if not entries:
        return InvalidRequest(error.detail)
    message, place = str(entries[0].get("message", "")), str(entries[0].get("key", ""))
    # Which key of an object is meant is not told.
    place = "" if place == "data" else place.removesuffix("[...]")
    if found := _FIELD_IN_MESSAGE.search(message):
        param = f"{place}.{found[2]}" if place else found[2]
        if found[1] == "unknown":
            return UnknownField(f"Unknown field '{param}': remove it.", param=param)
        return InvalidRequest(f"Missing field '{param}': it is required.", param=param)
    if not place:
        return InvalidRequest("The body must be a JSON object with this route's fields.")
    return InvalidRequest(f"{place}: {message}", param=place)
