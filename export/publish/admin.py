"""Admin API of a running Triton: load and unload models, list the ready ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from chestct.contract import MODEL_NAME
from chestct.inference.server_pool import ServerPool
from chestct.inference.wires import TLSOptions

ADMIN_KEY = "CHESTCT_ADMIN_KEY"  # environment variable; never an argument, which `ps` shows
SETTLE_S = 30.0


class TritonAdmin:
    """The admin API of a running Triton over HTTP, and sessions with its models.

    Like the client over HTTP, it connects directly, whatever proxies the environment names.
    """

    def __init__(
        self, url: str, admin_key: str, tls: TLSOptions | None = None, timeout_s: float = 600.0
    ) -> None:
        """Nothing is sent yet.

        Raises:
            ValueError: Another address than http:// or https://, or no key.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url}: the admin API is reached over http:// or https://")
        if not admin_key:
            raise ValueError(f"no admin key; put the server's into the environment as {ADMIN_KEY}")
        self.url, self._tls, self._timeout_s = url.rstrip("/"), tls, timeout_s
        self._headers = {"admin-key": admin_key}

    def session(self, model: str = MODEL_NAME) -> ServerPool:
        """A session with a model, not connected yet."""
        return ServerPool(self.url, model, tls=self._tls, connect_timeout_s=SETTLE_S)

    def load(self, model: str) -> None:
        """Load or reload a model from the repository; returns when it is ready.

        Raises:
            ValueError: Triton refuses; it goes on serving the version that it served before.
            OSError: The server does not answer.
        """
        with self._client(f"models/{model}/load") as client:
            client.load_model(model, headers=self._headers)

    def unload(self, model: str) -> None:
        """Unload a model; nothing happens where it is not loaded.

        Raises:
            ValueError: Triton refuses.
            OSError: The server does not answer.
        """
        with self._client(f"models/{model}/unload") as client:
            client.unload_model(model, headers=self._headers)

    def ready(self) -> set[str]:
        """Names of the models that are ready.

        Raises:
            ValueError: Triton refuses.
            OSError: The server does not answer.
        """
        with self._client("index") as client:
            index = client.get_model_repository_index(headers=self._headers)
        return {item["name"] for item in index if item.get("state") == "READY"}

    def _ssl_context(self) -> Any:
        """The certificates given, or the system's: tritonclient's default is a store of its own."""
        from gevent.ssl import create_default_context

        tls = self._tls or TLSOptions()
        context = create_default_context(cafile=tls.ca)
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
        return context

    @contextmanager
    def _client(self, request: str) -> Iterator[Any]:
        """A client of tritonclient for one request, whose errors become ValueError and OSError."""
        from tritonclient.http import InferenceServerClient
        from tritonclient.utils import InferenceServerException

        parts = urlsplit(self.url)
        try:
            with InferenceServerClient(
                parts.netloc + parts.path,
                connection_timeout=self._timeout_s,
                network_timeout=self._timeout_s,
                ssl=parts.scheme == "https",
                ssl_context_factory=self._ssl_context,
            ) as client:
                yield client
        except InferenceServerException as error:
            text = f"{self.url}: {request}: HTTP {error.status()}: {error.message()[:500]}"
            if error.status() in ("401", "403"):
                text += f" (is {ADMIN_KEY} the key of this server?)"
            raise ValueError(text) from error
        except OSError as error:
            raise ConnectionError(f"{self.url}: {request}: {error}") from error
        except Exception as error:  # of geventhttpclient, whose errors have no common class
            raise ConnectionError(
                f"{self.url}: {request}: {type(error).__name__} {error}"
            ) from error
