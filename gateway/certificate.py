"""The certificate of a version: what it is, and what its probe measured, as data and for printing.

Says nothing that is not in the version's row, so it says the same whenever it is asked.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import msgspec

from adapters.errors import Finding
from engine.protocol import ProbeReport
from gateway.aliases import ExampleResults, Score
from gateway.errors import NotFound
from gateway.registry import Registry

# Of the longest label of ours, and of the longest name of a file.
LABEL_WIDTH = 25

STYLE = """
body { font: 11pt/1.4 Georgia, serif; max-width: 46em; margin: 3em auto; color: #111 }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1em; margin: 1.6em 0 .3em }
table { border-collapse: collapse; width: 100% } tr { break-inside: avoid }
th, td { text-align: left; vertical-align: top; padding: .15em 0; border-bottom: 1px solid #ddd }
th { font-weight: normal; width: 13em; color: #555 }
td { font: .8em/1.6 ui-monospace, Menlo, monospace; overflow-wrap: anywhere }
@page { margin: 2cm } @media print { body { margin: 0; max-width: none } }
"""


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one version."""

    tenant: str
    adapter: str
    version: int
    # What stays at this version, e.g. "acme-sql@3".
    pinned_model: str
    is_passed: bool
    uploaded_at: datetime.datetime
    base_model: str
    base_digest: str
    weights_digest: str
    version_digest: str
    # Null where the adapter speaks through its base model's tokenizer and template.
    text_bundle_digest: str | None
    # The largest of its modules.
    rank: int
    size_bytes: int
    # What was uploaded: file name -> SHA-256. Null where its files were not kept.
    source_files: dict[str, str] | None
    probe: ProbeReport
    # Null where it was uploaded without examples.
    example_results: ExampleResults | None
    findings: list[Finding]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, and lines of a label and a value."""

    title: str
    lines: list[tuple[str, str]]


async def certify(registry: Registry, tenant: str, adapter: str, number: int) -> Certificate:
    """Raises NotFound, also for a version without a certificate."""
    row, version = await registry.get_version(tenant, adapter, number)
    pinned_model = f"{row.public_name}@{version.number}"
    if version.certificate is None:
        why = "it was purged" if version.purged_at is not None else "no engine has probed it yet"
        raise NotFound(f"{pinned_model!r} has no certificate: {why}.", param="version")
    base_model = await registry.base_model(version.base_model_id)
    return Certificate(
        tenant=tenant,
        adapter=row.slug,
        version=version.number,
        pinned_model=pinned_model,
        is_passed=version.state != "rejected",
        uploaded_at=version.created_at.astimezone(datetime.UTC),
        base_model=base_model.name,
        base_digest=base_model.digest,
        weights_digest=version.weights_digest,
        version_digest=version.version_digest,
        text_bundle_digest=version.text_bundle_digest,
        rank=version.rank,
        size_bytes=version.size_bytes,
        source_files=version.source_files,
        probe=msgspec.convert(version.certificate, ProbeReport),
        example_results=msgspec.convert(version.example_results, ExampleResults | None),
        findings=msgspec.convert(version.findings, list[Finding]),
    )


def to_text(certificate: Certificate) -> str:
    """A page for a printer with letters of one width."""
    title = _title(certificate)
    lines = [title, "=" * len(title), "", _summary(certificate)]
    for section in _sections(certificate):
        lines += ["", section.title]
        lines += [f"  {label:<{LABEL_WIDTH}}  {value}" for label, value in section.lines]
    # Names of modules are not ours.
    return "\n".join(_printable(line) for line in lines) + "\n"


def to_html(certificate: Certificate) -> str:
    """A page that needs nothing else to be shown or printed."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(_title(certificate))}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(_title(certificate))}</h1><p>{escape(_summary(certificate))}</p>",
    ]
    for section in _sections(certificate):
        rows = "".join(
            f"<tr><th>{escape(_printable(label))}</th><td>{escape(_printable(value))}</td></tr>\n"
            for label, value in section.lines
        )
        parts.append(f"<h2>{escape(section.title)}</h2><table>\n{rows}</table>")
    return "\n".join([*parts, "</body></html>\n"])


def _title(certificate: Certificate) -> str:
    return f"Certificate of {certificate.pinned_model}"


def _summary(certificate: Certificate) -> str:
    if certificate.is_passed:
        return "Passed: it changes the base model's answers, and every module by what it should."
    return "Refused: it is not served, for the reasons at the end."


def _sections(certificate: Certificate) -> Iterator[Section]:
    yield Section("What it is", _identity(certificate))
    yield Section("Digests (SHA-256)", _digests(certificate))
    if certificate.source_files:
        yield Section("Files as uploaded (SHA-256)", sorted(certificate.source_files.items()))
    yield Section("What it changes", _coverage(certificate))
    yield Section("What the probe measured", _measured(certificate.probe))
    if certificate.example_results is not None:
        yield Section("Its examples, answered as expected", _examples(certificate.example_results))
    if certificate.findings:
        reasons = [(f.code, f"{f.where}: {f.message}; {f.fix}") for f in certificate.findings]
        yield Section("Why it was refused", reasons)


def _identity(certificate: Certificate) -> list[tuple[str, str]]:
    return [
        ("tenant", certificate.tenant),
        ("adapter", certificate.adapter),
        ("version", str(certificate.version)),
        ("base model", certificate.base_model),
        ("uploaded", f"{certificate.uploaded_at:%Y-%m-%d %H:%M:%S} UTC"),
        ("size of the weights", f"{certificate.size_bytes:,} bytes"),
    ]


def _digests(certificate: Certificate) -> list[tuple[str, str]]:
    return [
        ("version", certificate.version_digest),
        ("weights", certificate.weights_digest),
        ("tokenizer and template", certificate.text_bundle_digest or "the base model's"),
        ("base model", certificate.base_digest),
        ("values as prepared", certificate.probe.fingerprint or "not told"),
    ]


def _coverage(certificate: Certificate) -> list[tuple[str, str]]:
    probe, coverage = certificate.probe, certificate.probe.coverage
    if coverage is None:
        return [("modules", f"{probe.num_modules:,}"), ("largest rank", str(certificate.rank))]
    kinds = sorted(coverage.num_modules_by_kind.items())
    return [
        ("modules", f"{probe.num_modules:,}"),
        *((f"  by {kind}", f"{number:,}") for kind, number in kinds),
        ("parameters", f"{coverage.num_parameters:,}"),
        ("ranks", f"{coverage.min_rank} to {coverage.max_rank}"),
        ("|W' - W| / |W|, largest", f"{coverage.largest_relative_norm:.3e}"),
        ("|W' - W| / |W|, median", f"{coverage.median_relative_norm:.3e}"),
    ]


def _measured(probe: ProbeReport) -> list[tuple[str, str]]:
    untouched = [("not touched", module) for module in probe.untouched_modules]
    return [
        ("largest relative error", f"{probe.largest_relative_error:.3e}"),
        ("  at most allowed", f"{probe.error_bound:.3e}"),
        ("logits moved by", f"{probe.logit_shift:.3e}"),
        ("  by noise alone", f"{probe.noise:.3e}"),
        *untouched,
    ]


def _examples(results: ExampleResults) -> list[tuple[str, str]]:
    lines = [] if results.base is None else [("base model alone", _share(results.base))]
    if results.current is not None:
        lines.append((f"version {results.current_version}, until then", _share(results.current)))
    lines.append(("this version", _share(results.this_version)))
    if results.failed:
        lines.append(("  not numbers", ", ".join(map(str, results.failed))))
    if results.num_left_out:
        lines.append(("not asked, for time", str(results.num_left_out)))
    return lines


def _share(score: Score) -> str:
    return f"{score.passed} of {score.total}"


def _printable(line: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
