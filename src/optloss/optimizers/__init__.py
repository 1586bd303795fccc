"""TensorFlow's six optimizers, and all that are known by name."""
