"""What every generation may be asked for, whatever its route; each route adds what it alone has.

A body names these fields on the wire, so an unknown name beside them is refused by whoever decodes
it. Knows nothing of prompts, nor of what an answer looks like.
"""

import msgspec

from gateway.api.fields import (
    LogitBias,
    MaxCost,
    MinP,
    MinTokens,
    NumAnswers,
    NumLogprobs,
    NumTokens,
    Penalty,
    RepetitionPenalty,
    Seed,
    StopString,
    StopStrings,
    StreamOptions,
    Temperature,
    TokenIds,
    TopK,
    TopP,
    User,
    stop_strings,
)
from gateway.api.structured import Choices, Json, ResponseFormat, StructuredOutputs
from gateway.errors import InvalidRequest
from gateway.generation_request import GenerationSettings


class Asking(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What any generation may be asked for."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    min_tokens: MinTokens | None = None
    seed: Seed | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    # vLLM's way to say what the answer has to look like. It goes before `min_tokens`.
    structured_outputs: StructuredOutputs | None = None
    # Whom the client asks for: reports can be grouped by it, and a canary keeps each on one side.
    user: User | None = None
    # Ours: the most that the answer may cost, in nano-USD.
    max_cost: MaxCost | None = None
    # Known, and refused unless the value changes nothing: see `fields.NEUTRAL_VALUES`.
    include_stop_str_in_output: bool | None = None
    priority: int | None = None

    def settings(self) -> GenerationSettings:
        return GenerationSettings(
            is_streamed=bool(self.stream),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=self.logit_bias or {},
            min_tokens=self.min_tokens or 0,
            seed=self.seed,
            stops=stop_strings(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            shows_special_tokens=self.skip_special_tokens is False,
            max_cost_nano=self.max_cost,
        )


class AskingForChoices(Asking, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What chats and completions have in common: answers that are choices, one or several."""

    max_tokens: NumTokens | None = None
    # So many answers to each prompt, which is paid for once.
    n: NumAnswers | None = None
    stream_options: StreamOptions | None = None
    # Other ways to say what the answer has to look like; at most one of all.
    response_format: ResponseFormat | None = None
    guided_json: Json | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    # What is told beside the text.
    prompt_logprobs: NumLogprobs | None = None
    return_token_ids: bool | None = None
    # Known, and refused unless the value changes nothing: see `fields.NEUTRAL_VALUES`.
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    length_penalty: float | None = None
    return_tokens_as_token_ids: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    use_beam_search: bool | None = None


def check_stream_options(options: msgspec.Struct | None, *, is_streamed: bool | None) -> None:
    """Raises InvalidRequest."""
    if options is not None and not is_streamed:
        raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")
