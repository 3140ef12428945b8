"""The ASGI application behind the page: four API endpoints and the page that uses them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hashlib
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from importlib.resources import files

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from chestct import __version__
from chestct.batch.decode_pool import DecodedSlice, Picture
from chestct.contract import NOT_A_MEDICAL_DEVICE, ModelMetadata
from chestct.errors import ScanDecodeError, ServerError
from chestct.imaging.metadata import SliceMetadata
from chestct.imaging.prepare import Scan
from chestct.inference.predictions import Predictions
from chestct.results.records import SliceResult, error_line, json_text, result_line
from chestct.web.decoder import Decoder
from chestct.web.metrics import Metrics
from chestct.web.middleware import Guard, error_body
from chestct.web.model_session import ModelLink
from chestct.web.schemas import (
    CLASSIFY,
    HealthBody,
    ModelBody,
    PageResult,
    View,
    error_responses,
)
from chestct.web.settings import WebSettings
from chestct.web.uploads import InFlightBytes, Upload, UploadError, read_uploads, too_large

__all__ = ["create_app"]

AHEAD = 8  # slices of one request between decoder and answer
NDJSON = "application/x-ndjson"
CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".dcm": "application/dicom",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
RETRY_AFTER_S = "2"


def create_app(settings: WebSettings | None = None) -> FastAPI:
    """The page and its API for one model of one server.

    No state of a user is kept: what a request brings lives until it is answered.

    Args:
        settings: Where the model is, limits, and whom to answer.

    Raises:
        ValueError: An address of Triton of another form.
    """
    settings = settings or WebSettings()
    service = _Service(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.decoder.run(), service.link.run():
            yield

    app = FastAPI(
        title="Chest-CT classifier",
        summary="Class probabilities of axial chest-CT slices, from a model served by Triton.",
        description=f"**{NOT_A_MEDICAL_DEVICE}** Nothing that is sent is kept.",
        version=__version__,
        license_info={"name": "Apache-2.0"},
        docs_url=None,  # both would load scripts from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(Guard, settings=settings)

    @app.post("/api/classify", **CLASSIFY)
    async def classify(
        request: Request,
        images: int = Query(
            0, ge=0, le=512, description="Longest side, in pixels, of the pictures for display."
        ),
    ) -> Response:
        """Classify scans: one record for each slice, in order, each as soon as it is known.

        PNG, JPEG, DICOM (multi-frame too) or a zip archive of them, told by content. A file that
        cannot be read costs its own record, with `status` `error`. With `Accept:
        application/x-ndjson` the records come as lines.
        """
        return await service.classify(request, images)

    @app.get(
        "/api/model", response_model=ModelBody, responses=error_responses(401, 503), tags=["model"]
    )
    async def model() -> Response:
        """What is served now: labels, version, run, precision, window, and its card's summary."""
        return service.model()

    @app.get(
        "/healthz", response_model=HealthBody, responses=error_responses(503), tags=["operation"]
    )
    async def healthz() -> Response:
        """Whether a scan can be classified, by a real inference that is at most a second old."""
        try:
            await service.decoder.require()
            return JSONResponse(vars(await service.link.health()))
        except ServerError as error:
            return _unavailable(error)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **error_responses(401),
        },
        tags=["operation"],
    )
    async def metrics() -> Response:
        """Counters and times in the text format of Prometheus."""
        return Response(*service.metrics.text(service.decoder, service.link, service.held))

    assets = _assets()

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return assets["index.html"](request)

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        if name not in assets:
            return JSONResponse(error_body("NotFoundError", "no such file"), 404)
        return assets[name](request)

    return app


