"""/v1/batches: many requests in one file, answered when there is time."""

import datetime
import uuid
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from gateway.api.batch_lines import Endpoint
from gateway.api.fields import Metadata
from gateway.api.files import tenant_of
from gateway.api.usage import refuse_unknown
from gateway.auth import Principal
from gateway.batches.lines import Fault
from gateway.batches.orders import Order, Orders
from gateway.batches.runner import BatchRunner
from gateway.errors import NotFound
from gateway.files import LIFETIME_S, MIN_LIFETIME_S
from gateway.object_ids import BATCH, FILE, Page, read_id, spell_id

TAGS = ["batches"]
Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]


class ExpiresAfter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long a file is kept from its making on."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, msgspec.Meta(ge=MIN_LIFETIME_S, le=LIFETIME_S)]


class NewBatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be done, and where the requests are."""

    input_file_id: str
    # The route of every request in the file.
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    # Of the files with the answers; 30 days where it is left out.
    output_expires_after: ExpiresAfter | None = None


class RequestCounts(msgspec.Struct, frozen=True):
    """How many requests there are, and how many have an answer or an error by now."""

    total: int
    completed: int
    failed: int


class Faults(msgspec.Struct, frozen=True):
    """Why a batch failed, line by line."""

    data: list[Fault]
    object: Literal["list"] = "list"


class BatchView(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's batch object; times are seconds since 1970."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Status
    errors: Faults | None
    # Answers, and errors of requests that were refused or never ran; null where there are none.
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None
    object: Literal["batch"] = "batch"

    @classmethod
    def of(cls, order: Order) -> "BatchView":
        batch = order.batch
        has_files = batch.ended_at is not None
        faults = msgspec.convert(batch.errors, list[Fault])
        ended_at = _seconds(batch.ended_at)
        return cls(
            id=spell_id(BATCH, batch.id),
            endpoint=batch.endpoint,
            input_file_id=spell_id(FILE, batch.input_file_id),
            status=msgspec.convert(batch.status, Status),
            errors=Faults(faults) if faults else None,
            output_file_id=_file(batch.output_file_id) if has_files else None,
            error_file_id=_file(batch.error_file_id) if has_files else None,
            created_at=int(batch.created_at.timestamp()),
            in_progress_at=_seconds(batch.in_progress_at),
            expires_at=int(batch.expires_at.timestamp()),
            finalizing_at=_seconds(batch.finalizing_at),
            completed_at=ended_at if batch.status == "completed" else None,
            failed_at=ended_at if batch.status == "failed" else None,
            expired_at=ended_at if batch.status == "expired" else None,
            cancelling_at=_seconds(batch.cancelling_at),
            cancelled_at=ended_at if batch.status == "cancelled" else None,
            request_counts=RequestCounts(batch.num_requests, order.num_completed, order.num_failed),
            metadata=batch.metadata_,
        )


class BatchPage(msgspec.Struct, frozen=True):
    """Batches, the newest first; `last_id` is what `after` takes for the next page."""

    data: list[BatchView]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


@post("/v1/batches", scope="inference", status_code=200, tags=TAGS, summary="Create a batch")
async def create_batch(
    data: JSONBody[NewBatch],
    principal: NamedDependency[Principal],
    orders: NamedDependency[Orders],
    batch_runner: NamedDependency[BatchRunner],
) -> BatchView:
    """Have a file of requests answered within a day, behind everything that somebody waits for.

    Each line is `{"custom_id", "method": "POST", "url", "body"}`; at most 50,000 of them. All are
    judged before the first runs: `errors` names the lines at fault. They run for the key that
    created the batch, under its limits and budgets: one that is refused for a while is tried again.
    """
    after = data.output_expires_after
    order = await orders.create(
        principal,
        endpoint=data.endpoint,
        input_file_id=read_id(FILE, data.input_file_id),
        metadata=data.metadata,
        output_expires_after_s=None if after is None else after.seconds,
    )
    batch_runner.wake()
    return BatchView.of(order)


@get("/v1/batches", scope="inference", tags=TAGS, summary="List your batches")
async def list_batches(
    request: Request[Any, Any, Any],
    principal: NamedDependency[Principal],
    orders: NamedDependency[Orders],
    limit: Annotated[int, QueryParameter(ge=1, le=100)] = 20,
    after: FromQuery[str | None] = None,
) -> BatchPage:
    refuse_unknown(request.query_params, known=("limit", "after"))
    last = read_id(BATCH, after) if after is not None else None
    if after is not None and last is None:
        raise NotFound(f"There is no batch {after!r}.", param="after")
    found, has_more = await orders.list_page(tenant_of(principal), Page(limit, last))
    views = [BatchView.of(order) for order in found]
    return BatchPage(
        views,
        first_id=views[0].id if views else None,
        last_id=views[-1].id if views else None,
        has_more=has_more,
    )


@get("/v1/batches/{batch_id:str}", scope="inference", tags=TAGS, summary="Show a batch")
async def get_batch(
    batch_id: FromPath[str],
    principal: NamedDependency[Principal],
    orders: NamedDependency[Orders],
) -> BatchView:
    return BatchView.of(await orders.get(tenant_of(principal), read_id(BATCH, batch_id)))


@post(
    "/v1/batches/{batch_id:str}/cancel",
    scope="inference",
    status_code=200,
    tags=TAGS,
    summary="Cancel a batch",
)
async def cancel_batch(
    batch_id: FromPath[str],
    principal: NamedDependency[Principal],
    orders: NamedDependency[Orders],
    batch_runner: NamedDependency[BatchRunner],
) -> BatchView:
    """What is answered by then is kept and billed; the rest never runs."""
    order = await orders.cancel(tenant_of(principal), read_id(BATCH, batch_id))
    batch_runner.wake()
    return BatchView.of(order)


def _seconds(moment: datetime.datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def _file(file_id: uuid.UUID | None) -> str | None:
    return None if file_id is None else spell_id(FILE, file_id)
