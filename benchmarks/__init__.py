"""Benchmarks of engines, servers, training and the web page, measured side by side."""
