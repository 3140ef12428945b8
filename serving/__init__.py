"""Starts a real Triton on this machine and gives it the backend that it lacks."""
