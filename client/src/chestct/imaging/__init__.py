"""Decode an image file into the network's input: find, decode, window, crop, resize, check."""
