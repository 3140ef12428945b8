"""The slices of an upload, from the pool of isolated decoding processes."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from collections.abc import AsyncGenerator, AsyncIterator

from chestct.batch.decode_pool import TIMEOUT, DecodedSlice, DecodePool, DecoderLostError
from chestct.contract import Window
from chestct.errors import ScanDecodeError, ServerUnavailableError
from chestct.web.settings import WebSettings
from chestct.web.uploads import Upload

__all__ = ["Decoder"]

MAX_PICTURE_SIDE = 512


class Decoder:
    """Decodes uploads, each file in one process at a time."""

    def __init__(self, settings: WebSettings) -> None:
        """Starts nothing before `run`."""
        self._pool = DecodePool(
            settings.workers,
            limit_s=settings.decode_timeout_s,
            memory_bytes=settings.worker_memory_bytes,
            max_pixels=settings.max_pixels,
        )
        self._key = os.urandom(16)

    @property
    def num_replaced(self) -> int:
        """Processes that were lost so far."""
        return self._pool.num_lost

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """The processes, as long as the context lasts."""
        try:
            await self._pool.fill()
            yield
        finally:
            await self._pool.end()

    async def require(self) -> None:
        """Start the processes that are missing.

        Raises:
            ServerUnavailableError: The system cannot start one.
        """
        try:
            await self._pool.fill()
        except OSError as error:
            text = f"no decoding process can be started: {error.strerror}"
            raise ServerUnavailableError(text) from error

    async def scans(
        self, upload: Upload, window: Window, picture_side: int = 0
    ) -> AsyncGenerator[DecodedSlice, None]:
        """The slices of one file: one, or those of its frames, or of the members of a zip archive.

        Args:
            upload: A PNG, JPEG, DICOM or zip file, told by its content.
            window: Window for DICOM slices.
            picture_side: Longest side of the pictures for display in pixels, at most 512; 0 for no
                picture.
        """
        task = {
            "name": upload.name,
            "window": [window.center_hu, window.width_hu],
            "side": min(picture_side, MAX_PICTURE_SIDE),
            "first": 0,
        }
        while True:
            try:
                found = self._pool.answers(task, upload.data, limits_each=True)
                async with contextlib.aclosing(found):
                    async for each in found:
                        yield each
                return
            except DecoderLostError as lost:
                yield self._lost(lost.name or upload.name, lost)
                task["first"] = lost.next_member
            with contextlib.suppress(OSError):  # the next upload need not wait for its start
                await self._pool.fill()
            if not task["first"]:  # not even its first slice was begun
                return

    def series_alias(self, uid: str) -> str:
        """Stands for a series within this server: the UID itself leads to the patient."""
        return hmac.digest(self._key, uid.encode(), hashlib.sha256).hex()[:16] if uid else ""

    def _lost(self, name: str, lost: DecoderLostError) -> DecodedSlice:
        if lost.kind == TIMEOUT:
            why = f"it took longer than {self._pool.limit_s:g} s to decode and was given up"
        else:
            limit = self._pool.memory_bytes / 2**30
            why = f"its decoder broke down. It may be damaged, or need more than {limit:.2g} GiB "
            why += "of memory"
        return DecodedSlice(name, ScanDecodeError(f"{name}: {why}. Export the slice again."))
