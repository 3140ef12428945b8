"""Evaluation: protocols, baselines, shortcuts, unseen data."""
