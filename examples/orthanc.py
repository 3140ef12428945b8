"""Classify all CT series of an Orthanc: python orthanc.py http://HOST:8042 [URL]."""

import json
import sys
import tempfile
import urllib.request
from pathlib import Path

from chestct import ScanClient, ScanDecodeError


def main(orthanc: str, url: str = "grpc://127.0.0.1:8001") -> None:
    """Print a JSON line for each series."""
    with urllib.request.urlopen(f"{orthanc}/series?expand", timeout=60) as answer:
        found = json.load(answer)
    with ScanClient(url) as client, tempfile.TemporaryDirectory() as folder:
        for series in found:
            if series["MainDicomTags"].get("Modality") != "CT":
                continue
            archive = Path(folder, f"{series['ID']}.zip")
            urllib.request.urlretrieve(f"{orthanc}/series/{series['ID']}/archive", archive)
            try:
                record = client.classify_series(archive)
            except ScanDecodeError as error:
                record = {"status": "error", "error": {"message": str(error)}}
            print(json.dumps({**record, "path": f"{orthanc}/series/{series['ID']}"}))
            archive.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
