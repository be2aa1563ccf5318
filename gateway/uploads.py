"""One upload from its first byte to a version that can be called, or to all that is wrong with it.

In this order, so that nothing is ever half there: staging, judgement, store, rows, probe. Knows
nothing of HTTP beyond the bytes of a body, and keeps no rows itself. How files come in pieces is in
`resumable`; from their last piece on they go the same way.
"""

import asyncio
import contextlib
import hashlib
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from adapters import archive, lora_config, manifest, text_bundle, validate
from adapters import examples as example_files
from adapters.errors import (
    AdapterError,
    ArtifactMissing,
    Finding,
    InvalidAdapter,
    StoreUnavailable,
    TooLarge,
)
from adapters.examples import Example
from adapters.folder import TEXT_FILES
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, Manifest
from adapters.store import ArtifactStore
from adapters.text_bundle import TextBundle
from adapters.validate import BaseShape, Limits
from engine.errors import LinkError
from engine.protocol import ProbeReport
from gateway.aliases import ExampleResults
from gateway.blobs import Blobs, SourceFile, UploadBytes
from gateway.database import DATABASE_TROUBLE
from gateway.errors import (
    EngineFailed,
    GatewayError,
    InvalidRequest,
    RejectedUpload,
    Unavailable,
)
from gateway.examples import Contender, ExampleRunner
from gateway.lora_folder import LoraFolder
from gateway.registry import Contents, Destination, Published, Registry, Verdict
from gateway.staging import Form, StagedFile, Staging, too_large
from gateway.tables import AdapterVersion, BaseModel
from gateway.templates import Templates

logger = logging.getLogger(__name__)

# An adapter's files, and what trainers leave beside them: a dozen files for each checkpoint.
MAX_ARCHIVE_FILES = 1024
# How soon after the last try versions are looked for again whose probe has not ended.
RECOVERY_RETRY_S = 1.0

# Runs fixed prompts on an engine of that base model, with the adapter of that weights digest.
Probe = Callable[[uuid.UUID, str], Awaitable[ProbeReport]]


@dataclass(frozen=True, slots=True)
class Artifact:
    """The files of an adapter, read but not judged."""

    manifest: Manifest
    # All that are part of it, by name.
    files: dict[str, SourceFile]
    # Of its own tokenizer and chat template, by name.
    text_files: dict[str, Path]
    # Made of those, where they say what the base model's own bundle does not.
    text_bundle: TextBundle | None
    # What the archive held besides: known and left aside, or not known.
    ignored_files: list[str]
    findings: list[Finding]

    @property
    def contents(self) -> Contents:
        bundle = self.text_bundle
        return Contents(
            weights_digest=self.manifest.weights_digest,
            text_bundle_digest=None if bundle is None else text_bundle.digest(bundle),
            rank=self.manifest.max_rank,
            num_modules=len(self.manifest.modules),
            size_bytes=self.manifest.size_bytes,
            source_files={name: file.sha256 for name, file in self.files.items()},
        )


@dataclass(frozen=True, slots=True)
class Accepted:
    """What became of an upload, and which of its files were left aside."""

    published: Published
    ignored_files: list[str]


