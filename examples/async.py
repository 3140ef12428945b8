"""Classify the scans in a folder, several at once: python async.py FOLDER [URL]."""

import asyncio
import sys
from pathlib import Path

from chestct import AsyncScanClient, ScanDecodeError


async def main(folder: str, url: str = "grpc://127.0.0.1:8001") -> None:
    """Print path and label of each file, in the order in which answers come."""
    slots = asyncio.Semaphore(8)
    async with AsyncScanClient(url) as client:

        async def classify(path: Path) -> None:
            async with slots:
                try:
                    record = await client.classify_file(path, timeout_s=30)
                except ScanDecodeError as error:
                    print(path, "ERROR", error)
                else:
                    print(path, record["label"], record["in_domain"])

        await asyncio.gather(*map(classify, sorted(Path(folder).iterdir())))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
