"""One request under its tenant's policy, from its prompt to the end of its answer.

Asks the rules first, then the moderation, and counts what they decide.
"""

from dataclasses import dataclass

from gateway.errors import ContentRefused, PolicyViolation
from gateway.policies.decisions import Decisions
from gateway.policies.moderation import Judge, Moderation, Subject, not_answered
from gateway.policies.patterns import first_hit
from gateway.policies.rules import Asked, Rules
from gateway.policies.screen import Screen, Text, Window

BETWEEN_MESSAGES = "\n\n"


@dataclass(frozen=True, slots=True)
class Enforced:
    """A policy in use: its rules, and its moderation where it has one."""

    rules: Rules
    moderation: Moderation | None


class Watch:
    """One request under a policy, from its prompt to the end of its answer."""

    def __init__(self, enforced: Enforced, subject: Subject, decisions: Decisions) -> None:
        self._enforced = enforced
        self._subject = subject
        self._decisions = decisions

    async def admit(self, asked: Asked) -> int:
        """How many tokens the answer may have.

        Raises PolicyViolation, ContentRefused, or Unavailable where the moderation does not answer
        and its policy fails closed.
        """
        try:
            max_tokens = await self._enforced.rules.check(asked)
        except PolicyViolation as error:
            self._count(error.policy_rule)
            raise
        moderation = self._enforced.moderation
        if moderation is not None and "input" in moderation.hook.check:
            await self._moderate(moderation, asked)
        self._decisions.count(self._subject.tenant_id, "request", "passed")
        return max_tokens

    async def _moderate(self, moderation: Moderation, asked: Asked) -> None:
        text = BETWEEN_MESSAGES.join(asked.texts())
        judgement = await moderation.ask(self._subject, "input", text)
        self._decisions.count(self._subject.tenant_id, "moderation/input", judgement.verdict)
        if judgement.verdict == "failed_closed":
            raise not_answered()
        if judgement.verdict == "refused":
            said = f": {judgement.reason}" if judgement.reason else "."
            raise ContentRefused(
                f"The moderation refused the prompt{said}",
                param=asked.prompt_field,
                policy_rule="moderation/input",
            )

    def screen(self, text: Text) -> Screen | None:
        """The answer's text under the deny rules; None where there are none."""
        rules = self._enforced.rules
        if not rules.deny_output:
            return None
        window = Window(rules.deny_output, window_chars=rules.policy.window_chars)
        return Screen(text, window, on_hit=lambda name: self._count(f"deny_output/{name}"))

    @property
    def reads_answers(self) -> bool:
        return bool(self._enforced.rules.deny_output)

    def allows(self, text: str) -> bool:
        """Whether the deny rules let a text pass that belongs to the answer, and is whole."""
        name = first_hit(self._enforced.rules.deny_output, text)
        if name is not None:
            self._count(f"deny_output/{name}")
        return name is None

    def judge(self, *, is_streamed: bool) -> Judge | None:
        """Who allows the answer; None where nobody is asked."""
        moderation = self._enforced.moderation
        if moderation is None or "output" not in moderation.hook.check:
            return None
        return Judge(
            moderation,
            self._subject,
            is_streamed=is_streamed,
            on_judged=lambda verdict: self._decisions.count(
                self._subject.tenant_id, "moderation/output", verdict
            ),
        )

    def _count(self, rule: str) -> None:
        self._decisions.count(self._subject.tenant_id, rule, "refused")
