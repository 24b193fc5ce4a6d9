"""Errors on their way between processes."""

import msgspec

from yoke.core import errors
from yoke.core.errors import PlacementError, RequestError, YokeError


class ErrorNote(msgspec.Struct, frozen=True, kw_only=True):
    """An error on its way to whom it concerns: the class's name and its parts."""

    kind: str
    message: str
    field: str | None = None
    status: int = 400
    missing_bytes: int = 0


def error_note(error: YokeError) -> ErrorNote:
    """An error as a value."""
    return ErrorNote(
        kind=type(error).__name__,
        message=str(error),
        field=error.field if isinstance(error, RequestError) else None,
        status=error.http_status,
        missing_bytes=error.missing_bytes if isinstance(error, PlacementError) else 0,
    )


def noted_error(note: ErrorNote) -> YokeError:
    """The error that a note was made of; an unknown kind becomes the root of the tree."""
    kind = getattr(errors, note.kind, YokeError)
    if kind is RequestError:
        return RequestError(note.message, field=note.field, status=note.status)
    if kind is PlacementError:
        return PlacementError(note.message, missing_bytes=note.missing_bytes)
    if not (isinstance(kind, type) and issubclass(kind, YokeError)):
        kind = YokeError
    return kind(note.message)
