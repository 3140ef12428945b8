"""A DICOM file made to fill the memory."""

from __future__ import annotations

import struct


def dicom_that_swells(num_elements: int) -> bytes:
    """A head of 8 bytes an element, each of which takes some 400 bytes in memory."""
    undefined = 0xFFFFFFFF  # length: then the elements are read one by one, DICOM PS3.5, 7.5
    syntax = b"1.2.840.10008.1.2.1\0"
    meta = struct.pack("<HH2sH", 0x0002, 0x0010, b"UI", len(syntax)) + syntax
    elements = b"".join(
        struct.pack("<HH2sH", 0x1001 + 2 * (index >> 15), 0x10 + (index & 0x7FFF), b"LO", 0)
        for index in range(num_elements)
    )
    return b"".join([
        bytes(128), b"DICM", struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(meta)), meta,
        struct.pack("<HH2sHI", 0x5200, 0x9229, b"SQ", 0, undefined),
        struct.pack("<HHI", 0xFFFE, 0xE000, undefined), elements,
        struct.pack("<HHI", 0xFFFE, 0xE00D, 0), struct.pack("<HHI", 0xFFFE, 0xE0DD, 0),
    ])  # fmt: skip
