"""Limits on the size of a scan file and on the memory of the process that decodes it."""

from __future__ import annotations

from chestct.errors import ScanDecodeError

__all__ = [
    "ACCEPTED",
    "DECODE_MEMORY_BYTES",
    "MAX_FILE_BYTES",
    "MAX_FRAMES",
    "MAX_PIXELS",
    "MAX_SLICE_PIXELS",
    "MIN_SIDE_PX",
    "limit_memory",
    "require_sides",
    "require_size",
]

MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 64 * 10**6  # below the limit at which Pillow itself begins to warn
MAX_SLICE_PIXELS = 4096 * 4096  # of DICOM; scanners make 512 to 2048 a side
MAX_FRAMES = 4096  # 2 m of body in slices of 0.5 mm
MIN_SIDE_PX = 32
DECODE_MEMORY_BYTES = 2 * 2**30  # of one process; the largest file that is what it says fits in
ACCEPTED = "expected an axial slice as PNG, JPEG or DICOM"


def require_size(num_bytes: int, name: str) -> None:
    """Refuse a file that is empty or too large.

    Raises:
        ScanDecodeError: It has 0 bytes or more than `MAX_FILE_BYTES`.
    """
    if num_bytes == 0:
        raise ScanDecodeError(f"{name}: the file is empty, {ACCEPTED}")
    if num_bytes > MAX_FILE_BYTES:
        raise ScanDecodeError(
            f"{name}: {num_bytes / 2**20:.0f} MiB, expected at most {MAX_FILE_BYTES // 2**20} MiB"
        )


def require_sides(width: int, height: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse a picture that is too large or too small.

    Raises:
        ScanDecodeError: It has more than `max_pixels` pixels or a side below `MIN_SIDE_PX`.
    """
    if width * height > max_pixels:
        raise ScanDecodeError(
            f"{name}: {width} x {height} pixels, expected at most {max_pixels // 10**6} million"
        )
    if min(width, height) < MIN_SIDE_PX:
        raise ScanDecodeError(
            f"{name}: {width} x {height} pixels, expected at least {MIN_SIDE_PX} a side"
        )


def limit_memory(num_bytes: int) -> None:
    """Limit the address space of this process; beyond it, Python raises `MemoryError`.

    Limits of files alone do not bound their decoding: the head of a DICOM file made for the
    purpose takes about 50 times its size.

    Raises:
        ImportError: The system has no such limits (Windows).
        ValueError: It has a lower one already.
        OSError: It refuses.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
