"""Adapters' own templates: what they cost others, and what happens to those that do harm."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapters.text_bundle import TextBundle
from gateway.errors import GatewayError, LimitReached
from gateway.templates import MAX_STOPS, MAX_WAITING, OwnTemplate, TemplateFault, Templates
from tests.text_bombs import HIDDEN, TEMPLATE_BOMBS, TOKENIZER_BOMBS, Bomb, small_bundle

BASE = small_bundle()
GOOD = OwnTemplate.of("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
HARMLESS = {"messages": [{"role": "user", "content": "hello"}]}
TRIGGER = {"messages": [{"role": "user", "content": "now"}]}
# Uses its processor until it is stopped; the others end by themselves.
LOOP = OwnTemplate.of(HIDDEN["loops"])


@pytest.fixture
async def templates() -> AsyncIterator[Templates]:
    templates = Templates()
    yield templates
    await templates.close()


@pytest.fixture
async def patient() -> AsyncIterator[Templates]:
    """Stops nothing before others have had all the time they need."""
    templates = Templates(max_cpu_s=60)
    yield templates
    await templates.close()


async def build(
    templates: Templates, folder: Path, files: dict[str, bytes], *, num_added_tokens: int = 0
) -> tuple[TextBundle | None, set[str]]:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    paths = {name: folder / name for name in files}
    bundle, findings = await templates.build(paths, BASE, num_added_tokens=num_added_tokens)
    return bundle, {finding.code for finding in findings}


async def rendered(templates: Templates, template: OwnTemplate, *, caller: str) -> str:
    return await templates.render(template, HARMLESS, caller=caller)


@pytest.mark.parametrize("bomb", TEMPLATE_BOMBS, ids=lambda bomb: bomb.name)
async def test_a_harmful_template_is_refused_at_its_upload(templates, tmp_path, bomb: Bomb):
    bundle, codes = await build(templates, tmp_path, bomb.files(BASE))
    assert bundle is None
    assert bomb.code in codes


@pytest.mark.parametrize(
    "bomb", [b for b in TOKENIZER_BOMBS if b.name in ("deep JSON", "merges", "100 MB")]
)
async def test_a_harmful_tokenizer_is_refused_at_its_upload(templates, tmp_path, bomb: Bomb):
    bundle, codes = await build(templates, tmp_path, bomb.files(BASE))
    assert (bundle, codes) == (None, {bomb.code})


async def test_a_faulty_tokenizer_and_a_faulty_template_are_told_together(templates, tmp_path):
    files = {"tokenizer.json": b"[]", "chat_template.jinja": b"{% include 'x' %}"}
    _, codes = await build(templates, tmp_path, files)
    assert codes >= {"text_file_unreadable", "template_unsafe"}


async def test_a_good_template_becomes_a_bundle(templates, tmp_path):
    bundle, codes = await build(templates, tmp_path, {"chat_template.jinja": GOOD.source.encode()})
    assert codes == set()
    assert bundle is not None
    assert bundle.chat_template == GOOD.source


async def test_a_template_may_refuse_conversations_that_it_was_not_made_for(templates, tmp_path):
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    bundle, codes = await build(templates, tmp_path, {"chat_template.jinja": source.encode()})
    assert codes == set()
    assert bundle is not None


async def test_nothing_uploaded_starts_no_process(templates):
    assert await templates.build({}, BASE, num_added_tokens=0) == (None, [])


@pytest.mark.parametrize("name", HIDDEN)
async def test_harm_that_shows_only_later_is_that_requests_alone(templates, tmp_path, name):
    files = {"chat_template.jinja": HIDDEN[name].encode()}
    _, codes = await build(templates, tmp_path, files)
    assert codes == set()
    template = OwnTemplate.of(HIDDEN[name])
    with pytest.raises(TemplateFault) as caught:
        await templates.render(template, TRIGGER, caller="them")
    assert (caught.value.status, caught.value.code) == (400, "invalid_messages")
    assert await rendered(templates, template, caller="them") == "ok"


async def test_others_are_served_while_bombs_run(patient):
    # Once to be known as quick; a stranger's first time could meet the bombs in their lane.
    for caller in ("we", "they"):
        assert await rendered(patient, GOOD, caller=caller) == "<user>hello"
    bombs = [
        asyncio.create_task(
            patient.render(OwnTemplate.of(LOOP.source + str(number)), TRIGGER, caller=f"c{number}")
        )
        for number in range(6)
    ]
    for _ in range(50):
        for caller in ("we", "they"):
            assert await rendered(patient, GOOD, caller=caller) == "<user>hello"
    assert not any(bomb.done() for bomb in bombs)
    await patient.close()
    ends = await asyncio.gather(*bombs, return_exceptions=True)
    assert all(isinstance(end, GatewayError | asyncio.CancelledError) for end in ends)


async def test_one_callers_bombs_never_have_two_workers(patient):
    # Known as quick, so that nothing but the turns keeps the second one waiting.
    assert await rendered(patient, LOOP, caller="c") == "ok"
    assert await rendered(patient, GOOD, caller="we") == "<user>hello"
    bombs = [asyncio.create_task(patient.render(LOOP, TRIGGER, caller="c")) for _ in range(4)]
    for _ in range(20):
        await rendered(patient, GOOD, caller="we")
    assert not any(bomb.done() for bomb in bombs)
    await patient.close()
    await asyncio.gather(*bombs, return_exceptions=True)


async def test_a_template_that_was_stopped_often_is_not_tried_for_a_while(templates):
    recursion = OwnTemplate.of("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    for _ in range(MAX_STOPS):
        with pytest.raises(TemplateFault, match="refused"):
            await templates.render(recursion, HARMLESS, caller="them")
    with pytest.raises(TemplateFault, match="tried again in"):
        await templates.render(recursion, HARMLESS, caller="them")
    # A template that several share is refused to nobody for another's messages.
    with pytest.raises(TemplateFault, match="refused"):
        await templates.render(recursion, HARMLESS, caller="we")


async def test_a_caller_with_too_many_waiting_is_told_to_send_fewer(patient):
    waiting = [
        asyncio.create_task(patient.render(LOOP, TRIGGER, caller="c"))
        for _ in range(MAX_WAITING + 2)
    ]
    refused, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert len(refused) == 1
    with pytest.raises(LimitReached):
        refused.pop().result()
    await patient.close()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_who_no_longer_waits_takes_no_turn(templates):
    first = asyncio.create_task(templates.render(LOOP, TRIGGER, caller="c"))
    gone = [
        asyncio.create_task(templates.render(LOOP, TRIGGER, caller="c")) for _ in range(MAX_STOPS)
    ]
    await asyncio.sleep(0)
    for each in gone:
        each.cancel()
    with pytest.raises(TemplateFault):
        await first
    # Had the others been tried, it would be refused by now.
    assert await rendered(templates, LOOP, caller="c") == "ok"


async def test_messages_that_are_no_data_are_refused(templates):
    for content in (1 << 80, object(), "\ud800"):
        with pytest.raises(TemplateFault):
            await templates.render(GOOD, {"messages": [{"content": content}]}, caller="c")
    assert await rendered(templates, GOOD, caller="c") == "<user>hello"


async def test_a_worker_has_nothing_to_give_away(templates):
    before = _children()
    await rendered(templates, GOOD, caller="c")
    [process] = _children() - before
    assert len(list((process / "fd").iterdir())) == 3
    assert (process / "environ").read_bytes() == b""
    limits = {
        line[:26].strip(): line[26:].split()[:2]
        for line in (process / "limits").read_text().splitlines()
    }
    assert limits["Max open files"] == ["3", "3"]
    assert limits["Max file size"] == ["0", "0"]
    assert "unlimited" not in limits["Max address space"]


def _children() -> set[Path]:
    tasks = Path("/proc/self/task").glob("*/children")
    return {Path("/proc") / pid for task in tasks for pid in task.read_text().split()}


def test_a_worker_starts_without_the_gateways_web_stack():
    script = "import sys, gateway.template_worker; print(*sys.modules)"
    command = [sys.executable, "-c", script]
    loaded = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert loaded.isdisjoint({"litestar", "sqlalchemy", "httpx", "tokenizers", "numpy", "torch"})
