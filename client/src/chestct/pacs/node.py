"""A DICOM node: takes CT series by C-STORE, has them classified, and sends the reports back.

Whatever was answered with success is on the disk (`chestct.pacs.queue`) and stays there until its
report was accepted. Log lines carry counts and keyed digests, no patient data and no UIDs.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from chestct.errors import (
    ChestCTError,
    ContractError,
    InferenceTimeoutError,
    ReportError,
    ServerError,
    ServerUnavailableError,
    SpoolFullError,
)
from chestct.pacs.queue import Spool

__all__ = ["DicomNode", "ListenConfig", "Listener", "StoppedError"]

logger = logging.getLogger(__name__)

# Status codes of C-STORE: DICOM PS3.4 B.2.3, PS3.7 C.4 and C.5.
SUCCESS, OUT_OF_RESOURCES, OTHER_CLASS, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xA900, 0xC000
WARNINGS = range(0xB000, 0xC000)  # stored all the same
VERIFICATION = "1.2.840.10008.1.1"  # PS3.4 A.4
MAX_TRIES = 5  # a series that ends the process or that the server refuses is given up after
POLL_S = 0.2
FIRST_PAUSE_S = 1.0
MAX_ASSOCIATIONS = 10
GRACE_S = 10.0  # what open associations get when the node stops

Report = Callable[[Sequence[Path], Callable[[], None]], Mapping[str, bytes] | None]


class StoppedError(Exception):
    """Work was left because the node stops; it is done after the next start."""


@dataclass(frozen=True)
class DicomNode:
    """A peer: application entity title, host and port."""

    ae_title: str
    host: str
    port: int

    def __post_init__(self) -> None:
        """Refuse what cannot be an address.

        Raises:
            ValueError: An AE title that PS3.5 6.2 does not allow, no host, or no port.
        """
        require_ae_title(self.ae_title)
        if not self.host or not 0 < self.port < 65536:
            raise ValueError(f"{self.host}:{self.port}: expected a host and a port")

    @classmethod
    def from_text(cls, text: str) -> DicomNode:
        """A node written AE_TITLE@HOST:PORT.

        Raises:
            ValueError: Another form.
        """
        ae_title, _, address = text.rpartition("@")
        host, _, port = address.rpartition(":")
        if not (ae_title and host and port.isdigit()):
            raise ValueError(f"{text!r}: expected AE_TITLE@HOST:PORT, as in ORTHANC@127.0.0.1:4242")
        return cls(ae_title, host.strip("[]"), int(port))


def require_ae_title(text: str) -> None:
    """Refuse what is no AE title.

    Raises:
        ValueError: Not 1 to 16 printable ASCII characters without a backslash (PS3.5 6.2).
    """
    is_plain = text.isascii() and text.isprintable() and "\\" not in text
    if not is_plain or not text.strip() or len(text) > 16:
        raise ValueError(f"{text!r} is no AE title: expected 1 to 16 ASCII characters")


@dataclass(frozen=True)
class ListenConfig:
    """How a node listens, waits, and delivers.

    Attributes:
        queue: Folder of the queue.
        deliver_to: Where reports go.
        ae_title: The node's own title; callers must call it by this.
        host: Address to listen on.
        port: Port to listen on, 0 for a free one.
        allowed: AE titles that may call; empty for all.
        quiet_s: A series is complete when nothing of it came for so long.
        at_release: It is also complete when the association that sent it is released.
        max_object_bytes: A larger object is refused; one of twice the size ends its association.
        max_queue_bytes: What the queue may hold; more is refused.
        keep: Keep series and reports after delivery.
        ignore_others: Accept and drop what is no CT image, instead of refusing it.
        longest_pause_s: Limit of the growing pauses while server or peer is unavailable.
    """

    queue: Path
    deliver_to: DicomNode
    ae_title: str = "CHESTCT"
    host: str = "127.0.0.1"
    port: int = 11112
    allowed: tuple[str, ...] = ()
    quiet_s: float = 30.0
    at_release: bool = False
    max_object_bytes: int = 256 * 2**20
    max_queue_bytes: int = 20 * 2**30
    keep: bool = False
    ignore_others: bool = False
    longest_pause_s: float = 60.0

    def __post_init__(self) -> None:
        """Refuse a configuration that cannot work, or accepts any caller on a public address.

        Raises:
            ValueError: A value out of range, or a list of callers that is missing.
        """
        require_ae_title(self.ae_title)
        for title in self.allowed:
            require_ae_title(title)
        if not 0 <= self.port < 65536:
            raise ValueError(f"port {self.port}: expected 0 to 65535")
        for name in ("quiet_s", "max_object_bytes", "max_queue_bytes", "longest_pause_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a positive number")
        if not self.allowed and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(
                f"listening on {self.host} without a list of callers: name each AE title that may "
                "send with --allow"
            )


class Listener:
    """A running node; a context manager."""

    def __init__(self, config: ListenConfig, report: Report) -> None:
        """Opens the queue; nothing is received before `start`.

        Args:
            config: See `ListenConfig`.
            report: Gets the files of a series and a function to call now and then, which raises
                StoppedError when the node stops; gives the DICOM files to deliver, by name, or
                None where there is nothing to report. Raises ServerError where the server failed,
                another ChestCTError where the series cannot be reported.

        Raises:
            SpoolError: The queue cannot be used.
            ImportError: pynetdicom is not installed; the message says what to do.
        """
        _require_pynetdicom()
        self.config = config
        self.counts: Counter[str] = Counter()
        self._report = report
        self._stopping = threading.Event()
        self._received: dict[int, int] = {}
        self._spool = Spool(config.queue, config.max_queue_bytes)
        self._server: Any = None
        self._entity: Any = None
        self._workers = [
            threading.Thread(target=self._forever, args=(work,), name=name)
            for name, work in (("classify", self._classify_next), ("deliver", self._deliver_all))
        ]

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Listens, and takes up what the queue holds.

        Raises:
            OSError: The address cannot be had.
        """
        from pynetdicom import AE, evt

        config = self.config
        self._entity = entity = AE(ae_title=config.ae_title)
        entity.maximum_associations = MAX_ASSOCIATIONS
        entity.require_called_aet = True
        entity.require_calling_aet = list(config.allowed)
        self._add_contexts(entity)
        handlers: list[Any] = [
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_DATA_RECV, self._on_data),
            (evt.EVT_RELEASED, self._on_release),
            (evt.EVT_CONN_CLOSE, self._on_close),
            (evt.EVT_REJECTED, self._on_rejected),
        ]
        self._server = entity.start_server(
            (config.host, config.port), block=False, evt_handlers=handlers
        )
        for worker in self._workers:
            worker.start()
        logger.info("%s listens on %s:%d", config.ae_title, config.host, self.port)

    def stop(self) -> None:
        """Stops in order: no new associations, time for the open ones, workers, queue."""
        self._stopping.set()
        if self._server is not None:
            self._server.shutdown()
            deadline_s = time.monotonic() + GRACE_S
            while self._entity.active_associations and time.monotonic() < deadline_s:
                time.sleep(0.05)
            self._entity.shutdown()
            for worker in self._workers:
                worker.join()
        self._spool.close()
        logger.info("stopped: %s", self.counts_text())

    def __enter__(self) -> Listener:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def counts_text(self) -> str:
        """What was done since the start, for a log line."""
        kinds = ("received", "refused", "ignored", "classified", "skipped", "delivered", "failed")
        return ", ".join(f"{self.counts[kind]} {kind}" for kind in kinds)

    def _add_contexts(self, entity: Any) -> None:
        from pydicom.pixels import get_decoder
        from pydicom.uid import (
            AllTransferSyntaxes,
            CTImageStorage,
            DeflatedExplicitVRLittleEndian,
            EnhancedCTImageStorage,
            LegacyConvertedEnhancedCTImageStorage,
        )
        from pynetdicom import ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts

        def can_decode(syntax: Any) -> bool:
            # A deflated object would have to be inflated, of whatever size, to learn its series.
            if syntax == DeflatedExplicitVRLittleEndian:
                return False
            try:
                return bool(get_decoder(syntax).is_available)
            except NotImplementedError:
                return False

        self._classes = {
            str(uid)
            for uid in (
                CTImageStorage,
                EnhancedCTImageStorage,
                LegacyConvertedEnhancedCTImageStorage,
            )
        }
        syntaxes = [syntax for syntax in AllTransferSyntaxes if can_decode(syntax)]
        entity.add_supported_context(VERIFICATION)
        for uid in self._classes:
            entity.add_supported_context(uid, syntaxes)
        if self.config.ignore_others:
            for context in AllStoragePresentationContexts:
                if context.abstract_syntax not in self._classes:
                    entity.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)

    def _on_store(self, event: Any) -> int:
        try:
            status = self._store(event)
        except Exception as error:  # the sender must learn that the object is not here
            logger.error("cannot take an object: %s", type(error).__name__)
            status = NOT_UNDERSTOOD
        self._received[id(event.assoc)] = 0
        if status != SUCCESS:
            self.counts["refused"] += 1
        return status

    def _store(self, event: Any) -> int:
        from pydicom import dcmread

        request = event.request
        if str(request.AffectedSOPClassUID) not in self._classes:
            self.counts["ignored"] += 1
            return SUCCESS
        num_bytes = request.DataSet.getbuffer().nbytes
        if num_bytes > self.config.max_object_bytes:
            logger.warning(
                "refused an object of %d bytes, expected at most %d",
                num_bytes,
                self.config.max_object_bytes,
            )
            return OUT_OF_RESOURCES
        data = event.encoded_dataset()
        try:
            header = dcmread(
                BytesIO(data),
                stop_before_pixels=True,
                specific_tags=["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"],
            )
            series = str(header.get("SeriesInstanceUID") or "")
            named = (str(header.get("SOPClassUID")), str(header.get("SOPInstanceUID")))
        except Exception as error:  # whatever broken bytes make of a parser
            logger.warning("refused an object that cannot be read: %s", type(error).__name__)
            return NOT_UNDERSTOOD
        if not series:
            logger.warning("refused an object without a Series Instance UID")
            return NOT_UNDERSTOOD
        if named != (str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID)):
            logger.warning("refused an object that is another than the request says")
            return OTHER_CLASS
        try:
            self._spool.put(series, named[1], data, id(event.assoc))
        except SpoolFullError as error:
            logger.warning("refused an object, the queue is full: %s", error)
            return OUT_OF_RESOURCES
        except OSError as error:
            logger.error("refused an object, the queue cannot be written: %s", error.strerror)
            return OUT_OF_RESOURCES
        self.counts["received"] += 1
        return SUCCESS

    def _on_data(self, event: Any) -> None:
        """Bounds the memory of an object under way: its status could only be told at its end."""
        sender = id(event.assoc)
        self._received[sender] = self._received.get(sender, 0) + len(event.data)
        if self._received[sender] > 2 * self.config.max_object_bytes + 2**20:
            logger.warning(
                "ended an association: an object of more than %d bytes, expected at most %d",
                2 * self.config.max_object_bytes,
                self.config.max_object_bytes,
            )
            self._received[sender] = 0
            event.assoc.abort(block=False)

    def _on_release(self, event: Any) -> None:
        self._spool.end_sender(id(event.assoc), is_release=True)

    def _on_close(self, event: Any) -> None:
        self._spool.end_sender(id(event.assoc), is_release=False)
        self._received.pop(id(event.assoc), None)

    def _on_rejected(self, event: Any) -> None:
        self.counts["rejected associations"] += 1
        title = ascii(str(event.assoc.requestor.ae_title)[:16])
        logger.warning("refused an association of AE title %s", title)

    def _forever(self, work: Callable[[], bool]) -> None:
        """Runs a step again and again: at once after one that did something, else after a pause.

        A step that raises ServerError, ConnectionError or OSError is tried again after pauses
        that double.
        """
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            try:
                wait_s = 0.0 if work() else POLL_S
                pause_s = FIRST_PAUSE_S
            except StoppedError:
                return
            except (ServerError, OSError) as error:
                wait_s = pause_s * random.uniform(0.8, 1.2)
                pause_s = min(2 * pause_s, self.config.longest_pause_s)
                logger.warning("%s. Trying again in %.0f s.", _in_words(error), wait_s)
            self._stopping.wait(wait_s)

    def _check(self) -> None:
        if self._stopping.is_set():
            raise StoppedError

    def _classify_next(self) -> bool:
        config, spool = self.config, self._spool
        name = spool.complete(config.quiet_s, at_release=config.at_release)
        if name is None:
            return False
        folder, tries = spool.claim(name)
        files = sorted(folder.glob("*.dcm"))
        try:
            if tries > MAX_TRIES:
                raise ReportError(f"given up after {MAX_TRIES} tries that came to no end")
            results = self._report(files, self._check) if files else None
            if results is None:
                spool.finish(folder, keep=False)
                self.counts["skipped"] += 1
                logger.info("series %s: nothing to report on in %d objects", name, len(files))
                return True
            spool.answer(name, results)
        except (ServerUnavailableError, InferenceTimeoutError, ContractError):
            spool.give_back(name)
            raise
        except ServerError:  # perhaps for this series alone: the try counts
            spool.give_back(name, counts=True)
            raise
        except (StoppedError, OSError):
            spool.give_back(name)
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, ReportError) else type(error).__name__
            spool.fail(folder, reason)
            self.counts["failed"] += 1
            kind = type(error).__name__
            logger.error("series %s: given up (%s); it is in %s", name, kind, "failed")
            if not isinstance(error, ChestCTError):
                logger.debug("series %s", name, exc_info=True)
            return True
        self.counts["classified"] += 1
        logger.info("series %s: classified, %d objects", name, len(files))
        return True

    def _deliver_all(self) -> bool:
        from pydicom import dcmread
        from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
        from pynetdicom import AE

        work = self._spool.unsent()
        if not work:
            return False
        peer = self.config.deliver_to
        entity = AE(ae_title=self.config.ae_title)
        for uid in {
            str(dcmread(result, specific_tags=["SOPClassUID"]).SOPClassUID)
            for _, results in work[:100]
            for result in results
        }:
            entity.add_requested_context(uid, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
        num_refused = 0
        if any(results for _, results in work[:100]):
            association = entity.associate(peer.host, peer.port, ae_title=peer.ae_title)
            if not association.is_established:
                raise ConnectionError(f"{peer.ae_title} at {peer.host}:{peer.port} is unavailable")
            try:
                for folder, results in work[:100]:
                    for result in results:
                        self._check()
                        num_refused += not self._deliver(association, result)
                    self._finish_if_sent(folder)
            finally:
                association.release() if association.is_established else None
        else:
            for folder, _ in work[:100]:
                self._finish_if_sent(folder)
        if num_refused:
            raise ConnectionError(f"{peer.ae_title} did not take {num_refused} objects")
        return True

    def _deliver(self, association: Any, result: Path) -> bool:
        if not association.is_established:
            return False
        try:
            answer = association.send_c_store(result)
        except (ValueError, RuntimeError) as error:
            logger.warning("an object cannot be sent: %s", type(error).__name__)
            return False
        status = answer.get("Status")
        if status is None:
            logger.warning("%s gave no answer to an object", self.config.deliver_to.ae_title)
            return False
        if status != SUCCESS and status not in WARNINGS:
            logger.warning(
                "%s refused an object: status %04X", self.config.deliver_to.ae_title, status
            )
            return False
        self._spool.mark_sent(result)
        self.counts["delivered"] += 1
        return True

    def _finish_if_sent(self, folder: Path) -> None:
        if not any((folder / "results").glob("*.dcm")):
            self._spool.finish(folder, keep=self.config.keep)
            logger.info("series %s: delivered", folder.name.partition(".")[0])


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{type(error).__name__}: {error.strerror}"  # the path says nothing to anybody
    return str(error).rstrip(".")


def _require_pynetdicom() -> None:
    try:
        import pynetdicom  # noqa: F401
    except ImportError as error:
        raise ImportError('A DICOM node needs pynetdicom: pip install "chestct[pacs]"') from error
