"""The errors a user can meet. Each message is one line: what happened, why, and what to do."""


class ForetellError(Exception):
    """Base of every error that foretell raises on purpose; the CLI prints it without a traceback."""


class ModelNotFoundError(ForetellError):
    """The model reference names nothing that exists here or, when online, at its source."""


class ModelFormatError(ForetellError):
    """A model file is corrupt, truncated, or of a kind that is not read (pickles are never read)."""


class UnsupportedModelError(ForetellError):
    """The architecture, or an option of it, is not implemented; the message lists what is."""


class DownloadError(ForetellError):
    """A download failed or its bytes do not have the promised sha256."""


class InvalidRequestError(ForetellError, ValueError):
    """A request can never be served as asked (empty prompt, too long, bad sampling parameter)."""


class ConfigError(ForetellError, ValueError):
    """An engine option is impossible or contradicts another."""


class OverloadedError(ForetellError):
    """The queue is full: come back after ``retry_after_seconds`` (HTTP 429)."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(ForetellError):
    """The engine is starting, draining or was lost while it worked on this request (HTTP 503)."""


class DeadlineError(ForetellError):
    """A request was not finished by its deadline (HTTP 408)."""
