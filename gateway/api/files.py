"""/v1/files: what batches are to do and what came of them, for the tenant alone that has them."""

import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, delete, get, post
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIFormat, OpenAPIType
from litestar.params import FromPath, FromQuery, QueryParameter
from litestar.response import Stream

from gateway.api.usage import refuse_unknown
from gateway.auth import Principal
from gateway.errors import NotFound
from gateway.files import FIELDS, Files
from gateway.object_ids import FILE, Page, read_id, spell_id
from gateway.tables import TenantFile

TAGS = ["batches"]
MAX_PAGE = 10_000
Purpose = Literal["batch", "batch_output"]


class FileView(msgspec.Struct, frozen=True):
    """OpenAI's file object."""

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, row: TenantFile) -> "FileView":
        return cls(
            id=spell_id(FILE, row.id),
            bytes=row.size_bytes,
            created_at=int(row.created_at.timestamp()),
            expires_at=int(row.expires_at.timestamp()),
            filename=row.filename,
            purpose=row.purpose,
        )


class FilePage(msgspec.Struct, frozen=True):
    """Files in the order of their making; `last_id` is what `after` takes for the next page."""

    data: list[FileView]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class FileDeleted(msgspec.Struct, frozen=True):
    """OpenAI's word for a file that is gone."""

    id: str
    deleted: bool = True
    object: Literal["file"] = "file"


@dataclass
class FormOperation(Operation):
    """Describes the multipart body, which the handler reads itself, as a stream."""

    def __post_init__(self) -> None:
        parts = {
            "file": Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY),
            "purpose": Schema(type=OpenAPIType.STRING, enum=["batch"]),
            **{name: Schema(type=OpenAPIType.STRING) for name in FIELDS if name != "purpose"},
        }
        schema = Schema(type=OpenAPIType.OBJECT, properties={**parts}, required=["file", "purpose"])
        form = OpenAPIMediaType(schema=schema)
        self.request_body = RequestBody(content={"multipart/form-data": form}, required=True)


@post(
    "/v1/files",
    scope="inference",
    status_code=200,
    tags=TAGS,
    summary="Upload a file",
    operation_class=FormOperation,
    # The limit is enforced while the body is read, in words that name it.
    request_max_body_size=None,
)
async def create_file(
    request: Request[Any, Any, Any],
    principal: NamedDependency[Principal],
    tenant_files: NamedDependency[Files],
) -> FileView:
    """Requests for a batch, one JSON object a line. Kept for 30 days, or as `expires_after` says.

    At most 200 MiB, in the part `file`; `purpose` is `batch`.
    """
    row = await tenant_files.receive(
        tenant_of(principal),
        content_type=request.headers.get("content-type", ""),
        announced_bytes=request.content_length,
        body=request.stream(),
    )
    return FileView.of(row)


@get("/v1/files", scope="inference", tags=TAGS, summary="List your files")
async def list_files(
    request: Request[Any, Any, Any],
    principal: NamedDependency[Principal],
    tenant_files: NamedDependency[Files],
    purpose: FromQuery[Purpose | None] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    after: FromQuery[str | None] = None,
    order: FromQuery[Literal["asc", "desc"]] = "desc",
) -> FilePage:
    """The newest first, unless `order` is `asc`; `after` is the last id of the page before."""
    refuse_unknown(request.query_params, known=("purpose", "limit", "after", "order"))
    last = read_id(FILE, after) if after is not None else None
    if after is not None and last is None:
        raise NotFound(f"There is no file {after!r}.", param="after")
    page = Page(limit, last, is_ascending=order == "asc")
    rows, has_more = await tenant_files.list_page(tenant_of(principal), page, purpose=purpose)
    views = [FileView.of(row) for row in rows]
    return FilePage(
        views,
        first_id=views[0].id if views else None,
        last_id=views[-1].id if views else None,
        has_more=has_more,
    )


@get("/v1/files/{file_id:str}", scope="inference", tags=TAGS, summary="Show a file")
async def get_file(
    file_id: FromPath[str],
    principal: NamedDependency[Principal],
    tenant_files: NamedDependency[Files],
) -> FileView:
    return FileView.of(await tenant_files.get(tenant_of(principal), read_id(FILE, file_id)))


@get(
    "/v1/files/{file_id:str}/content",
    scope="inference",
    tags=TAGS,
    summary="Download a file",
    responses={200: ResponseSpec(bytes, media_type="application/octet-stream")},
)
async def get_content(
    file_id: FromPath[str],
    principal: NamedDependency[Principal],
    tenant_files: NamedDependency[Files],
) -> Stream:
    """Its bytes as they are."""
    row, found = await tenant_files.open(tenant_of(principal), read_id(FILE, file_id))
    return Stream(
        tenant_files.stream(found),
        headers={"content-length": str(row.size_bytes)},
        media_type="application/octet-stream",
    )


@delete(
    "/v1/files/{file_id:str}",
    scope="inference",
    status_code=200,
    tags=TAGS,
    summary="Delete a file",
)
async def delete_file(
    file_id: FromPath[str],
    principal: NamedDependency[Principal],
    tenant_files: NamedDependency[Files],
) -> FileDeleted:
    """For good. 409 while a batch reads it."""
    await tenant_files.delete(tenant_of(principal), read_id(FILE, file_id))
    return FileDeleted(file_id)


def tenant_of(principal: Principal) -> uuid.UUID:
    """Whose files and batches they are."""
    assert principal.tenant_id is not None, "the guard lets tenants' keys in alone"
    return principal.tenant_id
