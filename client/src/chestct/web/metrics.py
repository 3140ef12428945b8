"""Prometheus metrics of the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as text_of

if TYPE_CHECKING:
    from chestct.web.decoder import Decoder
    from chestct.web.model_session import ModelLink
    from chestct.web.uploads import InFlightBytes

__all__ = ["Metrics"]

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """Counters and times of one application; no label holds anything that a user sent."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.scans = Counter(
            "chestct_web_scans", "Slices answered, by status and label or error.",
            ["status", "kind"], registry=self._registry,
        )  # fmt: skip
        self.outside = Counter(
            "chestct_web_scans_out_of_domain", "Slices answered and flagged as out of domain.",
            registry=self._registry,
        )  # fmt: skip
        self.refused = Counter(
            "chestct_web_uploads_refused", "Uploads refused, by HTTP status.", ["status"],
            registry=self._registry,
        )  # fmt: skip
        self.decode_s = Histogram(
            "chestct_web_decode_seconds", "Decoding of a slice.", buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.infer_s = Histogram(
            "chestct_web_infer_seconds", "Answer of the model, wire and queue included.",
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._up = Gauge(
            "chestct_web_model_up", "Whether there is a usable model.", registry=self._registry
        )
        self._replaced = Gauge(
            "chestct_web_workers_replaced", "Decoding processes lost since the start.",
            registry=self._registry,
        )  # fmt: skip
        self._held = Gauge(
            "chestct_web_held_bytes", "Uploads in memory now.", registry=self._registry
        )

    def text(
        self, decoder: Decoder, link: ModelLink, held: InFlightBytes
    ) -> tuple[bytes, int, None, str]:
        """Body, status, headers and media type of the answer."""
        self._up.set(link.trouble is None)
        self._replaced.set(decoder.num_replaced)
        self._held.set(held.num_bytes)
        return text_of(self._registry), 200, None, CONTENT_TYPE_LATEST