class Uploads:
    """Takes adapters in."""

    def __init__(
        self,
        registry: Registry,
        store: ArtifactStore,
        *,
        blobs: Blobs,
        staging: Staging,
        probe: Probe,
        templates: Templates,
        examples: ExampleRunner,
    ) -> None:
        self._registry = registry
        self._store = store
        self._templates = templates
        self._examples = examples
        self._blobs = blobs
        self._staging = staging
        self._probe = probe

    async def publish(
        self,
        tenant: str,
        adapter: str,
        *,
        content_type: str,
        announced_bytes: int | None,
        body: AsyncIterator[bytes],
        actor_key_id: uuid.UUID,
    ) -> Accepted:
        """Take one multipart body in as the next version of an adapter; return it once it is ready.

        Raises RejectedUpload with every finding, or any other GatewayError. Contents that the
        adapter has already give the version that has them.
        """
        destination = await self._registry.destination(tenant, adapter)
        with self._staging.folder(destination.tenant_id) as folder:
            form = await self._staging.receive(
                body, content_type=content_type, announced_bytes=announced_bytes, folder=folder
            )
            return await self.take(destination, form, folder.path, actor_key_id=actor_key_id)

    async def publish_folder(
        self, tenant: str, adapter: str, lora: LoraFolder, *, actor_key_id: uuid.UUID
    ) -> Accepted:
        """Take in an adapter that lies on this host, as if it had been uploaded.

        Raises as `publish` does, and as `LoraFolder.copy_to`.
        """
        destination = await self._registry.destination(tenant, adapter)
        with self._staging.folder(destination.tenant_id) as folder:
            limit_bytes = self._staging.max_upload_bytes
            files = await asyncio.to_thread(lora.copy_to, folder.path, max_bytes=limit_bytes)
            return await self.take(destination, Form(files), folder.path, actor_key_id=actor_key_id)

    async def take(
        self, destination: Destination, form: Form, folder: Path, *, actor_key_id: uuid.UUID
    ) -> Accepted:
        """Take in the files that lie in a staging folder. Raises as `publish` does."""
        sent = await asyncio.to_thread(self._open, form, folder)
        base_model = await self._registry.base_model_for(
            destination, form.fields.get("base_model"), trained_on=sent.trained_on
        )
        artifact = await self._judge(sent, base_model)
        published = await self._book(
            destination, artifact, base_model_id=base_model.id, actor_key_id=actor_key_id
        )
        version = await self._finish(published.version, actor_key_id=actor_key_id)
        if version.state == "rejected":
            raise RejectedUpload(msgspec.convert(version.findings, list[Finding]))
        return Accepted(replace(published, version=version), artifact.ignored_files)

    async def sweep(self) -> None:
        """Remove the staged files that an earlier life left."""
        num_removed = await asyncio.to_thread(self._staging.sweep)
        if num_removed:
            logger.info("staging_swept", extra={"num_folders": num_removed})

    async def recover(self, base_model_id: uuid.UUID) -> None:
        """Have the versions of a base model probed whose probe has not ended.

        Where the database is away, that is once it is back: no later engine may come.
        """
        while True:
            try:
                await self._finish_all(base_model_id)
            except DATABASE_TROUBLE as error:
                logger.warning("recovery_put_off", extra={"reason": str(error)})
                await asyncio.sleep(RECOVERY_RETRY_S)
            else:
                return

    async def _finish_all(self, base_model_id: uuid.UUID) -> None:
        for version in await self._registry.versions_in_probe(base_model_id):
            try:
                await self._finish(version, actor_key_id=None)
            except (EngineFailed, Unavailable) as error:
                # It stays under probe, for the next engine or the next upload of the same contents.
                logger.warning(
                    "probe_failed", extra={"version_id": str(version.id), "reason": error.message}
                )

    async def _judge(self, sent: "_Sent", base_model: BaseModel) -> Artifact:
        """Raises RejectedUpload with all findings, BodyTooLarge, Unavailable."""
        artifact = await asyncio.to_thread(self._read, sent, base_model=base_model)
        bundle, findings = await self._build_bundle(artifact, base_model)
        if artifact.findings or findings:
            raise RejectedUpload([*artifact.findings, *findings])
        return replace(artifact, text_bundle=bundle)

    async def _build_bundle(
        self, artifact: Artifact, base_model: BaseModel
    ) -> tuple[TextBundle | None, list[Finding]]:
        num_added_tokens = artifact.manifest.num_added_tokens
        if not artifact.text_files and not num_added_tokens:
            return None, []
        base = await self._bundle_of(base_model)
        return await self._templates.build(
            artifact.text_files, base, num_added_tokens=num_added_tokens
        )

    def _open(self, form: Form, folder: Path) -> "_Sent":
        """Blocking: unpack what was sent. Raises RejectedUpload, BodyTooLarge, InvalidRequest."""
        _check_sha256(form)
        with _refusing():
            return _unpacked(form, folder, max_bytes=self._staging.max_upload_bytes)

    def _read(self, sent: "_Sent", *, base_model: BaseModel) -> Artifact:
        """Blocking: reads every byte of the artifact. Raises RejectedUpload."""
        limit_bytes = self._staging.max_upload_bytes
        with _refusing():
            artifact = _read(sent, base_model=base_model)
            limits = Limits(max_rank=base_model.max_lora_rank, max_size_bytes=limit_bytes)
            artifact.findings.extend(
                validate.check(artifact.manifest, _shape_of(base_model), limits=limits)
            )
            artifact.findings.extend(
                validate.check_values(artifact.files[WEIGHTS_FILE].path, artifact.manifest)
            )
        return artifact

    async def _bundle_of(self, base_model: BaseModel) -> TextBundle:
        try:
            return await self._store.get_bundle(base_model.text_bundle_digest)
        except AdapterError as error:
            raise Unavailable(
                f"The text bundle of {base_model.name!r} cannot be read now; try again shortly."
            ) from error

    async def _book(
        self,
        destination: Destination,
        artifact: Artifact,
        *,
        base_model_id: uuid.UUID,
        actor_key_id: uuid.UUID,
    ) -> Published:
        """First the bytes, then the row that names them."""
        upload = UploadBytes(
            destination.tenant_id,
            artifact.manifest.weights_digest,
            artifact.manifest.canonical_config(),
            artifact.files,
        )
        try:
            await self._promote(artifact, upload)
            published = await self._registry.create_version(
                destination,
                artifact.contents,
                base_model_id=base_model_id,
                actor_key_id=actor_key_id,
            )
        except GatewayError:
            await self._discard(artifact.contents)
            raise
        # Until there was a row, others may have taken the bytes for useless, and removed them.
        version = await self._complete(
            artifact, upload, published.version, actor_key_id=actor_key_id
        )
        return replace(published, version=version)

    async def _discard(self, of: Contents | AdapterVersion) -> None:
        """Remove what nobody needs of an upload that came to nothing."""
        try:
            await self._blobs.discard(
                of.weights_digest, of.text_bundle_digest, (of.source_files or {}).values()
            )
        except StoreUnavailable as error:
            digest = of.version_digest
            logger.warning("bytes_left_behind", extra={"digest": digest, "reason": str(error)})

    async def _promote(self, artifact: Artifact, upload: UploadBytes) -> None:
        """Put an artifact where engines find it, under its digest. Raises Unavailable."""
        try:
            if artifact.text_bundle is not None:
                await self._store.put_bundle(artifact.text_bundle)
            await self._blobs.put(upload)
        except StoreUnavailable as error:
            raise _takes_nothing() from error

    async def _complete(
        self,
        artifact: Artifact,
        upload: UploadBytes,
        version: AdapterVersion,
        *,
        actor_key_id: uuid.UUID,
    ) -> AdapterVersion:
        """Put what is not there of a version that has a row. Raises Unavailable.

        A version keeps the files of its first upload, unless they are lost: then it takes these.
        """
        ours, theirs = artifact.contents.source_files, version.source_files or {}
        try:
            if artifact.text_bundle is not None:
                await self._store.put_bundle(artifact.text_bundle)
            if ours != theirs and not await self._has_files(version):
                version = await self._registry.replace_source_files(
                    version.id, ours, actor_key_id=actor_key_id
                )
            named = version.source_files or {}
            await self._blobs.complete(upload, is_source=named == ours)
            for sha256 in {*ours.values(), *theirs.values()} - {*named.values()}:
                await self._blobs.discard_file(sha256)
        except StoreUnavailable as error:
            raise _takes_nothing() from error
        return version

    async def _has_files(self, version: AdapterVersion) -> bool:
        files = version.source_files
        return files is not None and await self._blobs.has_files(files, version.weights_digest)

    async def _finish(
        self, version: AdapterVersion, *, actor_key_id: uuid.UUID | None
    ) -> AdapterVersion:
        """Have a version probed that was not yet. Raises EngineFailed or Unavailable."""
        if version.state != "probing":
            return version
        base_model = await self._registry.base_model(version.base_model_id)
        try:
            report = await self._probe(version.base_model_id, version.weights_digest)
        except (LinkError, Unavailable) as error:
            is_refusal = isinstance(error, LinkError) and not error.is_retryable
            kind = EngineFailed if is_refusal else Unavailable
            raise kind(
                f"The upload is kept as version {version.number}, but no engine could probe it:"
                f" {error} Send the same upload again to have it probed."
            ) from error
        verdict = replace(verdict_of(report), base_revision=base_model.revision)
        if verdict.state == "ready" and (examples := await self._examples_of(version)):
            results = await self._rehearse(version, examples)
            verdict = replace(verdict, example_results=msgspec.to_builtins(results))
        version = await self._registry.finish_version(
            version.id, verdict, actor_key_id=actor_key_id
        )
        if version.state == "rejected":
            await self._discard(version)
        return version

    async def _examples_of(self, version: AdapterVersion) -> list[Example]:
        """The examples that a version was uploaded with, as its first upload said them.

        Raises Unavailable.
        """
        sha256 = (version.source_files or {}).get(example_files.FILE_NAME)
        if sha256 is None:
            return []
        try:
            found = await self._store.find_file(sha256)
            if found is None:
                raise ArtifactMissing(sha256)
            data = b"".join([chunk async for chunk in self._store.stream_file(found)])
        except (ArtifactMissing, StoreUnavailable) as error:
            raise Unavailable(
                f"The upload is kept as version {version.number}, but its examples cannot be read"
                " now. Send the same upload again to have it finished."
            ) from error
        return example_files.parse(data)[0]

    async def _rehearse(
        self, version: AdapterVersion, examples: Sequence[Example]
    ) -> ExampleResults:
        """Ask the base model, what is served now and the new version the same examples."""
        base = (await self._registry.base_model(version.base_model_id)).text_bundle_digest
        current = await self._registry.current_version(version)

        def contender(of: AdapterVersion) -> Contender:
            return Contender(
                of.base_model_id, of.weights_digest, of.text_bundle_digest or base, base
            )

        return await self._examples.run(
            examples,
            base=Contender(version.base_model_id, None, base, base),
            current=None if current is None else contender(current),
            this=contender(version),
            current_version=None if current is None else current.number,
            # Nobody else's KV is found by it, nor it by anybody.
            cache_salt=version.id.bytes,
        )


