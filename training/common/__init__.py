"""Shared by all commands: arguments, configs, atomic files, metrics. The ground floor."""
