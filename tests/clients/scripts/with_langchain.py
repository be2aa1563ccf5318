"""LangChain's langchain-openai; told `responses` it asks in OpenAI's newer words."""

import json
import sys
from typing import Any

from asking import (
    BASE_URL,
    EMBEDDER,
    ENOUGH_TOKENS,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    TEXTS,
    Review,
    Weather,
    error_of,
    tell,
)
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

ASKS_FOR_RESPONSES = "responses" in sys.argv


def model(**fields: Any) -> ChatOpenAI:
    settings = {
        "model": MODEL,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "base_url": BASE_URL,
        "use_responses_api": ASKS_FOR_RESPONSES,
    }
    return ChatOpenAI(**{**settings, **fields})


def chat() -> Any:
    return model().invoke(QUESTION).text


def stream() -> Any:
    return [chunk.text for chunk in model().stream(QUESTION) if chunk.text]


def usage() -> Any:
    whole = model().invoke(QUESTION).usage_metadata
    chunks = list(model(stream_usage=True).stream(QUESTION))
    [streamed] = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert streamed["total_tokens"] == whole["total_tokens"]
    return [whole["input_tokens"], whole["output_tokens"]]


def tools() -> Any:
    bound = model(max_tokens=ENOUGH_TOKENS).bind_tools(
        [Weather], tool_choice="required", parallel_tool_calls=False
    )
    [call] = bound.invoke(QUESTION).tool_calls
    return [call["name"], json.dumps(call["args"])]


def schema() -> Any:
    structured = model(max_tokens=ENOUGH_TOKENS).with_structured_output(
        Review, method="json_schema"
    )
    return structured.invoke(QUESTION).model_dump()


def embeddings() -> Any:
    # Its own way is to send tokens of OpenAI's tokenizer: no other server can read them.
    return OpenAIEmbeddings(
        model=EMBEDDER, base_url=BASE_URL, check_embedding_ctx_length=False
    ).embed_documents(TEXTS)


def errors() -> Any:
    return {
        "401": error_of(lambda: model(api_key="nobody's").invoke(QUESTION)),
        "404": error_of(lambda: model(model="nobody's").invoke(QUESTION)),
    }


tell(chat, stream, usage, tools, schema, embeddings, errors)
