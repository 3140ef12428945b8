"""Classify the scans in a folder: python sync.py FOLDER [URL]."""

import sys

from chestct import ScanClient


def main(folder: str, url: str = "grpc://127.0.0.1:8001") -> None:
    """Print path, label and doubts of each slice."""
    with ScanClient(url) as client:
        print(f"model of run {client.metadata.run}: {', '.join(client.metadata.class_names)}")
        for record in client.classify_many(folder):
            if record["status"] == "error":
                print(record["path"], "ERROR", record["error"]["message"])
            else:
                print(record["path"], record["label"], record.get("reasons", []))


if __name__ == "__main__":  # files are decoded in processes, which import this module again
    main(*sys.argv[1:])
