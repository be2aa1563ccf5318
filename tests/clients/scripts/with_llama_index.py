"""LlamaIndex's OpenAI-like models."""

import json
from typing import Any

from asking import (
    BASE_URL,
    EMBEDDER,
    ENOUGH_TOKENS,
    KEY,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    TEXTS,
    Review,
    Weather,
    error_of,
    tell,
)
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

MESSAGES = [ChatMessage(role="user", content=QUESTION)]


def model(**fields: Any) -> OpenAILike:
    settings = {
        "model": MODEL,
        "api_base": BASE_URL,
        "api_key": KEY,
        "is_chat_model": True,
        "is_function_calling_model": True,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "max_retries": 0,
    }
    return OpenAILike(**{**settings, **fields})


def chat() -> Any:
    return model().chat(MESSAGES).message.content


def stream() -> Any:
    return [answer.delta for answer in model().stream_chat(MESSAGES) if answer.delta]


def usage() -> Any:
    found = model().chat(MESSAGES).raw.usage
    return [found.prompt_tokens, found.completion_tokens]


def tools() -> Any:
    def get_weather(**_: Any) -> str:
        return "Sunny."

    tool = FunctionTool.from_defaults(get_weather, name="get_weather", fn_schema=Weather)
    asked = model(max_tokens=ENOUGH_TOKENS)
    answer = asked.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    [call] = asked.get_tool_calls_from_response(answer)
    return [call.tool_name, json.dumps(call.tool_kwargs)]


def schema() -> Any:
    asked = model(max_tokens=ENOUGH_TOKENS, should_use_structured_outputs=True)
    return asked.as_structured_llm(Review).chat(MESSAGES).raw.model_dump()


def embeddings() -> Any:
    embedder = OpenAILikeEmbedding(model_name=EMBEDDER, api_base=BASE_URL, api_key=KEY)
    return embedder.get_text_embedding_batch(TEXTS)


def errors() -> Any:
    return {
        "401": error_of(lambda: model(api_key="nobody's").chat(MESSAGES)),
        "404": error_of(lambda: model(model="nobody's").chat(MESSAGES)),
    }


tell(chat, stream, usage, tools, schema, embeddings, errors)