def verdict_of(report: ProbeReport) -> Verdict:
    """What a probe's numbers mean for a version."""
    findings = [] if report.is_passed else _probe_findings(report)
    return Verdict(
        certificate=msgspec.to_builtins(report),
        findings=[msgspec.to_builtins(finding) for finding in findings],
    )


def _probe_findings(report: ProbeReport) -> list[Finding]:
    findings = [
        Finding(
            code="module_untouched",
            where=module,
            message="the adapter changes nothing that this module puts out",
            fix="leave the module out of target_modules, or train it",
        )
        for module in report.untouched_modules
    ]
    if report.logit_shift <= report.noise or not findings:
        findings.append(_probe_finding(report))
    return findings


def _probe_finding(report: ProbeReport) -> Finding:
    return Finding(
        code="probe_failed",
        where="engine probe",
        message=(
            f"largest relative error {report.largest_relative_error:.2e} (bound"
            f" {report.error_bound:.2e}), logits moved by {report.logit_shift:.2e} (noise alone:"
            f" {report.noise:.2e})"
        ),
        fix="train it longer or check its values: it must change answers, and exactly as PEFT does",
    )


@dataclass(frozen=True, slots=True)
class _Sent:
    """The files of an upload, unpacked and not yet read."""

    files: dict[str, SourceFile]
    config: bytes
    ignored_files: list[str]
    findings: list[Finding]

    @property
    def trained_on(self) -> str | None:
        """What the configuration says, as far as it can be read; how it is, is judged later."""
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return msgspec.json.decode(self.config, type=_Told).base_model_name_or_path
        return None


