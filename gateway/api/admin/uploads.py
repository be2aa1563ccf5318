"""How adapters come in, for operators: in one request, or in pieces that outlive interruptions."""

import datetime
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, delete, get, post, put
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, Operation, Reference, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIFormat, OpenAPIType
from litestar.params import FromPath, JSONBody

from adapters.folder import OPTIONAL_FILES
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from gateway.api.admin.adapters import TAGS, VersionView, version_view
from gateway.auth import Principal
from gateway.errors import Conflict, RejectedUpload, TooManyUploads
from gateway.resumable import DeclaredFile, Progress, ResumableUploads
from gateway.staging import ARCHIVE_SUFFIXES
from gateway.uploads import Accepted, Uploads

UPLOADS = "/tenants/{tenant:str}/adapters/{adapter:str}/uploads"
UPLOAD = UPLOADS + "/{upload_id:uuid}"

BINARY = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY)


class AcceptedView(VersionView, frozen=True):
    """The version that an upload became, and what of the upload is not part of it."""

    # Left aside because trainers leave it: files by path, folders as "name/".
    ignored_files: list[str]


class NewUpload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is going to arrive."""

    files: Annotated[list[DeclaredFile], msgspec.Meta(min_length=1, max_length=16)]
    # Needed where several are served.
    base_model: str | None = None


class FileView(msgspec.Struct, frozen=True):
    """A file of an upload; bytes arrive in order, so the next range begins at `received_bytes`."""

    name: str
    size_bytes: int
    sha256: str
    received_bytes: int


class UploadView(msgspec.Struct, frozen=True):
    """An upload that arrives in pieces."""

    id: uuid.UUID
    state: Literal["open", "published", "rejected"]
    files: list[FileView]
    # Of the version that it became.
    version: int | None
    created_at: datetime.datetime
    # Moves on with each piece; then everything that has arrived is removed.
    expires_at: datetime.datetime


@dataclass
class MultipartOperation(Operation):
    """Describes the multipart body, which the handler reads itself, as a stream."""

    def __post_init__(self) -> None:
        text = Schema(type=OpenAPIType.STRING)
        parts: dict[str, Reference | Schema] = {
            **dict.fromkeys((CONFIG_FILE, WEIGHTS_FILE, *OPTIONAL_FILES, "archive"), BINARY),
            **dict.fromkeys(("sha256", "base_model"), text),
        }
        form = OpenAPIMediaType(schema=Schema(type=OpenAPIType.OBJECT, properties=parts))
        self.request_body = RequestBody(content={"multipart/form-data": form}, required=True)


@dataclass
class BytesOperation(Operation):
    """Describes a body of plain bytes."""

    def __post_init__(self) -> None:
        content = {"application/octet-stream": OpenAPIMediaType(schema=BINARY)}
        self.request_body = RequestBody(content=content, required=True)


SAME_CONTENTS = {
    200: ResponseSpec(
        AcceptedView,
        generate_examples=False,
        description="The adapter had these very contents already: this is their version.",
    )
}


@post(
    "/tenants/{tenant:str}/adapters/{adapter:str}/versions",
    scope="operator",
    tags=TAGS,
    summary="Upload an adapter",
    description=(
        f"Send `{CONFIG_FILE}` and `{WEIGHTS_FILE}` as two file parts, and if the adapter has them"
        f" any of {', '.join(f'`{name}`' for name in OPTIONAL_FILES)}; or one archive of them"
        f" ({', '.join(ARCHIVE_SUFFIXES)}), which may be the whole folder that a trainer wrote."
        " `sha256`, if sent, is that of the weights file or of the archive. `base_model` is needed"
        " where several are served. The answer comes when the version can be called: 201, or 200 if"
        " the adapter had these very contents already. 422 lists everything that is wrong with it."
    ),
    operation_class=MultipartOperation,
    responses=SAME_CONTENTS,
    refuses=(RejectedUpload, TooManyUploads),
    # The operator's limit is enforced while the body is read, in words that name it.
    request_max_body_size=None,
)
async def create_version(
    tenant: FromPath[str],
    adapter: FromPath[str],
    request: Request[Any, Any, Any],
    uploads: NamedDependency[Uploads],
    principal: NamedDependency[Principal],
) -> Response[AcceptedView]:
    accepted = await uploads.publish(
        tenant,
        adapter,
        content_type=request.headers.get("content-type", ""),
        announced_bytes=request.content_length,
        body=request.stream(),
        actor_key_id=principal.key_id,
    )
    return _accepted(accepted)


@post(
    UPLOADS,
    scope="operator",
    tags=TAGS,
    summary="Begin an upload in pieces",
    description=(
        "Declare the files, then PUT their bytes in ranges of any size, in order, and complete the"
        " upload. Any gateway takes any request of it, and what has arrived outlives clients and"
        " gateways until `expires_at`."
    ),
)
async def create_upload(
    tenant: FromPath[str],
    adapter: FromPath[str],
    data: JSONBody[NewUpload],
    resumable_uploads: NamedDependency[ResumableUploads],
    principal: NamedDependency[Principal],
) -> UploadView:
    progress = await resumable_uploads.declare(
        tenant,
        adapter,
        files=data.files,
        base_model=data.base_model,
        actor_key_id=principal.key_id,
    )
    return _upload_view(progress)


@put(
    UPLOAD + "/files/{file:str}",
    scope="operator",
    tags=TAGS,
    summary="Send a range of one file",
    description=(
        "`Content-Range: bytes FIRST-LAST/SIZE` says which. A range that has arrived before is"
        " passed over; one that leaves a gap is a 409 with `expected_offset`."
    ),
    operation_class=BytesOperation,
    request_max_body_size=None,
)
async def put_file(
    tenant: FromPath[str],
    adapter: FromPath[str],
    upload_id: FromPath[uuid.UUID],
    file: FromPath[str],
    request: Request[Any, Any, Any],
    resumable_uploads: NamedDependency[ResumableUploads],
) -> UploadView:
    progress = await resumable_uploads.receive(
        tenant,
        adapter,
        upload_id,
        file=file,
        content_range=request.headers.get("content-range", ""),
        body=request.stream(),
    )
    return _upload_view(progress)


@get(
    UPLOAD,
    scope="operator",
    tags=TAGS,
    summary="Show what has arrived of an upload",
    refuses=(Conflict,),
)
async def get_upload(
    tenant: FromPath[str],
    adapter: FromPath[str],
    upload_id: FromPath[uuid.UUID],
    resumable_uploads: NamedDependency[ResumableUploads],
) -> UploadView:
    return _upload_view(await resumable_uploads.progress(tenant, adapter, upload_id))


@post(
    UPLOAD + "/complete",
    scope="operator",
    tags=TAGS,
    summary="Make a version of an upload",
    description="Answers as the upload in one request does, and the same again when asked again.",
    responses=SAME_CONTENTS,
    refuses=(RejectedUpload, TooManyUploads),
)
async def complete_upload(
    tenant: FromPath[str],
    adapter: FromPath[str],
    upload_id: FromPath[uuid.UUID],
    resumable_uploads: NamedDependency[ResumableUploads],
    principal: NamedDependency[Principal],
) -> Response[AcceptedView]:
    accepted = await resumable_uploads.complete(
        tenant, adapter, upload_id, actor_key_id=principal.key_id
    )
    return _accepted(accepted)


@delete(
    UPLOAD,
    scope="operator",
    tags=TAGS,
    summary="Forget an upload",
    description="With all that has arrived of it. Its version, if it became one, stays.",
)
async def delete_upload(
    tenant: FromPath[str],
    adapter: FromPath[str],
    upload_id: FromPath[uuid.UUID],
    resumable_uploads: NamedDependency[ResumableUploads],
    principal: NamedDependency[Principal],
) -> None:
    await resumable_uploads.delete(tenant, adapter, upload_id, actor_key_id=principal.key_id)


def _accepted(accepted: Accepted) -> Response[AcceptedView]:
    published = accepted.published
    view = version_view(published.adapter, published.version)
    answer = AcceptedView(**msgspec.structs.asdict(view), ignored_files=accepted.ignored_files)
    return Response(answer, status_code=201 if published.is_new else 200)


def _upload_view(progress: Progress) -> UploadView:
    upload = progress.upload
    return UploadView(
        id=upload.id,
        state=msgspec.convert(upload.state, Literal["open", "published", "rejected"]),
        files=[
            FileView(
                name=file.name,
                size_bytes=file.size_bytes,
                sha256=file.sha256,
                received_bytes=progress.received_bytes[file.name],
            )
            for file in progress.files
        ],
        version=progress.version_number,
        created_at=upload.created_at,
        expires_at=upload.expires_at,
    )
