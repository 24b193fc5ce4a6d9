"""Every error that Yoke raises on purpose. The class says whose fault it is; the message says what was found, what was expected, what to do.

YokeError
├── UserError           the caller asked for something impossible      exit code 2, HTTP 400
│   ├── ModelError          a model file is broken, foreign or unsupported
│   ├── RequestError        a prompt, a sampling value or a body is out of bounds
│   ├── PlacementError      no plan fits the machines that are there
│   └── SettingError        a flag, environment variable or file entry is wrong
├── NodeError           another machine, process or library failed     exit code 3, HTTP 503
│   ├── NodeGone            a peer's connection ended
│   ├── RemoteProtocolError a peer sent something that the protocol forbids
│   ├── AdmissionError      a peer could not prove that it was invited
│   └── BackendError        a compute library is missing, too old or failed
└── InvariantError      Yoke itself is wrong: please report it         exit code 70, HTTP 500
"""

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 + SIGINT, as shells have it."""


class YokeError(Exception):
    """Root of all errors that Yoke raises on purpose."""

    exit_code = 1
    http_status = 500


class UserError(YokeError):
    """The caller asked for something impossible."""

    exit_code = 2
    http_status = 400


class ModelError(UserError):
    """A model file is broken, foreign or of an unsupported kind."""


class RequestError(UserError):
    """A request is out of bounds.

    Parameters
    ----------
    message : what was found, what was expected, what to do.
    field : the name of the request's field at fault, if there is one.
    status : HTTP status to answer with.
    """

    def __init__(self, message: str, *, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.field = field
        self.http_status = status


class PlacementError(UserError):
    """No plan fits the machines that are there.

    Parameters
    ----------
    message : what was found and expected.
    missing_bytes : memory that is lacking, in bytes; 0 when memory is not the obstacle.
    """

    def __init__(self, message: str, *, missing_bytes: int = 0) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


class SettingError(UserError):
    """A flag, an environment variable or an entry of the settings file is wrong."""


class NodeError(YokeError):
    """Another machine, process or library failed."""

    exit_code = 3
    http_status = 503


class NodeGone(NodeError):
    """A peer's connection ended: it left, died, or was cut off."""


class RemoteProtocolError(NodeError):
    """A peer sent something that the protocol forbids."""


class AdmissionError(NodeError):
    """A peer could not prove that it was invited."""


class BackendError(NodeError):
    """A compute library is missing, too old, or failed."""


class InvariantError(YokeError):
    """Yoke itself is wrong. The message carries the story that led here."""

    exit_code = 70
