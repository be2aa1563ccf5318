"""Facts about certificates: what they say, always alike, on a page that needs nothing else."""

import datetime
import re
from collections.abc import AsyncIterator
from html import escape
from pathlib import Path

import msgspec
import pytest

from adapters.errors import Finding
from engine.errors import EngineUnreachable
from engine.protocol import ProbeCoverage, ProbeReport
from gateway.aliases import ExampleResults, Score
from gateway.certificate import Certificate, to_html, to_text
from gateway.database import Database
from tests.gateway.admin_plane import Plane, adapter_files, admin_plane, report

VERSION = "/admin/v1/tenants/acme/adapters/sql/versions/1"
PASSED = Certificate(
    tenant="acme",
    adapter="sql",
    version=3,
    pinned_model="acme-sql@3",
    is_passed=True,
    uploaded_at=datetime.datetime(2026, 1, 31, 12, 5, 9, tzinfo=datetime.UTC),
    base_model="Tiny-Base",
    base_digest="b" * 64,
    weights_digest="c" * 64,
    version_digest="d" * 64,
    text_bundle_digest=None,
    rank=16,
    size_bytes=1234567,
    source_files={"adapter_model.safetensors": "f" * 64, "adapter_config.json": "e" * 64},
    probe=report(
        "c" * 64,
        num_modules=60,
        fingerprint="a" * 64,
        coverage=ProbeCoverage(
            num_modules_by_kind={"lora": 60, "dora": 30},
            num_parameters=460800,
            min_rank=8,
            max_rank=16,
            largest_relative_norm=0.0123,
            median_relative_norm=0.004,
        ),
    ),
    example_results=ExampleResults(
        this_version=Score(3, 4),
        current=Score(2, 4),
        current_version=2,
        base=Score(0, 4),
        failed=[4],
    ),
    findings=[],
)
PAGE = f"""\
Certificate of acme-sql@3
=========================

Passed: it changes the base model's answers, and every module by what it should.

What it is
  tenant                     acme
  adapter                    sql
  version                    3
  base model                 Tiny-Base
  uploaded                   2026-01-31 12:05:09 UTC
  size of the weights        1,234,567 bytes

Digests (SHA-256)
  version                    {"d" * 64}
  weights                    {"c" * 64}
  tokenizer and template     the base model's
  base model                 {"b" * 64}
  values as prepared         {"a" * 64}

Files as uploaded (SHA-256)
  adapter_config.json        {"e" * 64}
  adapter_model.safetensors  {"f" * 64}

What it changes
  modules                    60
    by dora                  30
    by lora                  60
  parameters                 460,800
  ranks                      8 to 16
  |W' - W| / |W|, largest    1.230e-02
  |W' - W| / |W|, median     4.000e-03

What the probe measured
  largest relative error     1.000e-07
    at most allowed          1.000e-04
  logits moved by            5.000e-01
    by noise alone           1.000e-05

Its examples, answered as expected
  base model alone           0 of 4
  version 2, until then      2 of 4
  this version               3 of 4
    not numbers              4
"""
REFUSED = msgspec.structs.replace(
    PASSED,
    is_passed=False,
    source_files=None,
    example_results=None,
    findings=[Finding("module_untouched", "<b>\x1b[31m", "changes nothing", "train it")],
)


@pytest.fixture
async def plane(database: Database, tmp_path: Path) -> AsyncIterator[Plane]:
    async with admin_plane(database, tmp_path) as plane:
        await plane.make_tenant("acme")
        yield plane


def test_the_page_says_all_of_it_in_columns() -> None:
    assert to_text(PASSED) == PAGE


def test_a_refused_version_has_its_reasons_on_the_page() -> None:
    page = to_text(REFUSED)
    assert "Refused: it is not served" in page
    assert "module_untouched" in page
    assert "changes nothing; train it" in page


def test_the_page_for_browsers_says_the_same_and_loads_nothing() -> None:
    page = to_html(PASSED)
    for line in PAGE.replace("=" * 25, "").splitlines():
        for word in re.split(" {2,}", line.strip()):
            assert escape(word) in page
    assert re.search(r"src=|href=|url\(|@import|<script", page) is None


def test_what_others_named_is_no_markup_and_no_control_character() -> None:
    assert "<b>" not in to_html(REFUSED)
    assert "\x1b" not in to_html(REFUSED) + to_text(REFUSED)


async def test_a_version_has_its_certificate_in_every_form(plane: Plane) -> None:
    answer = await plane.upload(adapter_files(rank=3))
    told = (await plane.client.get(f"{VERSION}/certificate")).json()
    assert told["probe"] == answer.json()["certificate"]
    assert (told["rank"], told["base_model"], told["is_passed"]) == (3, "Tiny-Base", True)
    same = msgspec.convert(told, Certificate)
    for form, kind, page in (
        ("text", "text/plain", to_text(same)),
        ("html", "text/html", to_html(same)),
    ):
        answer = await plane.client.get(f"{VERSION}/certificate", params={"format": form})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        assert answer.text == page


async def test_a_form_that_there_is_not_is_refused(plane: Plane) -> None:
    await plane.upload()
    for params, named in (({"format": "pdf"}, "format"), ({"as": "text"}, "as")):
        answer = await plane.client.get(f"{VERSION}/certificate", params=params)
        assert (answer.status_code, answer.json()["param"]) == (400, named)


async def test_a_version_that_is_not_probed_has_no_certificate_yet(plane: Plane) -> None:
    async def unreachable(digest: str) -> ProbeReport:
        raise EngineUnreachable

    plane.probe.answer = unreachable
    await plane.upload()
    answer = await plane.client.get(f"{VERSION}/certificate")
    assert (answer.status_code, "no engine has probed it" in answer.json()["detail"]) == (404, True)
