"""What a client may ask of /v1/responses, and what that means to the path of a generation."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec

from gateway.api.asking import Asking, check_stream_options
from gateway.api.fields import (
    Metadata,
    NumLogprobs,
    NumTokens,
    ServiceTier,
    TemplateVariables,
    User,
    end_user,
    given_fields,
    not_served,
    priority_of,
    refuse_unserved,
)
from gateway.api.responses.conversation import Items, conversation
from gateway.api.structured import TextFormat, asked_text_grammar
from gateway.api.tools import (
    Chosen,
    Function,
    FunctionDefinition,
    FunctionName,
    check_form,
    toolbox_of,
)
from gateway.auth import Principal
from gateway.errors import InvalidRequest
from gateway.generation_request import GenerationRequest
from gateway.tools.toolbox import Toolbox

LOGPROBS = "message.output_text.logprobs"
# Thoughts come as a text that may be sent back, so nothing has to be hidden in them for that.
Includable = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function of the client's. With `strict` its arguments always follow `parameters`."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    # JSON schema of an object; none where it is left out.
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    # Known, and refused unless the value changes nothing: see `fields.NEUTRAL_VALUES`.
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    output_schema: dict[str, Any] | None = None


class NamedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="function"):
    """The one function that has to be called."""

    name: FunctionName


class AllowedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function of `tools`, by its name."""

    name: FunctionName
    type: Literal["function"] = "function"


class AllowedTools(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="allowed_tools"):
    """The functions that may be called, of all that the model is told of."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedFunction], msgspec.Meta(min_length=1, max_length=128)]


FunctionTools = Annotated[list[FunctionTool], msgspec.Meta(max_length=128)]
ToolChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedTools


class TextOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the answer has to look like."""

    format: TextFormat | None = None
    # Known, and refused unless the value changes nothing.
    verbosity: str | None = None


class Reasoning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to think. Models think as their templates say, so only what that is may be asked for."""

    context: str | None = None
    effort: str | None = None
    generate_summary: str | None = None
    mode: str | None = None
    summary: str | None = None


class ResponseStreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream has besides its text."""

    # Padding against traffic analysis: accepted, and events are not padded.
    include_obfuscation: bool | None = None


class ResponseRequest(Asking, frozen=True, forbid_unknown_fields=True):
    """OpenAI's request for a response; known fields that are not served are refused by name."""

    model: str
    # A text, or all of the conversation so far.
    input: str | Items
    # The system message, before all that `input` has.
    instructions: str | None = None
    max_output_tokens: NumTokens | None = None
    # So many alternatives beside each token, where `include` asks for log-probabilities.
    top_logprobs: NumLogprobs | None = None
    include: list[Includable] | None = None
    text: TextOptions | None = None
    # What the answer may call, and whether it must.
    tools: FunctionTools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    # Comes back with the answer.
    metadata: Metadata | None = None
    # The newer word for `user`.
    safety_identifier: User | None = None
    # A hint where to look for the prompt's beginning. There is one place to look.
    prompt_cache_key: Annotated[str, msgspec.Meta(max_length=512)] | None = None
    # Who may wait, and who may not be kept waiting.
    service_tier: ServiceTier | None = None
    # As in a chat request.
    chat_template_kwargs: TemplateVariables | None = None
    # Known, and refused unless the value changes nothing: see `fields.NEUTRAL_VALUES`.
    access_programs: Any | None = None
    background: bool | None = None
    background_options: Any | None = None
    context_management: list[Any] | None = None
    conversation: Any | None = None
    image: Any | None = None
    max_tool_calls: int | None = None
    moderation: Any | None = None
    previous_response_id: str | None = None
    prompt: Any | None = None
    prompt_cache_options: Any | None = None
    prompt_cache_retention: str | None = None
    reasoning: Reasoning | None = None
    store: bool | None = None
    truncation: str | None = None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())


def read_request(data: ResponseRequest, principal: Principal) -> GenerationRequest:
    """What is asked for, freed of its spelling.

    Raises InvalidRequest, and NotAllowed where the key may not go before others.
    """
    _refuse(data)
    toolbox = _toolbox(data)
    grammar = asked_text_grammar(
        data.text.format if data.text else None,
        data.structured_outputs,
        ignore_eos=bool(data.ignore_eos),
    )
    if toolbox is not None:
        check_form(toolbox, grammar, ignore_eos=bool(data.ignore_eos))
    return GenerationRequest(
        endpoint="responses",
        model=data.model,
        user=end_user(data.user or data.safety_identifier),
        prompts=[conversation(data.input, instructions=data.instructions)],
        max_tokens=data.max_output_tokens,
        logprobs=(data.top_logprobs or 0) if data.wants_logprobs else None,
        template_variables=data.chat_template_kwargs or {},
        priority=priority_of(data.service_tier, principal),
        settings=data.settings(),
        fields=partial(_given, data),
        grammar=grammar,
        tools=toolbox,
    )


def _refuse(data: ResponseRequest) -> None:
    refuse_unserved(data)
    if data.prompt is not None:
        raise not_served("prompt")
    if data.text is not None:
        refuse_unserved(data.text, place="text.")
    if data.reasoning is not None:
        refuse_unserved(data.reasoning, place="reasoning.")
        if data.reasoning.summary is not None:
            raise not_served("reasoning.summary")
    check_stream_options(data.stream_options, is_streamed=data.stream)
    if data.top_logprobs and not data.wants_logprobs:
        raise InvalidRequest(
            f"'top_logprobs' needs 'include': [{LOGPROBS!r}].", param="top_logprobs"
        )


def _toolbox(data: ResponseRequest) -> Toolbox | None:
    return toolbox_of(
        [_function(tool, f"tools[{number}]") for number, tool in enumerate(data.tools or ())],
        _chosen(data.tool_choice),
        is_parallel=data.parallel_tool_calls is not False,
    )


def _function(tool: FunctionTool, place: str) -> Function:
    refuse_unserved(tool, place=f"{place}.")
    described = FunctionDefinition(tool.name, tool.description, tool.parameters, tool.strict)
    return Function(described, place)


def _chosen(choice: ToolChoice | None) -> Chosen:
    match choice:
        case NamedFunction(name):
            return Chosen.one(name, place="tool_choice.name")
        case AllowedTools(mode, tools):
            return Chosen(mode, _places(tools))
        case _:
            return Chosen(choice or "auto")


def _places(tools: Sequence[AllowedFunction]) -> dict[str, str]:
    return {tool.name: f"tool_choice.tools[{number}].name" for number, tool in enumerate(tools)}


def _given(data: ResponseRequest) -> frozenset[str]:
    """Only log-probabilities are something that `include` adds to an answer."""
    given = given_fields(data)
    return given if data.wants_logprobs else given - {"include"}
