"""The command `chestct`."""
