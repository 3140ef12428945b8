"""Settings of the page: server, limits, authentication."""

from __future__ import annotations

from dataclasses import dataclass, field

from chestct.contract import MODEL_NAME
from chestct.imaging.limits import DECODE_MEMORY_BYTES
from chestct.inference.wires import TLSOptions

__all__ = ["WebSettings"]


@dataclass(frozen=True)
class WebSettings:
    """Settings of the page.

    Attributes:
        url: Address of Triton.
        model: Name of the model.
        timeout_s: Deadline of one inference.
        tls: Certificates for Triton.
        hosts: Values of the header Host that are answered, without the port; any other is refused,
            so that no foreign name can be pointed at this server (DNS rebinding).
        token: What the API wants as `Authorization: Bearer TOKEN`; empty for nothing.
        user_header: Header in which a reverse proxy names the user it has let in; the API refuses
            requests without it. Empty for no proxy.
        proxies: Addresses of the proxy, from which alone `user_header` is believed.
        max_upload_bytes: Of one request, files of a zip archive counted as packed.
        max_held_bytes: Of all requests under way together.
        max_scans: Slices in one request.
        max_pixels: Of one slice.
        upload_timeout_s: From the first byte of a request to the last.
        decode_timeout_s: For one slice.
        worker_memory_bytes: Address space of one decoding process.
        workers: Decoding processes.
        requests_a_minute: Uploads of one address (or user of the proxy) in the long run.
        burst: Uploads that may come at once before that rate holds.
    """

    url: str = "grpc://127.0.0.1:8001"
    model: str = MODEL_NAME
    timeout_s: float = 30.0
    tls: TLSOptions | None = None
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    token: str = field(default="", repr=False)
    user_header: str = ""
    proxies: tuple[str, ...] = ("127.0.0.1", "::1")
    max_upload_bytes: int = 256 * 2**20
    max_held_bytes: int = 2**30
    max_scans: int = 2000
    max_pixels: int = 16 * 10**6
    upload_timeout_s: float = 120.0
    decode_timeout_s: float = 10.0
    worker_memory_bytes: int = DECODE_MEMORY_BYTES
    workers: int = 2
    requests_a_minute: int = 600
    burst: int = 300

    def __post_init__(self) -> None:
        """Refuse settings with which nothing could be answered.

        Raises:
            ValueError: A number below 1, or no host.
        """
        for name in (
            "timeout_s", "max_upload_bytes", "max_held_bytes", "max_scans", "max_pixels",
            "upload_timeout_s", "decode_timeout_s", "worker_memory_bytes", "workers",
            "requests_a_minute", "burst",
        ):  # fmt: skip
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} is {value}: expected a positive number")
        if not self.hosts:
            raise ValueError("hosts is empty: expected at least one name")
