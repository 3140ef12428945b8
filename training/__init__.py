"""From a folder of scans to a trained, measured and tracked model."""
