"""The outputs of `chestct classify`: files of records, overlays, a page and DICOM reports."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from chestct.batch.decode_pool import DecodePool
from chestct.cli.console import UsageError
from chestct.inference.server_pool import ServerPool
from chestct.results.formats import format_of, open_records
from chestct.results.parquet import journal_of
from chestct.results.writers import Output, RecordFile


def earlier_records(arguments: argparse.Namespace) -> RecordFile | None:
    """The file of an earlier run, if there is one to go on with."""
    output: Path | None = arguments.output
    if arguments.retry_errors and not arguments.resume:
        raise UsageError("--retry-errors needs --resume")
    if output is None:
        if arguments.resume:
            raise UsageError("--resume needs --output FILE")
        return None
    if not output.parent.is_dir():
        raise UsageError(f"{output}: the folder {output.parent} is not there")
    if output.is_dir():
        raise UsageError(f"{output}: a folder, expected a file to write to")
    form = format_of(output, arguments.format)
    is_begun = output.is_file() or journal_of(output).is_file()
    if not is_begun or (form != "parquet" and not output.is_file()):
        return None
    if not arguments.resume:
        raise UsageError(f"{output}: exists. Add --resume to go on, or name another file.")
    try:
        return open_records(output, form, resume=True, retry_errors=arguments.retry_errors)
    except (ValueError, OSError) as error:
        raise UsageError(f"cannot resume: {error}") from error


def open_outputs(
    arguments: argparse.Namespace,
    fleet: ServerPool,
    workers: DecodePool,
    records: RecordFile | None,
    stack: contextlib.ExitStack,
) -> list[Output]:
    """Everything that is written to; the records come last, see `chestct.results.writers`."""
    labels = fleet.metadata.class_names
    outputs: list[Output] = []
    if arguments.overlays is not None or arguments.html is not None:
        from chestct.results.overlays import HtmlReport, OverlayPngs

        if arguments.overlays is not None:
            outputs.append(OverlayPngs(arguments.overlays, labels))
        if arguments.html is not None:
            outputs.append(HtmlReport(arguments.html, labels))
    if arguments.dicom_sr is not None:
        if arguments.no_series:
            raise UsageError("--dicom-sr reports on series, which --no-series leaves out")
        from chestct.pacs.reports import DicomReports

        try:
            outputs.append(DicomReports(arguments.dicom_sr, fleet.metadata.window, workers))
        except ImportError as error:
            raise UsageError(error) from error
    for output in outputs:
        stack.callback(output.close)
    try:
        if records is None and arguments.output is not None:
            form = format_of(arguments.output, arguments.format)
            records = open_records(arguments.output, form)
            stack.callback(records.close)
        if records is not None:
            records.start(labels)
            outputs.append(records)
    except ValueError as error:
        raise UsageError(error) from error
    return outputs
