"""DICOM network: a storage node, its queue, structured reports."""
