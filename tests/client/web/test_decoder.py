"""The page's decoder when the system cannot start processes."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from chestct.contract import LUNG_WINDOW
from chestct.errors import ScanDecodeError, ServerUnavailableError
from chestct.imaging.prepare import Scan
from chestct.web.decoder import Decoder
from chestct.web.settings import WebSettings
from chestct.web.uploads import Upload

from .conftest import phantom_png


def test_lost_processes_that_cannot_be_replaced_are_told_and_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chestct.batch.decode_pool.START_PAUSES_S", (0.01,))
    upload = Upload("chest.png", phantom_png("normal", 1, 128))

    async def run() -> None:
        decoder = Decoder(WebSettings(workers=2))

        async def kinds() -> set[type]:
            found = []
            for _ in range(3):  # more than there are processes: none may be waited for in vain
                found += [each async for each in decoder.scans(upload, LUNG_WINDOW)]
            return {type(each.scan) for each in found}

        async with decoder.run():
            await decoder.require()
            assert await kinds() == {Scan}
            await decoder._pool.end()
            with monkeypatch.context() as broken:
                broken.setattr(sys, "executable", str(tmp_path / "none"))
                with pytest.raises(ServerUnavailableError, match="no decoding process"):
                    await decoder.require()
                assert await kinds() == {ScanDecodeError}
            await decoder.require()
            assert await kinds() == {Scan}

    asyncio.run(run())
