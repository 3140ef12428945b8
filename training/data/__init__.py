"""Scan folders: ingest, audit, splits, phantoms."""
