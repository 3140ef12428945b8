"""The page's session with Triton, refreshed every two seconds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

import numpy as np
import numpy.typing as npt

from chestct.client import AsyncScanClient
from chestct.contract import ModelMetadata
from chestct.errors import (
    ContractError,
    InferenceError,
    ModelExchangedError,
    ServerError,
    ServerUnavailableError,
)
from chestct.inference.predictions import Health, Predictions
from chestct.web.settings import WebSettings

__all__ = ["ModelLink"]

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
LOOK_TIMEOUT_S = 3.0
HEALTH_HOLDS_S = 1.0
MOST_AT_ONCE = 16  # requests to Triton; it makes batches of what waits


class ModelLink:
    """One client for all users, which reads anew every two seconds what the server serves.

    A server that was started anew may serve other labels under the same version, so a lost
    connection is never bridged by a retry: the request fails, and the next one finds the new facts.
    """

    def __init__(self, settings: WebSettings) -> None:
        """Nothing is sent before `run`.

        Raises:
            ValueError: An address of another form.
        """
        self._client = AsyncScanClient(
            settings.url,
            settings.model,
            timeout_s=settings.timeout_s,
            connect_timeout_s=LOOK_TIMEOUT_S,
            tls=settings.tls,
            unavailable_timeout_s=0,
        )
        self._trouble: ServerError | None = ServerUnavailableError(
            f"{settings.url}: not connected yet"
        )
        self._slots = asyncio.Semaphore(MOST_AT_ONCE)
        self._look_now = asyncio.Event()
        self._health_lock = asyncio.Lock()
        self._health: Health | ServerError | None = None
        self._health_at = 0.0

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Keeps looking for the model as long as the context lasts."""
        await self._look()
        looking = asyncio.create_task(self._keep_looking())
        try:
            yield
        finally:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking
            await self._client.close()

    @property
    def trouble(self) -> ServerError | None:
        """Why there is no usable model; None while there is one."""
        return self._trouble

    @property
    def facts(self) -> ModelMetadata:
        """What the model told of itself when it was looked at last.

        Raises:
            ServerError: There is no usable model.
        """
        self._require()
        return self._client.metadata

    @property
    def version(self) -> str:
        """Version of the model that `facts` belong to.

        Raises:
            ServerError: There is no usable model.
        """
        self._require()
        return self._client.model_version

    async def classify(
        self, scan: npt.NDArray[np.uint8], with_map: bool, prepared_for: ModelMetadata | None
    ) -> Predictions:
        """What the model says of one scan, uint8 (224, 224, 1), in the window of `prepared_for`.

        Raises:
            ServerError: There is no usable model, or it failed.
        """
        async with self._slots:
            self._require()
            try:
                return await self._client.infer(
                    scan[np.newaxis], with_map=with_map, prepared_for=prepared_for
                )
            except (
                ServerUnavailableError, ContractError, ModelExchangedError, InferenceError
            ) as error:  # fmt: skip
                if not isinstance(error, InferenceError | ModelExchangedError):
                    self._trouble = error
                self._look_now.set()
                raise

    async def health(self) -> Health:
        """The outcome of a real inference, at most a second old; one at a time is made.

        Raises:
            ServerError: The model does not answer as it should.
        """
        async with self._health_lock:
            if self._health is None or time.monotonic() - self._health_at > HEALTH_HOLDS_S:
                try:
                    self._require()
                    self._health = await self._client.health()
                except ServerError as error:
                    self._health = error
                    self._look_now.set()
                self._health_at = time.monotonic()
            if isinstance(self._health, ServerError):
                raise self._health
            return self._health

    def _require(self) -> None:
        if self._trouble is not None:
            raise self._trouble

    async def _keep_looking(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._look_now.wait()
            self._look_now.clear()
            await self._look()

    async def _look(self) -> None:
        before = self._trouble
        try:
            await self._client.connect()
            self._trouble = None
        except ServerError as error:
            self._trouble = error
        if type(before) is not type(self._trouble):
            logger.info("model: %s", self._trouble or "ready")
