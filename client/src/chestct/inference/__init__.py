"""Clients of the Triton server."""
