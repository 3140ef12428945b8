"""The formats of a file of results: JSON lines, CSV and Parquet."""

from __future__ import annotations

from pathlib import Path

from chestct.results.csv_file import CsvFile
from chestct.results.parquet import ParquetFile
from chestct.results.resume import ResumeIndex
from chestct.results.writers import JsonLines, RecordFile

__all__ = ["FORMATS", "format_of", "open_records"]

FORMATS = ("jsonl", "csv", "parquet")


def format_of(path: Path, chosen: str | None = None) -> str:
    """`jsonl`, `csv` or `parquet`: what was chosen, or by the suffix of the file."""
    by_suffix = {".csv": "csv", ".parquet": "parquet", ".pq": "parquet"}
    return chosen or by_suffix.get(path.suffix.lower(), "jsonl")


def open_records(
    path: Path, form: str, *, resume: bool = False, retry_errors: bool = False
) -> RecordFile:
    """The file of records in one of `FORMATS`.

    Args:
        path: Where.
        form: Its format.
        resume: Whether the file may be there already, to be continued.
        retry_errors: Whether its errors count as not done; a new record takes their place.

    Raises:
        FileExistsError: It is there and `resume` is false.
        ValueError: It holds something else, another run writes to it, or pyarrow is missing.
        OSError: It cannot be read, cut or written.
    """
    finished = ResumeIndex(retry_errors=retry_errors)
    of_format = {"jsonl": JsonLines, "csv": CsvFile, "parquet": ParquetFile}
    return of_format[form](path, resume=resume, finished=finished)
