"""The model for use elsewhere: ONNX, a program, a page, a model card. Nothing needs TensorFlow."""
