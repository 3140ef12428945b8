"""A real Triton on this machine, and the Python backends that it needs."""
