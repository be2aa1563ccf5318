"""A process that runs what strangers wrote: chat templates, uploaded tokenizers, and grammars.

Started by `gateway.templates` or `gateway.grammars`, and told one job at a time over its standard
input; answers over its standard output. It has no environment, no files, no user's rights, little
memory, and a clock that ends it: whoever asks must be ready for the answer not to come.
"""

import contextlib
import functools
import importlib
import os
import pwd
import resource
import signal
import struct
import sys
import time
from typing import Any, BinaryIO, Literal

import jinja2
import msgspec

from adapters.errors import Finding
from gateway import chat_template

MIB = 1 << 20
# Rendering takes some 30; a bundle of 262,000 tokens beside its base's was built in 800.
# Grammars that take more than some 50 take too long as well.
MAX_MEMORY_BYTES = {"render": 384 * MIB, "build": 2048 * MIB, "grammar": 768 * MIB}
# Of a processor, to read, build and try a tokenizer; that bundle took 5.
BUILD_CPU_S = 20.0
TRIAL_CPU_S = 1.0
# For each trial, beside eight times the conversation's own length.
TRIAL_CHARACTERS = 128 << 10
NUM_TEMPLATES = 64
NOBODY = "nobody"
# What findings about a template are about, in whichever file it came.
WHERE = "chat template"

# Said once, before the first job is read.
READY = b"!"
_LENGTH = struct.Struct("!I")


# "ebnf" is Lark's notation, or that of llama.cpp; "calls" a `gateway.tools.notation.CallForm`.
GrammarForm = Literal["json_schema", "regex", "ebnf", "calls"]
GrammarKind = Literal["json_schema", "regex", "lark"]


class Render(msgspec.Struct, tag=True):
    """Render a template. Answered by Text or Fault."""

    source: str
    variables: dict[str, Any]
    max_characters: int
    max_cpu_s: float


class Try(msgspec.Struct, tag=True):
    """Try a new template on fixed conversations. Answered by Findings."""

    source: str
    special_tokens: dict[str, str]


class Build(msgspec.Struct, tag=True):
    """Make an adapter's bundle, as `tokenizer_files.build` does. Answered by Built."""

    files: dict[str, bytes]
    # Encoded.
    base: bytes
    num_added_tokens: int


class Examine(msgspec.Struct, tag=True):
    """Read a grammar and compile it. Answered by Examined."""

    kind: GrammarForm
    text: str
    max_cpu_s: float


class Text(msgspec.Struct, tag=True):
    text: str
    # What it took of a processor.
    cpu_s: float


class Fault(msgspec.Struct, tag=True):
    """A template did not take its variables, or was stopped."""

    message: str
    is_stopped: bool


class Findings(msgspec.Struct, tag=True):
    findings: list[Finding]


class Built(msgspec.Struct, tag=True):
    # Encoded; None where the base's serves.
    bundle: bytes | None
    findings: list[Finding]
    # What is left to try: the adapter's own template, and the special tokens that it sees.
    template: str | None
    special_tokens: dict[str, str]


class Examined(msgspec.Struct, tag=True):
    # As the engine takes it; means nothing where there is a fault.
    kind: GrammarKind
    text: str
    # What is wrong with it, in words.
    fault: str | None = None


Job = Render | Try | Build | Examine
Answer = Text | Fault | Findings | Built | Examined
Mode = Literal["render", "build", "grammar"]

_decode_job = msgspec.msgpack.Decoder(Job).decode
_encode = msgspec.msgpack.Encoder().encode


def main(mode: Mode) -> None:
    if mode == "build":
        # Brings a shared library, which can be opened only now.
        importlib.import_module("adapters.tokenizer_files")
    if mode == "grammar":
        _examine(Examine("regex", "a", max_cpu_s=0))
    _warm_up()
    _seal(MAX_MEMORY_BYTES[mode])
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    while (data := _receive(sys.stdin.buffer)) is not None:
        answer = _encode(_run(_decode_job(data)))
        _limit(0)
        sys.stdout.buffer.write(_LENGTH.pack(len(answer)) + answer)
        sys.stdout.buffer.flush()


def _warm_up() -> None:
    """Have Python and Jinja import all that they load late: afterwards no file can be opened."""
    variables = {"messages": chat_template.PLAIN}
    for source in ("{{ messages | tojson }}{{ strftime_now('%d %B %Y') }}", "{{ messages + 1 }}"):
        with contextlib.suppress(TypeError):
            chat_template.render(chat_template.compiled(source), variables)


