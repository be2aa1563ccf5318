"""Every way in which the gateway says no, and what each edge needs to say it.

    GatewayError
    ├── InvalidRequest            400
    │   ├── UnknownField          400
    │   ├── ContextLengthExceeded 400
    │   ├── PolicyViolation       400
    │   │   └── ContentRefused    400
    │   └── InvalidPolicy         422
    ├── InvalidKey                401
    ├── NotAllowed                403
    │   └── QuotaExceeded         403
    ├── NotFound                  404
    │   └── ModelNotFound         404
    ├── Conflict                  409
    │   ├── OffsetMismatch        409
    │   └── StillRunning          409
    ├── BodyTooLarge              413
    ├── RangeNotSatisfiable       416
    ├── OtherBody                 422
    ├── RejectedUpload            422
    ├── LimitReached              429
    │   ├── BudgetSpent           429
    │   └── TooManyUploads        429
    ├── EngineFailed              500
    ├── MeaningChanged            never answered: the request begins anew
    ├── Unavailable               503
    │   └── Overloaded            503
    ├── DatabaseRefused           at start only: never answered to a client
    └── PostgresFailed            likewise

`/v1` answers OpenAI error bodies, `/admin` RFC 9457 problem documents: see `api/wire.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from adapters.errors import Finding


class GatewayError(Exception):
    """Something went wrong in the gateway."""

    status = 500
    # `type` and `code` of the OpenAI error body.
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.param = param
        self.headers: dict[str, str] = {}
        # Numbers that a program needs to go on; members of the problem document.
        self.facts: dict[str, int | str] = {}
        super().__init__(self.message)


class InvalidRequest(GatewayError):
    """The request is not valid."""

    status, type, code = 400, "invalid_request_error", "invalid_request"


class UnknownField(InvalidRequest):
    """The request has a field that is not known here."""

    code = "unknown_parameter"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than the model's context."""

    code = "context_length_exceeded"


class PolicyViolation(InvalidRequest):
    """The tenant's policy does not allow this request."""

    code = "policy_violation"

    def __init__(self, message: str, *, param: str | None, policy_rule: str) -> None:
        super().__init__(message, param=param)
        # By which the refusal is counted.
        self.policy_rule = policy_rule


class ContentRefused(PolicyViolation):
    """The tenant's content policy refused the prompt."""

    code = "content_policy"


class InvalidPolicy(InvalidRequest):
    """The policy cannot be served as it is."""

    status, code = 422, "invalid_policy"


class InvalidKey(GatewayError):
    """The API key is missing, unknown, expired or revoked."""

    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class NotAllowed(GatewayError):
    """This key may not do that."""

    status, type, code = 403, "permission_error", "permission_denied"


class QuotaExceeded(NotAllowed):
    """The tenant has no room for this upload."""

    code = "quota_exceeded"

    def __init__(self, what: str, *, limit: int, used: int, needed: int) -> None:
        super().__init__(
            f"The tenant may have {limit} {what}; it has {used}, and this upload needs {needed}"
            " more. Delete some, or have the operator raise the limit."
        )
        self.facts = {"limit": limit, "used": used, "needed": needed}


class NotFound(GatewayError):
    """There is nothing of that name."""

    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    """The model does not exist or this key has no access to it."""

    code = "model_not_found"


class Conflict(GatewayError):
    """The name is taken."""

    status, type, code = 409, "invalid_request_error", "conflict"


class OffsetMismatch(Conflict):
    """Bytes of an upload are missing before these."""

    code = "offset_mismatch"

    def __init__(self, file: str, *, expected_offset: int) -> None:
        super().__init__(f"Of {file}, {expected_offset} bytes have arrived: go on from there.")
        self.facts = {"file": file, "expected_offset": expected_offset}


class StillRunning(Conflict):
    """A request with this Idempotency-Key is being answered; ask again shortly."""

    code = "request_in_progress"

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.headers = {"retry-after": "1"}


class OtherBody(GatewayError):
    """This Idempotency-Key was used with another body; use a new one."""

    status, type, code = 422, "invalid_request_error", "idempotency_key_reused"


class BodyTooLarge(GatewayError):
    """The body is larger than this route takes."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class RangeNotSatisfiable(GatewayError):
    """The file has no such bytes."""

    status, type, code = 416, "invalid_request_error", "range_not_satisfiable"

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"The file has {size_bytes} bytes, and none in this range.", param="Range")
        self.headers = {"content-range": f"bytes */{size_bytes}"}


class RejectedUpload(GatewayError):
    """The upload is no adapter that can be served; `findings` lists every reason."""

    status, type, code = 422, "invalid_request_error", "invalid_adapter"

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__(f"the adapter was refused: {len(self.findings)} finding(s), listed here")


class LimitReached(GatewayError):
    """A rate limit is reached."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"
    # Which rule it is, and what an error's body tells of it. Filled by whoever asked the rules.
    rule: Mapping[str, str | int | None] | None = None


class BudgetSpent(LimitReached):
    """The budget for the period is spent."""

    type, code = "insufficient_quota", "insufficient_quota"


class TooManyUploads(LimitReached):
    """The tenant's uploads under way take too much room."""

    code = "too_many_uploads"

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} Finish or delete some, and try again.")
        self.headers = {"retry-after": "10"}


class EngineFailed(GatewayError):
    """The engine could not finish the answer."""

    code = "engine_error"


class MeaningChanged(GatewayError):
    """The model's name does not stand for what was assumed."""


class Unavailable(GatewayError):
    """The service cannot answer now; try again shortly."""

    status, code = 503, "service_unavailable"

    def __init__(self, message: str | None = None, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.headers = {"retry-after": str(retry_after_s)}


class Overloaded(Unavailable):
    """More requests wait here than can be started soon; try again in a moment."""

    code = "overloaded"


class DatabaseRefused(GatewayError):
    """The database is not one that Manylora can safely run on."""


class PostgresFailed(GatewayError):
    """The embedded PostgreSQL cannot be run here."""


class JournalFailed(Unavailable):
    """This gateway cannot write its journal, and serves nothing that it could not bill."""

    code = "journal_failed"


class JournalInUse(GatewayError):
    """Another process writes to this journal."""

    code = "journal_in_use"


class JournalCorrupt(GatewayError):
    """A journal is damaged before its end; good records follow `position` in `path`."""

    code = "journal_corrupt"

    def __init__(self, path: Path, position: int) -> None:
        self.path, self.position = path, position
        super().__init__(
            f"{path} is damaged at byte {position}, and good records follow. Restore the file, or"
            " move it away: what it alone knows is then settled from the last heartbeat."
        )
