"""Reading files by path or URL, front to back, through failing connections."""

from __future__ import annotations

import http.client
import io
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO, cast

from dmp_common import PatchError
from dmp_common.errors import file_error
from dmp_common.patch.serialize import open_regular

_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
_TIMEOUT = 60.0
_HEADERS = {"User-Agent": "diffusion-model-patching"}  # some servers refuse Python's own
_FAILURES = (OSError, http.client.HTTPException)  # URLError and timeouts are OSErrors


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a path (`C:/x` is a path)."""
    return "://" in place


def open_place(place: str) -> BinaryIO:
    """A file, front to back: a path, http(s), or any scheme that fsspec knows (hf, s3, gs).

    Raises:
        PatchError: no such file, or no connection after several tries.
    """
    if not is_url(place):
        return open_regular(Path(place))
    if place.startswith(("http://", "https://")):
        return cast(BinaryIO, io.BufferedReader(_HttpFile(place), 1 << 18))
    return _open_fsspec(place)


def _open_fsspec(place: str) -> BinaryIO:
    try:
        import fsspec
    except ImportError as error:
        raise PatchError(
            f"expected fsspec to read {place}, found it is not installed: run pip install fsspec."
        ) from error
    try:
        return cast(BinaryIO, fsspec.open(place, "rb").open())
    except (*_FAILURES, ValueError, ImportError) as error:
        raise _unreadable(place, error) from error


class _HttpFile(io.RawIOBase):
    """A file behind http(s). A broken connection is taken up again where it broke."""

    def __init__(self, url: str) -> None:
        self._url, self._offset = url, 0
        self._size: int | None = None
        self._response: Any = None
        self._retrying(self._connect)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes; 0 at the end of the file.

        Raises:
            PatchError: the connection does not come back.
        """
        data: bytes = self._retrying(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)

    def close(self) -> None:
        """Ends the connection."""
        self._disconnect()
        super().close()

    def _read(self, count: int) -> bytes:
        if self._response is None:
            self._connect()
        data: bytes = self._response.read(count)
        if not data and self._size is not None and self._offset < self._size:
            raise ConnectionError(f"the file ended after {self._offset} of {self._size} bytes")
        return data

    def _connect(self) -> None:
        request = urllib.request.Request(self._url, headers=_HEADERS)
        if self._offset:
            request.add_header("Range", f"bytes={self._offset}-")
        self._response = urllib.request.urlopen(request, timeout=_TIMEOUT)
        length = self._response.headers.get("Content-Length")
        partial = self._response.status == 206
        if length is not None:
            self._size = int(length) + (self._offset if partial else 0)
        if self._offset and not partial:  # a server that knows no ranges begins at the start
            left = self._offset
            while left:
                skipped = len(self._response.read(min(left, 1 << 20)))
                if not skipped:
                    raise ConnectionError("the file has become shorter")
                left -= skipped

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def _retrying(self, action: Any) -> Any:
        for wait in (*_WAITS, None):
            try:
                return action()
            except _FAILURES as error:
                self._disconnect()
                code = error.code if isinstance(error, urllib.error.HTTPError) else 0
                if wait is None or (400 <= code < 500 and code != 429):
                    raise _unreadable(self._url, error) from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")


def _unreadable(place: str, error: Exception) -> PatchError:
    found = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return file_error(place, "a file", found, "check the path or URL and the connection")
