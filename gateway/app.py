"""The composition root: every part of a gateway worker is made here and handed out.

Decides nothing; what it wires together knows nothing of it.
"""

import contextlib
import datetime
import itertools
import logging
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litestar import Litestar
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.static_files import create_static_files_router
from litestar.types import Message, Scope

from adapters.store import ArtifactStore
from engine.client import EngineLink
from engine.protocol import Frame, ProbeReport
from gateway import api
from gateway.aliases import Aliases
from gateway.api import (
    batches,
    chat,
    completions,
    embeddings,
    estimate,
    exports,
    files,
    health,
    keys,
    limits,
    lora,
    models,
    policy,
    privacy,
    responses,
    statements,
    tenant,
    tokens,
)
from gateway.api import billing as billing_routes
from gateway.api.admin import admin_router
from gateway.api.attempts import Attempts, Desk
from gateway.api.batch_lines import LineAnswerer
from gateway.api.document import openapi_config
from gateway.api.unknown_fields import name_ignored, take_out_unknown
from gateway.api.wire import (
    answer_error,
    answer_http_exception,
    answer_unexpected,
    openai_error,
)
from gateway.auth import Authenticator, check_routes, guard, provide_principal
from gateway.base_models import BaseModels
from gateway.batches.claims import Claims
from gateway.batches.job import Workshop
from gateway.batches.orders import Orders
from gateway.batches.runner import MAX_LINES, BatchRunner
from gateway.batches.slots import Slots
from gateway.blobs import Blobs
from gateway.bookkeeping import Bookkeeper
from gateway.database import Database
from gateway.engine_host import EngineHost
from gateway.engines import Engines
from gateway.errors import GatewayError, JournalFailed
from gateway.examples import ExampleRunner
from gateway.files import Files
from gateway.grammars import Grammars
from gateway.grants import Grants
from gateway.idempotency import Answers
from gateway.inference import Inference
from gateway.journal import Journal
from gateway.ledger import Ledger
from gateway.policies.decisions import Decisions
from gateway.policies.store import Policies
from gateway.privacy import Contents
from gateway.quotas import Quotas
from gateway.registry import Registry
from gateway.residency import Residency
from gateway.resumable import ResumableUploads
from gateway.retention import Retention
from gateway.routing import Router
from gateway.runtime_loras import RuntimeLoras
from gateway.settings import Settings
from gateway.source_files import SourceFiles
from gateway.staging import Staging
from gateway.tables import new_id
from gateway.templates import Templates
from gateway.text import TextCodecs
from gateway.uploads import Probe, Uploads
from gateway.webhooks import Outbox

logger = logging.getLogger(__name__)

