"""One of a request's answers while it grows: an engine's tokens in, text and an end out.

Knows what may end the text or hide it, and how many tokens are paid for. Knows nothing of links,
limits or ledgers, nor of the other answers to the same request.
"""

from typing import Literal

import msgspec

from engine.client import SequenceStream
from engine.protocol import SequenceEvent, SequenceState, TokenLogprob
from gateway.policies.moderation import Judge
from gateway.policies.screen import Screen, Text
from gateway.tools.pieces import Piece
from gateway.tools.reader import Reader
from gateway.tools.reasoning import ThoughtCount

FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]
# Why an answer is shorter than was asked for, where money is the reason.
StoppedBy = Literal["budget", "max_cost"]


class Delta(msgspec.Struct, frozen=True):
    """What one engine step added to an answer. The last one has a finish reason.

    A struct, because there is one of each token: it is made in a seventh of the time.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    # Which of the request's answers it belongs to.
    index: int = 0
    # With the finish reason.
    stopped_by: StoppedBy | None = None
    # The token that ended the answer: counted, and not shown.
    end_token_id: int | None = None
    # Of the prompt's tokens but the first, where asked for: with the first tokens alone.
    prompt_logprobs: list[TokenLogprob] | None = None
    # What the text was read as, of an answer with calls or thoughts in it; None of any other.
    pieces: list[Piece] | None = None


class Choice:
    """Mutable: feed it with the events of its sequence, the final one last."""

    def __init__(
        self,
        stream: SequenceStream,
        text: Text,
        *,
        index: int = 0,
        judge: Judge | None = None,
        reader: Reader | None = None,
        thoughts: ThoughtCount | None = None,
        is_cut_by_max_cost: bool = False,
        shows_special_tokens: bool = False,
    ) -> None:
        self.stream = stream
        self.index = index
        # Those that are counted.
        self.num_tokens = 0
        # Filled with the last delta. Calls are no outcome: the model stopped.
        self.outcome: FinishReason | None = None
        # What was said so far, where the texts of the request are kept.
        self.said: list[str] = []
        self._text = text
        self._screen = text if isinstance(text, Screen) else None
        self._judge = judge
        # None where the answer is only text, as it is of most requests.
        self._reader = reader
        self._thoughts = thoughts
        self._is_cut_by_max_cost = is_cut_by_max_cost
        self._shows_special_tokens = shows_special_tokens

    @property
    def sequence_id(self) -> int:
        return self.stream.sequence_id

    def take(self, event: SequenceEvent, *, max_tokens: int | None) -> Delta:
        """What an event adds; of its tokens at most so many are paid for, or all of them."""
        token_ids = event.token_ids if max_tokens is None else event.token_ids[:max_tokens]
        is_cut = len(token_ids) < len(event.token_ids)
        is_stopped = event.state is SequenceState.STOPPED and not is_cut
        text, num_used = self._feed(token_ids, is_stopped=is_stopped)
        self.num_tokens += num_used
        if not (is_cut or event.state.is_final or self.outcome or self._screen):
            # Almost every event: the answer goes on.
            told = event.logprobs or []
            return Delta(
                text, token_ids, told, None, self.index, prompt_logprobs=event.prompt_logprobs
            )
        token_ids = token_ids[:num_used]
        stopped_by: StoppedBy | None = None
        end_token_id: int | None = None
        if self.outcome is None and is_cut:
            self.stream.abort()
            self.outcome, stopped_by = "length", "budget"
            text += self._text.finish()
        elif self.outcome is None and event.state.is_final:
            self.outcome = "stop" if is_stopped else "length"
            if not is_stopped and self._is_cut_by_max_cost:
                stopped_by = "max_cost"
            text += self._text.finish()
            if is_stopped and token_ids:
                *token_ids, end_token_id = token_ids
        if self._screen is not None and self._screen.is_refused:
            self.outcome, stopped_by = "content_filter", None
        return Delta(
            text=text,
            token_ids=token_ids,
            logprobs=(event.logprobs or [])[: len(token_ids)],
            finish_reason=self.outcome,
            index=self.index,
            stopped_by=stopped_by,
            end_token_id=end_token_id,
            prompt_logprobs=event.prompt_logprobs,
        )

    def _feed(self, token_ids: list[int], *, is_stopped: bool) -> tuple[str, int]:
        """Their text, and how many of them there are up to a stop string's end."""
        text = ""
        # A special token that ends the answer would be shown where those are.
        hidden = len(token_ids) if self._shows_special_tokens and is_stopped else None
        for num_used, token_id in enumerate(token_ids, start=1):
            if num_used == hidden:
                break
            text += self._text.feed(token_id)
            if self._text.is_stopped:
                # Tokens that the engine made since are its own affair.
                self.stream.abort()
                self.outcome = "stop"
                return text, num_used
        return text, len(token_ids)

    @property
    def is_judged(self) -> bool:
        return self._judge is not None

    async def judge(self, delta: Delta) -> Delta:
        """What of the answer its moderation allows by now. Raises Unavailable."""
        if self._judge is None:
            return delta
        allowed = await self._judge.hear(delta.text, is_last=delta.finish_reason is not None)
        if allowed is not None:
            return msgspec.structs.replace(delta, text=allowed)
        if self.outcome is None:
            self.stream.abort()
        self.outcome = "content_filter"
        return msgspec.structs.replace(
            delta, text="", finish_reason="content_filter", stopped_by=None
        )

    def read(self, delta: Delta) -> Delta:
        """The same with what its text was read as; call it once for each delta, in order."""
        if self._reader is None:
            return delta
        pieces, reason, stopped_by = self._reader.feed(delta.text), delta.finish_reason, None
        if reason is not None:
            pieces += self._reader.finish(is_cut=reason != "stop")
        if self._reader.is_refused:
            if self.outcome is None:
                self.stream.abort()
            self.outcome = reason = "content_filter"
        elif reason == "stop" and self._reader.has_calls:
            reason = "tool_calls"
        else:
            stopped_by = delta.stopped_by
        return msgspec.structs.replace(
            delta, pieces=pieces, finish_reason=reason, stopped_by=stopped_by
        )

    @property
    def reasoning_tokens(self) -> int | None:
        """How many it thought with so far; None of a model that does not."""
        return None if self._thoughts is None else self._thoughts.num_tokens
