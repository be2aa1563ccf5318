"""POST /v1/responses: the same generations as a chat's, in OpenAI's newer words.

Nothing is stored: a conversation goes on with the items that its client sends again.
"""

from gateway.api.responses.route import responses

__all__ = ["responses"]