class _Service:
    """State shared by the endpoints."""

    def __init__(self, settings: WebSettings) -> None:
        self.settings = settings
        self.link = ModelLink(settings)
        self.decoder = Decoder(settings)
        self.metrics = Metrics()
        self.held = InFlightBytes(settings.max_held_bytes)

    def model(self) -> Response:
        try:
            facts, version = self.link.facts, self.link.version
        except ServerError as error:
            return _unavailable(error)
        try:
            card = json.loads(facts.card) if facts.card else None
        except ValueError:
            card = None
        return JSONResponse(
            {
                "name": self.settings.model,
                "version": version,
                "run": facts.run,
                "precision": facts.precision,
                "labels": list(facts.class_names),
                "window": {
                    "center_hu": facts.window.center_hu,
                    "width_hu": facts.window.width_hu,
                },
                "temperature": facts.temperature,
                "domain_threshold": facts.domain_threshold,
                "data_hash": facts.data_hash,
                "card": card if isinstance(card, dict) else None,
                "limits": {
                    "upload_bytes": self.settings.max_upload_bytes,
                    "scans": self.settings.max_scans,
                },
                "notice": NOT_A_MEDICAL_DEVICE,
            }
        )

    async def classify(self, request: Request, images: int) -> Response:
        held = [0]

        def release() -> None:
            self.held.release(held[0])
            held[0] = 0

        try:
            if self.link.trouble is not None:
                return _unavailable(self.link.trouble)
            uploads = await self._uploads(request, held)
        except UploadError as error:
            release()
            self.metrics.refused.labels(str(error.status)).inc()
            headers = {"retry-after": RETRY_AFTER_S} if error.status == 503 else {}
            # What was not read yet must not be taken for the next request.
            headers["connection"] = "close"
            body = error_body("UploadError", str(error))
            return JSONResponse(body, error.status, headers)
        except ClientDisconnect:
            release()
            return Response(status_code=400)
        except BaseException:
            release()
            raise
        lines = self._lines(uploads, images)
        wants_lines = NDJSON in request.headers.get("accept", "")
        return _Records(lines, release, as_lines=wants_lines)

    async def _uploads(self, request: Request, held: list[int]) -> list[Upload]:
        limit = self.settings.max_upload_bytes
        length = request.headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            raise UploadError(400, "Content-Length is no number")
        if int(length) > limit:
            raise UploadError(413, too_large(limit))
        content_type = request.headers.get("content-type", "")
        try:
            async with asyncio.timeout(self.settings.upload_timeout_s):
                return await read_uploads(request.stream(), content_type, limit, held, self.held)
        except TimeoutError:
            limit_s = self.settings.upload_timeout_s
            raise UploadError(408, f"the upload took longer than {limit_s:g} s") from None

    async def _lines(
        self, uploads: Sequence[Upload], side: int
    ) -> AsyncGenerator[SliceResult, None]:
        """Records in order; decoding runs ahead of the model by a few slices."""
        waiting: deque[asyncio.Task[SliceResult]] = deque()
        num_scans = 0
        try:
            for upload in uploads:
                async for name, found, metadata in self._scans(upload, side):
                    num_scans += 1
                    if num_scans > self.settings.max_scans:
                        text = f"more than {self.settings.max_scans} slices in one upload"
                        yield error_line(upload.name, UploadError(413, text))
                        return
                    waiting.append(asyncio.create_task(self._line(name, found, metadata)))
                    while waiting and (waiting[0].done() or len(waiting) > AHEAD):
                        yield await waiting.popleft()
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()

    async def _scans(
        self, upload: Upload, side: int
    ) -> AsyncGenerator[tuple[str, DecodedSlice | ServerError, ModelMetadata | None], None]:
        """Slices of an upload by name, and the metadata whose window they are shown in."""
        try:
            metadata = self.link.facts
        except ServerError as error:
            yield upload.name, error, None
            return
        async with contextlib.aclosing(self.decoder.scans(upload, metadata.window, side)) as scans:
            async for scan in scans:
                yield scan.name, scan, metadata

    async def _line(
        self, name: str, found: DecodedSlice | ServerError, metadata: ModelMetadata | None
    ) -> SliceResult:
        line = await self._record(name, found, metadata)
        self.metrics.scans.labels(
            line["status"], line.get("label", line.get("error", {}).get("type"))
        ).inc()
        self.metrics.outside.inc(line.get("in_domain") is False)
        return line

    async def _record(
        self, name: str, found: DecodedSlice | ServerError, metadata: ModelMetadata | None
    ) -> SliceResult:
        if isinstance(found, ServerError):
            return error_line(name, found)
        scan = found.scan
        if isinstance(scan, ScanDecodeError):
            return error_line(name, scan)
        self.metrics.decode_s.observe(found.decode_ms / 1000)
        start = time.perf_counter()
        try:
            with_map = found.picture is not None
            predictions = await self.link.classify(scan.pixels, with_map, metadata)
        except ServerError as error:
            return error_line(name, error)
        infer_ms = 1000 * (time.perf_counter() - start)
        self.metrics.infer_s.observe(infer_ms / 1000)
        line = result_line(
            name,
            predictions,
            0,
            decode_ms=found.decode_ms,
            infer_ms=infer_ms,
            reasons=scan.reasons,
        )
        if found.picture is None:
            return line
        of_slice = scan.metadata or SliceMetadata()
        series = self.decoder.series_alias(of_slice.series_uid)
        view = _view(scan, found.picture, predictions, series, of_slice.position_mm)
        shown: PageResult = {**line, "view": view}
        return shown


