"""From Keras to ONNX, INT8, a student, TensorRT."""
