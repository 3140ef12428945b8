"""Shortcut checks: whether a classifier answers by what is no sign of disease."""