def _seal(max_memory_bytes: int) -> None:
    """Give up whatever a job does not need."""
    os.chdir("/")
    if os.geteuid() == 0:
        with contextlib.suppress(KeyError, PermissionError):
            nobody = pwd.getpwnam(NOBODY)
            os.setgroups([])
            os.setgid(nobody.pw_gid)
            os.setuid(nobody.pw_uid)
    # No new descriptor means no file, no socket and no pipe to another process.
    for what, most in (
        (resource.RLIMIT_AS, max_memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        resource.setrlimit(what, (most, most))


def _limit(cpu_s: float) -> None:
    """End this process once it has used so much more of a processor; 0 takes the limit back.

    The signal's own action does it: nothing that runs here can hold it up.
    """
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def _receive(file: BinaryIO) -> bytes | None:
    head = file.read(_LENGTH.size)
    return file.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else None


def _run(job: Job) -> Answer:
    match job:
        case Render():
            return _render(job)
        case Try():
            return Findings(_try(job))
        case Build():
            return _build(job)
        case Examine():
            return _examine(job)


@functools.lru_cache(maxsize=NUM_TEMPLATES)
def _compiled(source: str) -> jinja2.Template:
    return chat_template.compiled(source)


def _render(job: Render) -> Text | Fault:
    started = time.process_time()
    _limit(job.max_cpu_s)
    try:
        text = chat_template.render_at_most(
            _compiled(job.source), job.variables, max_characters=job.max_characters
        )
        # Half a character can be written in a template, and is no text.
        text.encode()
    except chat_template.FAULTS as error:
        is_stopped = isinstance(error, chat_template.TooMuchText | RecursionError)
        return Fault(_say(error), is_stopped=is_stopped)
    except MemoryError:
        return Fault("It takes too much memory.", is_stopped=True)
    return Text(text, cpu_s=time.process_time() - started)


def _say(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:500]


def _try(job: Try) -> list[Finding]:
    _limit(TRIAL_CPU_S)
    try:
        problems = chat_template.forbidden(job.source)
    except (*chat_template.FAULTS, MemoryError) as error:
        return [finding("template_syntax", f"cannot be read: {_say(error)}")]
    findings = [finding("template_unsafe", problem) for problem in problems]
    for place, variables in enumerate(chat_template.trials(job.source)):
        _limit(TRIAL_CPU_S)
        most = TRIAL_CHARACTERS + 8 * sum(len(m["content"]) for m in variables["messages"])
        try:
            chat_template.render_at_most(
                _compiled(job.source), variables | job.special_tokens, max_characters=most
            )
        except (*chat_template.FAULTS, MemoryError) as error:
            findings += _judge(error, is_plain=place == 0)
    return list(dict.fromkeys(findings))


def _judge(error: BaseException, *, is_plain: bool) -> list[Finding]:
    if isinstance(error, MemoryError):
        return [finding("template_bomb", "takes too much memory")]
    if isinstance(error, chat_template.TooMuchText | RecursionError | OverflowError):
        return [finding("template_bomb", f"goes beyond all bounds: {_say(error)}")]
    if chat_template.is_unsafe(error):
        return [finding("template_unsafe", _say(error))]
    if is_plain:
        return [finding("template_fails", f"does not take one question: {_say(error)}")]
    return []


def finding(code: str, problem: str) -> Finding:
    """One about a chat template."""
    return Finding(
        code=code,
        where=WHERE,
        message=problem,
        fix="correct the chat template, or leave it out to use the base model's",
    )


def _build(job: Build) -> Built:
    from adapters import text_bundle, tokenizer_files

    _limit(BUILD_CPU_S)
    base = text_bundle.decode(job.base)
    template, special_tokens = tokenizer_files.chat_template(job.files, base)
    bundle, findings = tokenizer_files.build(job.files, base, num_added_tokens=job.num_added_tokens)
    encoded = text_bundle.encode(bundle) if bundle else None
    return Built(encoded, findings, template=template, special_tokens=special_tokens)


def _examine(job: Examine) -> Examined:
    from gateway import grammar_forms

    _limit(job.max_cpu_s)
    try:
        found = grammar_forms.read(job.kind, job.text)
        fault = grammar_forms.fault_of(found.kind, found.trial)
        return Examined(found.kind, found.text, fault=fault)
    except grammar_forms.Refused as refusal:
        return Examined("regex", "", fault=str(refusal))
    except (MemoryError, RecursionError):
        return Examined("regex", "", fault="it is too large, or too deeply nested")


if __name__ == "__main__":
    (wanted,) = sys.argv[1:]
    main(wanted)  # type: ignore[arg-type]  # `gateway.templates` passes a mode