class _Told(msgspec.Struct):
    base_model_name_or_path: str | None = None


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong with files, in the words of an upload's refusal."""
    try:
        yield
    except InvalidAdapter as error:
        raise RejectedUpload(error.findings) from error
    except TooLarge as error:
        raise too_large(error.limit_bytes) from error


def _unpacked(form: Form, folder: Path, *, max_bytes: int) -> _Sent:
    files = {name: SourceFile(each.path, each.sha256) for name, each in form.files.items()}
    ignored_files: list[str] = []
    findings: list[Finding] = []
    if form.archive is not None:
        into = folder / "unpacked"
        into.mkdir()
        unpacked = archive.unpack(
            form.archive.path, into, max_total_bytes=max_bytes, max_files=MAX_ARCHIVE_FILES
        )
        files = {name: _hashed(path) for name, path in unpacked.files.items()}
        ignored_files, findings = unpacked.ignored_files, unpacked.findings
    with files[CONFIG_FILE].path.open("rb") as file:
        # One byte more than allowed is enough for the reader to refuse it.
        config = file.read(lora_config.MAX_SIZE_BYTES + 1)
    findings += _faults_of_examples(files.get(example_files.FILE_NAME))
    return _Sent(files, config, ignored_files, findings)


def _read(sent: _Sent, *, base_model: BaseModel) -> Artifact:
    return Artifact(
        manifest=manifest.read(
            sent.config,
            sent.files[WEIGHTS_FILE].path,
            base_model=base_model.name,
            base_shape=_shape_of(base_model),
        ),
        files=sent.files,
        text_files={name: f.path for name, f in sent.files.items() if name in TEXT_FILES},
        text_bundle=None,
        ignored_files=sent.ignored_files,
        findings=list(sent.findings),
    )


