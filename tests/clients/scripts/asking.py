"""What every client is asked to ask, and how its script tells what it got.

A script is a user's program: it knows a base URL, a key and a model, and nothing of Manylora. It
has a function for each notion of its client; they are called in turn, and what they return is
printed as one JSON object.
"""

import json
import os
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, Field

BASE_URL = os.environ["OPENAI_BASE_URL"]
KEY = os.environ["OPENAI_API_KEY"]
# An adapter, and what makes vectors.
MODEL, EMBEDDER = os.environ["MODEL"], os.environ["EMBEDDER"]
# May look and not ask; may ask once a minute.
VIEWERS_KEY, SLOW_KEY = os.environ["VIEWERS_KEY"], os.environ["SLOW_KEY"]

QUESTION = "How many open orders are there?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
MAX_TOKENS = 24
# Enough for what a grammar holds to a schema.
ENOUGH_TOKENS = 120
TEXTS = ["open orders", "A pirate's favourite letter"]


class Weather(BaseModel):
    """Look the weather up."""

    unit: Literal["celsius", "fahrenheit"]
    days: int = Field(ge=1, le=9)


class Review(BaseModel):
    """What somebody thinks."""

    mood: Literal["good", "bad"]
    stars: int = Field(ge=1, le=5)


def error_of(call: Callable[[], Any]) -> str:
    """The class of what a call raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "nothing"


def tell(*notions: Callable[[], Any]) -> None:
    """Call all of them and print what they returned, each by its own name."""
    print(json.dumps({notion.__name__: notion() for notion in notions}))
