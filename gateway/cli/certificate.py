"""How a version reads on a terminal: what it is, and what its probe and its examples showed."""

from collections.abc import Iterator
from typing import Any

import click

HEADER = ("VERSION", "STATE", "RANK", "MODULES", "BYTES", "EXAMPLES", "CREATED")

_EXAMINEES = (("base", "base model"), ("current", "version before"), ("this", "this version"))


def row(version: dict[str, Any]) -> tuple[str, ...]:
    """One line of an adapter's history."""
    results = version["example_results"]
    return (
        str(version["number"]),
        version["state"],
        str(version["rank"]),
        str(version["num_modules"]),
        str(version["size_bytes"]),
        "-" if results is None else _score(results["this"]),
        version["created_at"][:16].replace("T", " "),
    )


def print_version(version: dict[str, Any]) -> None:
    facts = [
        ("model", version["pinned_model"]),
        ("state", version["state"]),
        ("weights", version["weights_digest"]),
        ("version", version["version_digest"]),
        ("text", version["text_bundle_digest"] or "the base model's"),
        ("size", f"{version['size_bytes']} bytes, {version['num_modules']} modules"),
        ("rank", version["rank"]),
        ("created", version["created_at"]),
        *_probe(version["certificate"]),
        *_examples(version["example_results"]),
    ]
    for name, value in facts:
        click.echo(f"{name:<9} {value}")
    for finding in version["findings"]:
        click.echo(f"finding   {finding['where']}: {finding['message']} ({finding['code']})")


def _probe(report: dict[str, Any] | None) -> Iterator[tuple[str, object]]:
    if report is None:
        yield "probe", "not run"
        return
    yield "probe", "passed" if report["is_passed"] else "FAILED"
    yield (
        "",
        f"{report['num_modules']} modules recomputed, largest relative error"
        f" {report['largest_relative_error']:.1e} (bound {report['error_bound']:.1e})",
    )
    yield "", f"logits move by {report['logit_shift']:.3g} (noise {report['noise']:.1e})"
    if report["untouched_modules"]:
        yield "", f"untouched: {', '.join(report['untouched_modules'])}"
    if (coverage := report["coverage"]) is not None:
        kinds = ", ".join(f"{n} {kind}" for kind, n in coverage["num_modules_by_kind"].items())
        yield (
            "coverage",
            f"{kinds}; {coverage['num_parameters']} parameters,"
            f" ranks {coverage['min_rank']} to {coverage['max_rank']}",
        )
        yield (
            "",
            f"weights change by {coverage['median_relative_norm']:.2g} of their norm (median),"
            f" {coverage['largest_relative_norm']:.2g} at most",
        )
    if report["fingerprint"] is not None:
        yield "print", report["fingerprint"]


def _examples(results: dict[str, Any] | None) -> Iterator[tuple[str, object]]:
    if results is None:
        return
    for who, words in _EXAMINEES:
        if results[who] is not None:
            yield "examples", f"{words} {_score(results[who])}"
    if results["failed"]:
        yield "", f"failed: {', '.join(map(str, results['failed']))}"
    if results["num_left_out"]:
        yield "", f"{results['num_left_out']} not asked, for lack of time"


def _score(score: dict[str, Any]) -> str:
    return f"{score['passed']}/{score['total']}"
