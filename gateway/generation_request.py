"""What a client asked for, checked and freed of its spelling.

Knows what of it an engine, a policy and a chat template are told. Knows nothing of HTTP, money or
of what comes of it.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.protocol import SamplingParams
from gateway import prompts as prompting
from gateway.errors import InvalidRequest
from gateway.grammars import AskedGrammar
from gateway.policies.rules import Asked
from gateway.prompts import Prompt, TokenPrompt
from gateway.text import Ending, TextCodec
from gateway.tools.reasoning import Thinking
from gateway.tools.toolbox import Toolbox

# Tokens of which one character may consist: each may be one of its bytes.
MAX_TOKENS_OF_CHARACTER = 4


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How tokens are chosen and told, and where they end, whatever the prompt."""

    is_streamed: bool
    # Here and below, None where the client named none.
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    # By token id.
    logit_bias: Mapping[int, float]
    min_tokens: int
    seed: int | None
    stops: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    shows_special_tokens: bool
    # Nano-USD that the client will pay at most.
    max_cost_nano: int | None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request for answers: to each of its prompts as many."""

    # e.g. "chat.completions"; reports are grouped by it
    endpoint: str
    model: str
    # Whom the client asks for, in its own words: reports can be grouped by it, and one user always
    # gets the same side of a canary.
    user: str | None
    # Usually one; each is answered `num_choices` times.
    prompts: Sequence[Prompt]
    # None where the client named none.
    max_tokens: int | None
    settings: GenerationSettings
    # How many alternatives beside each token's own log-probability; None for neither.
    logprobs: int | None
    # How many alternatives beside the log-probability of each prompt token; None for neither.
    prompt_logprobs: int | None = None
    num_choices: int = 1
    # How a chat template ends the prompt, and what else it is told.
    ending: Ending = Ending.ASKING
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    # Whether the client is told token ids, so that no delta without a text may be passed over.
    tells_token_ids: bool = False
    # The engine's class: of what waits, the least goes first.
    priority: int = 0
    # Names the fields that the client gave, where a policy asks.
    fields: Callable[[], frozenset[str]] = frozenset
    # None leaves the answer free.
    grammar: AskedGrammar | None = None
    # What the answer may call; None for nothing.
    tools: Toolbox | None = None

    async def encode(self, codec: TextCodec, *, caller: str) -> list[list[int]]:
        """The token ids of each prompt. Raises TemplateFault, InvalidRequest, LimitReached."""
        return [
            await prompting.encode(
                codec,
                prompt,
                caller=caller,
                ending=self.ending,
                variables=self.template_variables,
                tools=self.tools,
            )
            for prompt in self.prompts
        ]

    def seen_by_policy(
        self, codec: TextCodec, encoded: Sequence[Sequence[int]], *, max_tokens: int
    ) -> Asked:
        return prompting.seen_by_policy(
            self.prompts, codec, encoded, self.fields(), max_tokens=max_tokens, tools=self.tools
        )

    def thinking(self, codec: TextCodec, encoded: Sequence[Sequence[int]]) -> Thinking:
        """Thoughts are told from answers that a conversation's assistant begins, and no others."""
        is_text = any(isinstance(prompt, str | TokenPrompt) for prompt in self.prompts)
        if is_text or self.ending is Ending.CONTINUING:
            return "never"
        return codec.thinking_after(encoded[0])

    def continued(self, place: int, prompt_ids: Sequence[int]) -> Sequence[int]:
        """The last tokens of a text that an answer goes on with; in a chat it mostly begins anew.

        `place` is the prompt's, and `prompt_ids` are its tokens.
        """
        is_text = isinstance(self.prompts[place], str | TokenPrompt)
        if is_text or self.ending is Ending.CONTINUING:
            return prompt_ids[-MAX_TOKENS_OF_CHARACTER:]
        return ()

    def check_tokens(self, *, max_tokens: int, vocab_size: int) -> None:
        """Raises InvalidRequest for tokens that cannot come."""
        if self.settings.min_tokens > max_tokens:
            raise InvalidRequest(
                f"'min_tokens' is {self.settings.min_tokens}, above the {max_tokens} that may come"
                " at most: lower it, or let more come.",
                param="min_tokens",
            )
        if max(self.settings.logit_bias, default=0) >= vocab_size:
            raise InvalidRequest(
                "'logit_bias' names a token that the model does not have: ids go to"
                f" {vocab_size - 1}.",
                param="logit_bias",
            )

    def too_little_money(self, num_answers: int) -> InvalidRequest:
        return InvalidRequest(
            f"'max_cost' is {self.settings.max_cost_nano} nano-USD, which does not pay for the"
            f" prompt and one token of each of {num_answers} answers: raise it or ask for fewer.",
            param="max_cost",
        )

    def sampling(self, codec: TextCodec, max_tokens: int, *, number: int) -> SamplingParams:
        """Of one answer: its number among those to the same prompt is added to the seed."""
        settings, defaults = self.settings, codec.generation_defaults
        eos = () if settings.ignore_eos else codec.eos_token_ids

        def choose(asked: float | None, name: str, otherwise: float) -> float:
            return asked if asked is not None else defaults.get(name, otherwise)

        return SamplingParams(
            max_tokens=max_tokens,
            seed=secrets.randbits(64)
            if settings.seed is None
            else (settings.seed + number) % 2**64,
            temperature=choose(settings.temperature, "temperature", 1.0),
            top_p=choose(settings.top_p, "top_p", 1.0),
            top_k=int(choose(settings.top_k, "top_k", 0)),
            min_p=settings.min_p,
            presence_penalty=settings.presence_penalty,
            frequency_penalty=settings.frequency_penalty,
            repetition_penalty=settings.repetition_penalty,
            logit_bias=dict(settings.logit_bias),
            # `max_cost` may have lowered the other.
            min_tokens=min(settings.min_tokens, max_tokens),
            stop_token_ids=(*eos, *settings.stop_token_ids),
            logprobs=self.logprobs,
            # Computing them passes over the cache, so one answer does it for all that can wait.
            prompt_logprobs=self.prompt_logprobs if settings.is_streamed or not number else None,
        )
