"""`chestct listen`: a DICOM node that takes CT series and sends reports back."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chestct.batch.decode_pool import DecodePool
from chestct.cli.console import DONE, UsageError, print_json
from chestct.cli.options import add_list, add_number, add_server_options, client_of
from chestct.contract import NOT_A_MEDICAL_DEVICE
from chestct.errors import SpoolError

CONNECT_TIMEOUT_S = 5.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `chestct listen`."""
    add_server_options(parser)
    parser.add_argument(
        "--json", action="store_true", help="when it listens, say so on stdout as a JSON object"
    )
    parser.add_argument(
        "--queue", type=Path, required=True, metavar="DIR", help="folder that survives a crash"
    )
    parser.add_argument(
        "--status", action="store_true", help="tell what the queue holds, as JSON, and end"
    )
    parser.add_argument("--send-to", metavar="AET@HOST:PORT", help="the node that gets the reports")
    parser.add_argument("--ae-title", default="CHESTCT", help="title of this node (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=11112, help="0 for a free one (%(default)s)")
    add_list(parser, "--allow", "AET", "an AE title that may call (all, but only on this machine)")
    add_number(
        parser, "--quiet-s", "S", 30.0, "a series is complete when nothing of it came for so long"
    )
    parser.add_argument(
        "--at-release",
        action="store_true",
        help="a series is also complete when the association that sent it is released",
    )
    add_number(parser, "--max-object-mb", "MB", 256.0, "refuse larger objects")
    add_number(parser, "--max-queue-gb", "GB", 20.0, "refuse objects while the queue holds so much")
    parser.add_argument("--no-capture", action="store_true", help="no picture, the numbers alone")
    parser.add_argument("--keep", action="store_true", help="keep the files after delivery")
    parser.add_argument(
        "--ignore-others",
        action="store_true",
        help="accept and drop what is no CT image, instead of refusing it",
    )


def run(arguments: argparse.Namespace) -> int:
    """Listens until SIGTERM or Ctrl-C, or tells what the queue holds.

    Raises:
        UsageError: An option is wrong, or an extra is missing.
        ServerError: No usable server.
    """
    from chestct.pacs.queue import spool_status

    if arguments.status:
        if not arguments.queue.is_dir():
            raise UsageError(f"{arguments.queue}: no such folder")
        print_json(spool_status(arguments.queue))
        return DONE
    if arguments.send_to is None:
        raise UsageError("--send-to AET@HOST:PORT is missing: the node that gets the reports")
    from chestct.pacs.node import DicomNode, ListenConfig, Listener
    from chestct.pacs.reports import classify_series

    try:
        config = ListenConfig(
            queue=arguments.queue,
            deliver_to=DicomNode.from_text(arguments.send_to),
            ae_title=arguments.ae_title,
            host=arguments.host,
            port=arguments.port,
            allowed=tuple(arguments.allow),
            quiet_s=arguments.quiet_s,
            at_release=arguments.at_release,
            max_object_bytes=round(arguments.max_object_mb * 1e6),
            max_queue_bytes=round(arguments.max_queue_gb * 1e9),
            keep=arguments.keep,
            ignore_others=arguments.ignore_others,
        )
    except ValueError as error:
        raise UsageError(error) from error
    # The node waits by itself, and must be able to stop meanwhile.
    arguments.connect_timeout_s = min(arguments.connect_timeout_s, CONNECT_TIMEOUT_S)
    with contextlib.closing(client_of(arguments)):
        pass  # wrong usage is told now, not with the first series

    def report(files: Sequence[Path], checkpoint: Callable[[], None]) -> Any:
        with client_of(arguments) as client:
            return classify_series(
                client,
                files,
                checkpoint=checkpoint,
                with_capture=not arguments.no_capture,
                workers=workers,
            )

    _log_to_stderr()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        # What others send is decoded apart: it may crash, hang, or ask for all the memory.
        with DecodePool(num_in_threads=0) as workers, Listener(config, report) as listener:
            if arguments.json:
                print_json(
                    {
                        "ae_title": config.ae_title,
                        "host": config.host,
                        "port": listener.port,
                        "notice": NOT_A_MEDICAL_DEVICE,
                    }
                )
            stopped.wait()
    except (SpoolError, ImportError) as error:
        raise UsageError(error) from error
    except OSError as error:
        raise UsageError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}"
        ) from error
    return DONE


def _log_to_stderr() -> None:
    """Our lines alone: the libraries below quote names and UIDs of patients in theirs."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    for name in ("pynetdicom", "pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.simplefilter("ignore")
