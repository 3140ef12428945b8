"""Parity between engines."""