def _hashed(path: Path) -> SourceFile:
    with path.open("rb") as file:
        return SourceFile(path, hashlib.file_digest(file, "sha256").hexdigest())


def _faults_of_examples(examples: SourceFile | None) -> list[Finding]:
    if examples is None:
        return []
    with examples.path.open("rb") as file:
        return example_files.parse(file.read(example_files.MAX_SIZE_BYTES + 1))[1]


def _takes_nothing() -> Unavailable:
    return Unavailable("The artifact store takes nothing now; try again shortly.")


def _shape_of(base_model: BaseModel) -> BaseShape:
    return msgspec.convert(base_model.shape, BaseShape)


def _check_sha256(form: Form) -> None:
    expected = form.fields.get("sha256")
    if expected is None:
        return
    if re.fullmatch("[0-9a-fA-F]{64}", expected) is None:
        raise InvalidRequest("sha256 must be 64 hexadecimal digits.", param="sha256")
    file: StagedFile = form.archive or form.files[WEIGHTS_FILE]
    if file.sha256 != expected.lower():
        raise RejectedUpload([wrong_sha256(file, expected.lower())])


def wrong_sha256(file: StagedFile, expected: str) -> Finding:
    """The refusal of a file that did not arrive as it was sent."""
    return Finding(
        code="sha256_mismatch",
        where=file.path.name,
        message=f"has SHA-256 {file.sha256}, not {expected}",
        fix="send it again: it was changed or damaged on its way",
    )
