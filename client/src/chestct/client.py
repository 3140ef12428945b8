"""Classify files, DICOM datasets, arrays and series with a served model, blocking or asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import (
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypedDict, TypeVar, Unpack

import numpy as np
import numpy.typing as npt

from chestct.batch.decode_pool import DecodePool
from chestct.batch.pipeline import classify_sources
from chestct.contract import MODEL_NAME, ModelMetadata
from chestct.errors import ScanDecodeError
from chestct.imaging._warnings import without_warnings
from chestct.imaging.metadata import SliceMetadata
from chestct.imaging.prepare import Scan, inspect_bytes, resize_scan
from chestct.imaging.sources import Source, list_sources
from chestct.imaging.window import apply_window
from chestct.inference.predictions import Health, Predictions, ScanArray
from chestct.inference.server_pool import ServerPool, in_thread
from chestct.results.records import Record, SliceResult, result_line
from chestct.results.series import SeriesSlice, series_record
from chestct.results.writers import DecodedInput

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["AsyncScanClient", "CallOptions", "ScanClient"]

T = TypeVar("T")
PathLike = str | os.PathLike[str]


class CallOptions(TypedDict, total=False):
    """Options of a call, see `ScanClient.infer`.

    `with_map` adds `activation_map` to a record: float32 (14, 14, C), class evidence at each place.
    """

    with_map: bool
    timeout_s: float | None
    headers: Mapping[str, str] | None
    request_id: str


class ScanClient(ServerPool):
    """A blocking session with one or several servers; threads may share it.

    Window and labels are those of the model that is served. A record is the mapping that every
    JSON line of the command holds, see the README.

    Example:
        >>> with ScanClient("grpc://127.0.0.1:8001") as client:
        ...     print(client.classify_file("slice.dcm")["label"])
    """

    def classify_file(
        self, source: PathLike | bytes | BinaryIO, **options: Unpack[CallOptions]
    ) -> Record:
        """Classify a PNG, JPEG or DICOM file with one slice.

        Args:
            source: Its path, its bytes, or a file opened for reading bytes.
            options: See `CallOptions`.

        Raises:
            ScanDecodeError: It cannot be read, or is no axial CT slice by its DICOM tags.
            ServerError: No answer, see `infer`.
        """
        metadata, start_s = self.metadata, time.perf_counter()
        if isinstance(source, (str, os.PathLike)):
            file = Source(Path(source))
            data, name = file.read(), file.name
        else:
            data = source if isinstance(source, bytes) else source.read()
            given = getattr(source, "name", None)
            name = given if isinstance(given, str) else "scan"
        scan = inspect_bytes(data, name, metadata.window)
        return self._record(name, scan, metadata, start_s, options)

    def classify_dataset(self, dataset: Dataset, **options: Unpack[CallOptions]) -> Record:
        """Classify a DICOM dataset of one slice; `path` of the record is its SOP Instance UID.

        Raises:
            ScanDecodeError: It cannot be read, or is no axial CT slice by its tags.
            ServerError: No answer, see `infer`.
        """
        metadata, start_s = self.metadata, time.perf_counter()
        name, file = str(dataset.get("SOPInstanceUID", "dataset")), BytesIO()
        try:
            with without_warnings:
                dataset.save_as(file, enforce_file_format=True)
        except (AttributeError, ValueError, TypeError, OSError) as error:
            raise ScanDecodeError(
                f"{name}: cannot be encoded ({error}). Set file_meta.TransferSyntaxUID."
            ) from error
        scan = inspect_bytes(file.getvalue(), name, metadata.window)
        return self._record(name, scan, metadata, start_s, options)

    def classify_hu(
        self, hu: npt.NDArray[np.floating[Any] | np.integer[Any]], **options: Unpack[CallOptions]
    ) -> Record:
        """Classify an axial slice in Hounsfield units.

        The front of the patient is at the top and the patient's right at the left. `in_domain`
        rests on the network alone: an array has no tags to check.

        Args:
            hu: (H, W), after rescale slope and intercept.
            options: See `CallOptions`.

        Raises:
            ValueError: Another number of axes, or values that are not finite.
            ServerError: No answer, see `infer`.
        """
        metadata, start_s = self.metadata, time.perf_counter()
        if hu.ndim != 2 or not np.isfinite(hu).all():
            raise ValueError(f"hu is {hu.dtype} {hu.shape}: expected finite values (H, W)")
        scan = Scan(resize_scan(apply_window(hu, metadata.window)), ())
        return self._record("array", scan, metadata, start_s, options)

    def classify_many(
        self,
        sources: PathLike | Iterable[PathLike | Source],
        *,
        batch_size: int = 8,
        workers: int | None = None,
        with_map: bool = False,
    ) -> Generator[Record, None, None]:
        """Classify many files: decoded ahead, sent in batches, in order.

        Args:
            sources: Files, folders or zip archives; drawn from as needed, so it may be endless.
            batch_size: How many scans go into one request.
            workers: How many files are decoded at once; by default one for each processor.
            with_map: Whether records carry `activation_map`.

        Yields:
            A record for each slice. One that cannot be decoded, or is no axial CT slice by its
            DICOM tags, gets a record of its error.

        Raises:
            ServerError: The servers failed; records of finished scans have been yielded.
            ValueError: `batch_size` or `workers` below 1.
        """
        for record, item in self._classified(sources, batch_size, workers, with_map):
            yield record if not with_map else _with_map(record, item.activation_map)

    def classify_series(
        self, source: PathLike | Sequence[PathLike], *, with_uids: bool = False
    ) -> Record:
        """Classify the slices of one series and sum them up: see `chestct.results.series`.

        Args:
            source: The folder or archive that holds the series, or its files.
            with_uids: Whether the record carries the UIDs of study and series.

        Raises:
            ScanDecodeError: No slice can be read, or there are several series.
            ServerError: The servers failed.
        """
        slices, num_failed = [], 0
        for record, item in self._classified(source):
            if item.scan is None:
                num_failed += record["error"]["type"] != "OutOfDomainError"
            else:
                facts = item.scan.metadata or SliceMetadata()
                slices.append(SeriesSlice.from_record(record, facts))
        num_series = len({each.facts.series_uid for each in slices})
        if num_series != 1:
            raise ScanDecodeError(
                f"{source}: slices of {num_series} series can be read, expected those of one"
            )
        return series_record(slices, num_failed=num_failed, with_uids=with_uids)

    def _classified(
        self,
        sources: PathLike | Iterable[PathLike | Source],
        batch_size: int = 8,
        workers: int | None = None,
        with_map: bool = False,
    ) -> Iterator[tuple[SliceResult, DecodedInput]]:
        roots = [sources] if isinstance(sources, (str, os.PathLike)) else sources
        found = chain.from_iterable(map(_sources, roots))
        with DecodePool(workers) as decoders:
            yield from classify_sources(self, found, decoders, batch_size, with_map=with_map)

    def _record(
        self,
        name: str,
        scan: Scan,
        metadata: ModelMetadata,
        start_s: float,
        options: CallOptions,
    ) -> Record:
        decoded_s = time.perf_counter()
        predictions = self.infer(scan.pixels[np.newaxis], prepared_for=metadata, **options)
        record = result_line(
            name,
            predictions,
            0,
            decode_ms=1000 * (decoded_s - start_s),
            infer_ms=1000 * (time.perf_counter() - decoded_s),
            reasons=scan.reasons,
        )
        maps = predictions.activation_map
        return record if maps is None else _with_map(record, maps[0])


class AsyncScanClient:
    """`ScanClient` for asyncio: the same arguments, methods, results and errors.

    Each call runs in a thread, so the event loop goes on. A call that is cancelled is not waited
    for, and ends at its limit.

    Example:
        >>> async with AsyncScanClient("grpc://127.0.0.1:8001") as client:
        ...     print((await client.classify_file("slice.dcm"))["label"])
    """

    def __init__(
        self,
        urls: str | Sequence[str] = "grpc://127.0.0.1:8001",
        model: str = MODEL_NAME,
        version: str = "",
        **options: Any,
    ) -> None:
        """Takes the arguments of `ScanClient`; nothing is sent before `connect`."""
        self._client = ScanClient(urls, model, version, **options)

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def metadata(self) -> ModelMetadata:
        """See `ScanClient.metadata`."""
        return self._client.metadata

    @property
    def model_version(self) -> str:
        """See `ScanClient.model_version`."""
        return self._client.model_version

    async def connect(self) -> None:
        """See `ScanClient.connect`."""
        await self._run(self._client.connect)

    async def infer(
        self,
        scans: ScanArray,
        *,
        prepared_for: ModelMetadata | None = None,
        **options: Unpack[CallOptions],
    ) -> Predictions:
        """See `ScanClient.infer`."""
        return await self._run(self._client.infer, scans, prepared_for=prepared_for, **options)

    async def classify_file(
        self, source: PathLike | bytes | BinaryIO, **options: Unpack[CallOptions]
    ) -> Record:
        """See `ScanClient.classify_file`."""
        return await self._run(self._client.classify_file, source, **options)

    async def classify_dataset(self, dataset: Dataset, **options: Unpack[CallOptions]) -> Record:
        """See `ScanClient.classify_dataset`."""
        return await self._run(self._client.classify_dataset, dataset, **options)

    async def classify_hu(
        self, hu: npt.NDArray[np.floating[Any] | np.integer[Any]], **options: Unpack[CallOptions]
    ) -> Record:
        """See `ScanClient.classify_hu`."""
        return await self._run(self._client.classify_hu, hu, **options)

    async def classify_many(
        self, sources: PathLike | Iterable[PathLike | Source], **options: Any
    ) -> AsyncIterator[Record]:
        """See `ScanClient.classify_many`."""
        records = self._client.classify_many(sources, **options)
        try:
            while (record := await self._run(next, records, None)) is not None:
                yield record
        finally:
            with contextlib.suppress(ValueError):  # a cancelled `next` still runs in its thread
                await self._run(records.close)

    async def classify_series(
        self, source: PathLike | Sequence[PathLike], *, with_uids: bool = False
    ) -> Record:
        """See `ScanClient.classify_series`."""
        return await self._run(self._client.classify_series, source, with_uids=with_uids)

    async def health(self) -> Health:
        """See `ScanClient.health`."""
        return await self._run(self._client.health)

    async def close(self) -> None:
        """See `ScanClient.close`."""
        await self._run(self._client.close)

    async def _run(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        return await asyncio.wrap_future(in_thread(function, *arguments, **options))


def _sources(root: PathLike | Source) -> Iterable[Source]:
    if isinstance(root, Source):
        return [root]
    # A file that has vanished is a record of an error.
    return list_sources(root) if os.path.lexists(root) else [Source(Path(root))]


def _with_map(record: Record, activation_map: npt.NDArray[np.float32] | None) -> Record:
    return record if activation_map is None else {**record, "activation_map": activation_map}
