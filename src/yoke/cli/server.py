"""Talking to the server of this machine: where it answers, and the key to change its cluster, kept in a file that only its owner may read."""

import contextlib
import http.client
import json
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from yoke.core.errors import NodeError, RequestError, SettingError

FILE_NAME = "serving.json"
ADMIN_KEY_BYTES = 24
TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 1 << 24
MAX_FILE_BYTES = 1 << 16


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a server answers, and what changing its cluster takes."""

    url: str
    admin_key: str = ""


@contextlib.contextmanager
def left_word(directory: Path, url: str, admin_key: str) -> Iterator[None]:
    """Leave word of where this server answers, for other commands of the same user, as long as it runs.

    Raises
    ------
    SettingError
        if the directory cannot be written.
    """
    path, draft = directory / FILE_NAME, directory / f".{FILE_NAME}.{secrets.token_hex(8)}"
    data = msgspec.json.encode(Place(url, admin_key))
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        draft.replace(path)
    except OSError as error:
        raise SettingError(f"cannot write {path}: {error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if path.read_bytes() == data:
                path.unlink()


def find(directory: Path) -> Place | None:
    """The server that runs for this user, if there is one. What another program left there, or a server that was killed, is found out when it is asked."""
    try:
        data = (directory / FILE_NAME).read_bytes()
        return msgspec.json.decode(data, type=Place) if len(data) <= MAX_FILE_BYTES else None
    except (OSError, msgspec.DecodeError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Asks one server. ``api_key`` is empty if it has none."""

    place: Place
    api_key: str = ""

    def ask(self, method: str, path: str, body: object | None = None) -> dict[str, Any]:
        """One question's answer.

        Raises
        ------
        RequestError
            what the server says is wrong with the request.
        NodeError
            if there is no server, or not this one.
        """
        url = self.place.url + path
        if not url.startswith(("http://", "https://")):
            raise NodeError(f"{self.place.url!r} is not an address; expected http://HOST:PORT")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        if self.place.admin_key:
            headers["X-Yoke-Admin"] = self.place.admin_key
        data = None if body is None else msgspec.json.encode(body)
        request = urllib.request.Request(url, data=data, headers=headers, method=method)  # noqa: S310 - the scheme was checked
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
                answer = json.loads(response.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            raise _refusal(url, error) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            raise NodeError(f"no answer from {url}: {cause}; is `yoke serve` running there?") from error
        if not isinstance(answer, dict):
            raise NodeError(f"{url} answered something else than was asked; is that `yoke serve`?")
        return answer


def _refusal(url: str, error: urllib.error.HTTPError) -> NodeError | RequestError:
    """What the server said, or what its status means."""
    try:
        said = json.loads(error.read(MAX_ANSWER_BYTES))["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        said = None
    if error.code == 401:
        return NodeError(f"{url} answered 401 {error.reason}; give the server's key with --api-key")
    if isinstance(said, str) and 400 <= error.code < 500 and error.code != 405:
        return RequestError(said, status=error.code)
    return NodeError(f"{url} answered {error.code} {error.reason}; is that `yoke serve`?")
