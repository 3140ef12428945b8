"""From a file to the network's input: find, decode, window, crop, resize, check."""
