"""From a trained Keras model to what Triton serves."""
