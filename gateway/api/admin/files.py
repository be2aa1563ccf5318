"""What was uploaded as a version, for operators: its files, and the certificate of its probe."""

from typing import Any, Literal

import msgspec
from litestar import MediaType, Request, Response, get
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.params import FromPath, FromQuery
from litestar.response import Stream

from gateway.api.admin.adapters import TAGS
from gateway.api.usage import refuse_unknown
from gateway.certificate import Certificate, certify, to_html, to_text
from gateway.errors import RangeNotSatisfiable
from gateway.registry import Registry
from gateway.source_files import Part, SourceFiles

VERSION = "/tenants/{tenant:str}/adapters/{adapter:str}/versions/{number:int}"
BYTES = "application/octet-stream"
WHOLE = ResponseSpec(bytes, media_type=BYTES, description="The file.")
RANGE = ResponseSpec(bytes, media_type=BYTES, description="The range.")
# A page of ours that says what strangers wrote loads nothing and runs nothing.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

Format = Literal["json", "text", "html"]


class SourceFileView(msgspec.Struct, frozen=True):
    """A file as it was uploaded."""

    name: str
    size_bytes: int
    sha256: str


class SourceFileList(msgspec.Struct, frozen=True):
    """What a version was uploaded as, by name."""

    data: list[SourceFileView]


@get(
    VERSION + "/files",
    scope="operator",
    tags=TAGS,
    summary="List the files that a version was uploaded as",
    description=(
        "Those that are part of it: of an archive its members, without what was left aside. 404"
        " where it was purged or refused."
    ),
)
async def list_files(
    tenant: FromPath[str],
    adapter: FromPath[str],
    number: FromPath[int],
    source_files: NamedDependency[SourceFiles],
) -> SourceFileList:
    files = await source_files.list(tenant, adapter, number)
    return SourceFileList([SourceFileView(f.name, f.size_bytes, f.sha256) for f in files])


@get(
    VERSION + "/files/{file:str}",
    scope="operator",
    tags=TAGS,
    summary="Have a file of a version back",
    description="Bit for bit; `ETag` is its SHA-256. One `Range` at a time is answered with 206.",
    media_type=BYTES,
    refuses=(RangeNotSatisfiable,),
    responses={200: WHOLE, 206: RANGE},
)
async def get_file(
    tenant: FromPath[str],
    adapter: FromPath[str],
    number: FromPath[int],
    file: FromPath[str],
    request: Request[Any, Any, Any],
    source_files: NamedDependency[SourceFiles],
) -> Stream:
    found = await source_files.find(tenant, adapter, number, file)
    etag = f'"{found.sha256}"'
    is_same = request.headers.get("if-range", etag) == etag
    part = Part.of(request.headers.get("range") if is_same else None, found.size_bytes)
    headers = {"etag": etag, "accept-ranges": "bytes", "content-length": str(found.size_bytes)}
    if part is not None:
        headers["content-length"] = str(part.end - part.begin)
        headers["content-range"] = f"bytes {part.begin}-{part.end - 1}/{found.size_bytes}"
    return Stream(
        source_files.stream(found, part),
        status_code=200 if part is None else 206,
        headers=headers,
        media_type=BYTES,
    )


@get(
    VERSION + "/certificate",
    scope="operator",
    tags=TAGS,
    summary="Show the certificate of a version",
    also_as=("text/plain", "text/html"),
    description=(
        "What the engine's probe of it measured, with what it is and what became of its examples."
        " `format=text` and `format=html` are for printing. 404 where it was not probed yet, or was"
        " purged."
    ),
)
async def get_certificate(
    tenant: FromPath[str],
    adapter: FromPath[str],
    number: FromPath[int],
    request: Request[Any, Any, Any],
    registry: NamedDependency[Registry],
    format: FromQuery[Format] = "json",  # noqa: A002 - its name in the URL
) -> Response[Certificate | str]:
    refuse_unknown(request.query_params, known=("format",))
    certificate = await certify(registry, tenant, adapter, number)
    match format:
        case "json":
            return Response(certificate)
        case "text":
            return Response(to_text(certificate), media_type=MediaType.TEXT)
        case "html":
            return Response(
                to_html(certificate),
                media_type=MediaType.HTML,
                headers={"content-security-policy": PAGE_POLICY},
            )
