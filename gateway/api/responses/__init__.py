"""POST /v1/responses: the same generations as a chat's, in OpenAI's newer words.

Nothing is stored: a conversation goes on with the items that its client sends again.
"""

from gateway.api.responses.request import ResponseRequest, read_request
from gateway.api.responses.route import compose, in_own_words, responses

__all__ = ["ResponseRequest", "compose", "in_own_words", "read_request", "responses"]
