"""The files of a multipart request, read as they come and held in memory only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

__all__ = ["InFlightBytes", "Upload", "UploadError", "read_uploads"]

MAX_NAME_CHARS = 255
MAX_FILES = 2000
FIELD_NAME = b"files"


class UploadError(Exception):
    """A request that cannot be taken; `status` is that of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Upload:
    """One file as the browser sent it.

    Attributes:
        name: Its name, for the answer only; without control characters.
        data: All of it.
    """

    name: str
    data: bytes


class InFlightBytes:
    """Counts the bytes of all requests under way, so that together they cannot fill the memory."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Counts some more.

        Raises:
            UploadError: That would be too many (503: later there is room again).
        """
        if self.num_bytes + num_bytes > self.limit:
            raise UploadError(503, "too many uploads at once. Send it again in a few seconds.")
        self.num_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Counts them no more."""
        self.num_bytes -= num_bytes


async def read_uploads(
    chunks: AsyncIterator[bytes],
    content_type: str,
    max_bytes: int,
    held: list[int],
    total: InFlightBytes,
) -> list[Upload]:
    """The files of the field `files`; other fields are passed over.

    Args:
        chunks: The body of the request.
        content_type: Its header, with the boundary.
        max_bytes: Of the whole body.
        held: Its only element grows by what is counted in `total`, for the caller to release.
        total: What all requests hold.

    Raises:
        UploadError: No multipart (415), broken (400), too large (413), or no room (503).
    """
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise UploadError(
            415, "expected multipart/form-data with one or more files in the field `files`"
        )
    boundary = options.get(b"boundary")
    if not boundary:
        raise UploadError(400, "multipart/form-data without a boundary")
    parts = _Parts()
    num_bytes = 0
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        async for chunk in chunks:
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise UploadError(413, too_large(max_bytes))
            total.add(len(chunk))
            held[0] += len(chunk)
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise UploadError(400, f"broken multipart/form-data: {error}") from error
    if not parts.is_whole:
        raise UploadError(400, "broken multipart/form-data: it ends before its last boundary")
    if not parts.uploads:
        raise UploadError(400, "no file: expected one or more in the field `files`")
    return parts.uploads


def too_large(max_bytes: int) -> str:
    """What to say of a body above the limit."""
    return (
        f"larger than {max_bytes / 2**20:.4g} MiB, which is the most for one upload. "
        "Send fewer files at once."
    )


class _Parts:
    """Gathers what python-multipart's parser calls back, without the temporary files of its own."""

    def __init__(self) -> None:
        self.uploads: list[Upload] = []
        self.is_whole = False
        self._field = self._value = b""
        self._disposition = b""
        self._data = bytearray()

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._part_data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._disposition = b""
        self._data = bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += memoryview(data)[start:end]

    def _end(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != FIELD_NAME or b"filename" not in options:
            return
        if len(self.uploads) == MAX_FILES:
            raise UploadError(413, f"more than {MAX_FILES} files in one upload. Send a zip.")
        name = _shown(options[b"filename"].decode("utf-8", "replace"))
        self.uploads.append(Upload(name or "unnamed", bytes(self._data)))
        self._data = bytearray()

    def _finish(self) -> None:
        self.is_whole = True


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)[
        -MAX_NAME_CHARS:
    ]
