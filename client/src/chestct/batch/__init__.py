"""Directories of scans: selection, decoding, sending, series."""
