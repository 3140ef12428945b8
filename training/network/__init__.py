"""VGG-16, its starting weights, augmentation, calibration and pruning."""
