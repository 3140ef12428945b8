"""Shortcut checks: whether the classifier relies on cues other than disease."""
