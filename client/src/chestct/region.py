"""Memory that client and server share when they run on one host, instead of the wire."""

from __future__ import annotations

from collections.abc import Mapping
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import numpy.typing as npt

from chestct.contract import INPUT_NAME, SCAN_SHAPE, output_specs

__all__ = ["Region", "SharedAnswer"]


class Region:
    """Room for one request: the scans, and behind them each output of the answer.

    It carries one request at a time. What a server may still be reading or writing, after a
    request that failed, must not carry another.

    Attributes:
        name: What the region is called, here and on the server.
        num_bytes: Its size.
    """

    def __init__(self, max_batch_size: int, num_classes: int) -> None:
        """Makes the region.

        Args:
            max_batch_size: The most scans in a request.
            num_classes: How many classes the model has.

        Raises:
            OSError: No shared memory is to be had here.
        """
        self._num_bytes_of = {INPUT_NAME: int(np.prod(SCAN_SHAPE))} | {
            spec.name: 4 * int(np.prod(spec.shape[1:])) for spec in output_specs(num_classes)
        }
        ends = np.cumsum([0, *self._num_bytes_of.values()]) * max_batch_size
        self._start_of = dict(zip(self._num_bytes_of, map(int, ends), strict=False))
        self.num_bytes = int(ends[-1])
        self._memory = SharedMemory(create=True, size=self.num_bytes)
        self.name = self._memory.name

    def write(self, scans: npt.NDArray[np.uint8]) -> None:
        """Puts uint8 (N, 224, 224, 1) in."""
        np.ndarray(scans.shape, np.uint8, self._memory.buf)[:] = scans

    def place(self, tensor: str, num_scans: int) -> Mapping[str, Any]:
        """Where a tensor of N scans lies, as tritonclient's `set_shared_memory` wants it."""
        return {
            "region_name": self.name,
            "byte_size": num_scans * self._num_bytes_of[tensor],
            "offset": self._start_of[tensor],
        }

    def read(self, tensor: str, num_scans: int) -> npt.NDArray[np.float32]:
        """A copy of an output of N scans, float32, flat."""
        size = num_scans * self._num_bytes_of[tensor] // 4
        return np.ndarray(size, np.float32, self._memory.buf, self._start_of[tensor]).copy()

    def close(self) -> None:
        """Gives the memory back; a server that has it open keeps its own view."""
        self._memory.close()
        self._memory.unlink()


class SharedAnswer:
    """A result of tritonclient whose outputs came through a region, as far as it is used here."""

    def __init__(self, result: Any, outputs: Mapping[str, npt.NDArray[np.float32]]) -> None:
        self._result = result
        self._outputs = outputs

    def get_response(self) -> Any:
        """The answer without its tensors."""
        return self._result.get_response()

    def as_numpy(self, name: str) -> npt.NDArray[np.float32] | None:
        """One output in the shape that the server tells, None if it tells of none."""
        output = self._result.get_output(name)
        if output is None:
            return None
        shape = output["shape"] if isinstance(output, dict) else output.shape
        return self._outputs[name].reshape(tuple(shape))