def _view(
    scan: Scan,
    picture: Picture,
    predictions: Predictions,
    series: str,
    position_mm: float | None,
) -> View:
    """What the page draws; shapes and meaning stand in the OpenAPI description."""
    shape = picture.pixels.shape
    top, left, bottom, right = picture.box
    evidence = {}
    if predictions.activation_map is not None:
        maps = predictions.activation_map[0].transpose(2, 0, 1)
        evidence = {
            label: [[round(float(value), 3) for value in row] for row in places]
            for label, places in zip(predictions.metadata.class_names, maps, strict=True)
        }
    return {
        "network": {
            "width": scan.pixels.shape[1],
            "height": scan.pixels.shape[0],
            "channels": 1,
            "kind": "uint8",
            "data": base64.b64encode(scan.pixels.tobytes()).decode(),
        },
        "original": {
            "width": shape[1],
            "height": shape[0],
            "channels": 3 if len(shape) == 3 else 1,
            "kind": "uint8" if picture.pixels.dtype.name == "uint8" else "int16",
            "data": base64.b64encode(picture.pixels.tobytes()).decode(),
        },
        "inverted": picture.is_inverted,
        "size": {"height": picture.size[0], "width": picture.size[1]},
        "box": {"top": top, "left": left, "bottom": bottom, "right": right},
        "activation_map": evidence,
        "series": series,
        "position_mm": position_mm,
    }


class _Records(StreamingResponse):
    """Records as they come: lines, or one JSON object; whatever happens, the upload is let go."""

    def __init__(
        self,
        lines: AsyncGenerator[SliceResult, None],
        release: Callable[[], None],
        *,
        as_lines: bool,
    ) -> None:
        self._lines, self._release = lines, release
        content = self._as_lines() if as_lines else self._as_object()
        super().__init__(content, media_type=NDJSON if as_lines else "application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except TimeoutError:
            raise ClientDisconnect from None
        finally:
            self._release()
            await self._lines.aclose()

    async def _as_lines(self) -> AsyncIterator[str]:
        async for line in self._lines:
            yield json_text(line)

    async def _as_object(self) -> AsyncIterator[str]:
        separator = '{"results": ['
        async for line in self._lines:
            yield separator + json_text(line)
            separator = ", "
        yield "]}"


def _unavailable(error: ServerError) -> Response:
    body = error_body(type(error).__name__, str(error))
    return JSONResponse(body, 503, {"retry-after": RETRY_AFTER_S})


def _assets() -> dict[str, Callable[[Request], Response]]:
    """The files of the page by name, read once; no path of a request reaches the disk."""
    return {
        entry.name: _asset(entry.name, entry.read_bytes())
        for entry in files("chestct.web").joinpath("static").iterdir()
        if "." + entry.name.rpartition(".")[2] in CONTENT_TYPES
    }


def _asset(name: str, content: bytes) -> Callable[[Request], Response]:
    kind = CONTENT_TYPES["." + name.rpartition(".")[2]]
    packed = gzip.compress(content, mtime=0)
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'

    def answer(request: Request) -> Response:
        headers = {
            "cache-control": "no-cache",
            "content-type": kind,
            "etag": tag,
            "vary": "accept-encoding",
        }
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(packed, headers={**headers, "content-encoding": "gzip"})
        return Response(content, headers=headers)

    return answer
