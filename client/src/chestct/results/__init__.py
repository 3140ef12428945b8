"""Results of a slice and of a series, and how they are written."""