STATIC_DIR = Path(api.__file__).parent / "static"


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that lives as long as the worker."""

    settings: Settings
    database: Database
    authenticator: Authenticator
    store: ArtifactStore
    registry: Registry
    aliases: Aliases
    grants: Grants
    retention: Retention
    source_files: SourceFiles
    uploads: Uploads
    resumable_uploads: ResumableUploads
    templates: Templates
    grammars: Grammars
    journal: Journal
    ledger: Ledger
    outbox: Outbox
    base_models: BaseModels
    engines: Engines
    router: Router
    residency: Residency
    runtime_loras: RuntimeLoras
    inference: Inference
    attempts: Attempts
    contents: Contents
    policies: Policies
    tenant_files: Files
    orders: Orders
    batch_runner: BatchRunner


def build(settings: Settings) -> Parts:
    """Make the parts of a worker. Opens the journal, and nothing else yet.

    Raises JournalInUse.
    """
    database = Database(app_url=settings.database_app_url, worker_url=settings.database_worker_url)
    store = ArtifactStore(settings.store_url)
    quotas = Quotas(settings.max_adapters_per_tenant, settings.max_adapter_bytes_per_tenant)
    registry = Registry(database, quotas)
    staging = Staging(settings.data_dir / "staging", max_upload_bytes=settings.max_upload_bytes)
    templates = Templates()
    grammars = Grammars()
    journal = Journal.open(settings.data_dir / "journal")
    ledger = Ledger(database, journal, max_retry_credit_nano=settings.max_retry_credit_nano)
    router = Router()
    residency = Residency(database, router)
    blobs = Blobs(database, store)
    texts = TextCodecs(store, templates=templates, tool_call_parser=settings.tool_call_parser)
    uploads = Uploads(
        registry,
        store,
        blobs=blobs,
        staging=staging,
        probe=_prober(router),
        templates=templates,
        examples=ExampleRunner(texts, router),
    )
    retention = Retention(
        database,
        blobs,
        purge_after=datetime.timedelta(days=settings.purge_after_days),
        quotas=quotas,
    )
    engines = Engines(
        database,
        router,
        connect=_connector(settings, journal, on_session=residency.look),
        enroll=registry.register_base_model,
        given=settings.engine_addresses,
        host=EngineHost(settings.supervisor_socket) if settings.supervisor_socket else None,
        on_attached=_follower(uploads, residency),
    )
    contents = Contents(database)
    policies = Policies(
        database,
        Decisions(database),
        settings.peppers,
        allowed_networks=settings.webhook_networks,
    )
    authenticator = Authenticator(
        database, settings.peppers, trusted_proxies=settings.trusted_proxies
    )
    inference = Inference(
        database=database,
        registry=registry,
        texts=texts,
        router=router,
        journal=journal,
        ledger=ledger,
        contents=contents,
        policies=policies,
        grammars=grammars,
    )
    tenant_files = Files(
        database, store, staging=staging, max_bytes_per_tenant=settings.max_file_bytes_per_tenant
    )
    answerer = LineAnswerer(inference, takes_out_unknown=settings.reports_unknown_fields)
    workshop = Workshop(
        claims=Claims(database, instance_id=journal.instance_id),
        files=tenant_files,
        staging=staging,
        slots=Slots(MAX_LINES),
        find_principal=authenticator.principal_of,
        answer=answerer.answer,
        spell_error=openai_error,
    )

    return Parts(
        settings=settings,
        database=database,
        authenticator=authenticator,
        store=store,
        registry=registry,
        aliases=Aliases(database),
        grants=Grants(database),
        retention=retention,
        source_files=SourceFiles(registry, store, blobs),
        resumable_uploads=ResumableUploads(
            database, registry, store, staging=staging, uploads=uploads
        ),
        templates=templates,
        grammars=grammars,
        uploads=uploads,
        journal=journal,
        ledger=ledger,
        outbox=Outbox(database, settings.peppers, allowed_networks=settings.webhook_networks),
        base_models=BaseModels(database),
        engines=engines,
        router=router,
        residency=residency,
        runtime_loras=RuntimeLoras(
            database,
            uploads=uploads,
            residency=residency,
            shelf=retention,
            root=settings.lora_folder,
        ),
        inference=inference,
        contents=contents,
        policies=policies,
        attempts=Attempts(Answers(database), compares_streams=settings.max_retry_credit_nano > 0),
        tenant_files=tenant_files,
        orders=Orders(database),
        batch_runner=BatchRunner(workshop),
    )


def _connector(
    settings: Settings, journal: Journal, *, on_session: Callable[[], None]
) -> Callable[[str, Callable[[], None]], EngineLink]:
    """Makes links that one journal can tell apart: no two sequences have the same id."""
    sequence_ids = itertools.count(1)

    def connect(address: str, on_own_session: Callable[[], None]) -> EngineLink:
        def on_any_session() -> None:
            on_own_session()
            on_session()

        return EngineLink(
            address,
            worker_id=str(journal.instance_id),
            worker_epoch=journal.epoch,
            secret=settings.engine_secret,
            on_frame=lambda frame: _write_down(journal, frame),
            on_session=on_any_session,
            sequence_ids=sequence_ids,
        )

    return connect


def _prober(router: Router) -> Probe:
    async def probe(base_model_id: uuid.UUID, weights_digest: str) -> ProbeReport:
        return await router.pick(base_model_id).probe(weights_digest)

    return probe


def _follower(
    uploads: Uploads, residency: Residency
) -> Callable[[uuid.UUID], Coroutine[Any, Any, None]]:
    async def follow(base_model_id: uuid.UUID) -> None:
        residency.look()
        await uploads.recover(base_model_id)

    return follow


def _write_down(journal: Journal, frame: Frame) -> None:
    """Journal a frame. Where that fails nothing more may be sent: this worker ends."""
    try:
        journal.on_frame(frame)
    except JournalFailed:
        logger.critical("journal_failed", exc_info=True)
        # As if told to stop; whoever keeps this process starts it again.
        signal.raise_signal(signal.SIGTERM)
        raise


@contextlib.asynccontextmanager
async def run(parts: Parts) -> AsyncIterator[None]:
    """Start the parts in the order of their needs, and stop them in the other.

    Raises DatabaseRefused where the database cannot be trusted with tenants or money, and
    JournalCorrupt where the journal of an earlier life cannot.
    """
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(parts.journal.close)
        stack.push_async_callback(parts.database.close)
        stack.push_async_callback(parts.contents.drain)
        await parts.database.check()
        await parts.database.prepare()
        await stack.enter_async_context(parts.authenticator)
        stack.push_async_callback(parts.templates.close)
        stack.push_async_callback(parts.grammars.close)
        await parts.ledger.start()
        stack.push_async_callback(parts.ledger.stop)
        await stack.enter_async_context(parts.retention)
        await stack.enter_async_context(parts.resumable_uploads)
        await stack.enter_async_context(parts.residency)
        await stack.enter_async_context(parts.outbox)
        await stack.enter_async_context(parts.policies.decisions)
        await stack.enter_async_context(parts.attempts.answers)
        await stack.enter_async_context(Bookkeeper(parts.database))
        await parts.uploads.sweep()
        await stack.enter_async_context(parts.tenant_files)
        await stack.enter_async_context(parts.engines)
        await stack.enter_async_context(parts.batch_runner)
        yield


def create_app(settings: Settings) -> Litestar:
    return lay_out(PartsAtHand(build(settings)))


class PartsAtHand:
    """What handlers are given. Mutable: an app may outlive its parts."""

    def __init__(self, parts: Parts) -> None:
        self.fill(parts)

    def fill(self, parts: Parts) -> None:
        self.parts = parts
        self.desk = Desk(parts.inference, parts.attempts)


def lay_out(at_hand: PartsAtHand) -> Litestar:
    """Every route, which takes some 0.2 s; it has the settings of the parts that are there first.

    Runs whatever parts are at hand when it starts.
    """
    settings = at_hand.parts.settings

    @contextlib.asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        parts = at_hand.parts
        app.state.authenticator = parts.authenticator
        async with run(parts):
            yield

    app = Litestar(
        [
            admin_router,
            batches.cancel_batch,
            batches.create_batch,
            batches.get_batch,
            batches.list_batches,
            billing_routes.billing_router,
            chat.chat_completions,
            completions.completions,
            embeddings.embeddings,
            estimate.estimate,
            exports.exports_router,
            files.create_file,
            files.delete_file,
            files.get_content,
            files.get_file,
            files.list_files,
            health.live,
            health.ready,
            lora.load_lora_adapter,
            lora.unload_lora_adapter,
            keys.create_key,
            keys.list_keys,
            keys.revoke_key,
            keys.rotate_key,
            limits.limits,
            limits.list_budgets,
            models.get_model,
            models.list_models,
            policy.show_policy,
            privacy.privacy_router,
            privacy.show_content,
            responses.responses,
            statements.statements_router,
            statements.list_own,
            statements.show_own,
            tenant.usage,
            tokens.detokenize,
            tokens.tokenize,
            create_static_files_router("/static", [STATIC_DIR], opt={"scope": "public"}),
        ],
        lifespan=[lifespan],
        guards=[guard],
        dependencies={
            "principal": Provide(provide_principal),
            "desk": Provide(lambda: at_hand.desk, sync_to_thread=False),
            **{name: _provide(at_hand, name) for name in _HANDED_OUT},
        },
        exception_handlers={
            GatewayError: answer_error,
            HTTPException: answer_http_exception,
            Exception: answer_unexpected,
        },
        before_request=take_out_unknown if settings.reports_unknown_fields else None,
        before_send=[_name_request, *([name_ignored] if settings.reports_unknown_fields else [])],
        openapi_config=openapi_config(),
        logging_config=None,
    )
    check_routes(app)
    return app


# What handlers may ask for by the name of a parameter. No field of a body has one of these names:
# the framework would take what is wrong with it for a fault of ours.
_HANDED_OUT = (
    *("aliases", "authenticator", "base_models", "batch_runner", "database", "engines"),
    *("grants", "inference"),
    *(
        "ledger",
        "orders",
        "registry",
        "outbox",
        "residency",
        "resumable_uploads",
        "retention",
        "router",
        "runtime_loras",
    ),
    *("policies", "source_files", "tenant_files", "uploads"),
)


def _provide(at_hand: PartsAtHand, name: str) -> Provide:
    def give() -> Any:
        return getattr(at_hand.parts, name)

    return Provide(give, sync_to_thread=False)


async def _name_request(message: Message, scope: Scope) -> None:
    """Every answer has an id to ask about; generations bring their own."""
    if message["type"] == "http.response.start":
        headers = list(message.get("headers", []))
        if not any(name == b"x-request-id" for name, _ in headers):
            message["headers"] = [*headers, (b"x-request-id", str(new_id()).encode())]
