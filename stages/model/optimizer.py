"""The optimizer: Muon for convolution kernels, AdamW for all other weights."""

from collections.abc import Sequence

import keras
import tensorflow as tf


class Optimizer(keras.optimizers.Muon):
    """Muon for the kernels of the network's own convolutions, AdamW for every other weight.

    Muon makes each kernel's update an orthogonal matrix: all directions of a layer learn at the
    same speed, and short runs get further (K. Jordan et al., Muon: An optimizer for hidden
    layers in neural networks, 2024). Keras's Muon supports dense layers only; here a kernel
    [height, width, in, out] is the matrix [height * width * in, out], as in the authors' code.
    Updates are scaled to the size of AdamW's, so that both share learning rate and weight decay (J.
    Liu et al., Muon is scalable for LLM training, 2025).

    Parameters
    ----------
    kernels : sequence of Keras variables
        The weights to update by Muon.
    weight_decay : float
        For all weights except biases and those of normalization layers.

    Notes
    -----
    Keras has no public way to choose Muon's weights that covers kernels of four dimensions:
    `_should_use_adamw` overrides a private method. Tested with Keras 3.15.
    """

    def __init__(self, kernels: Sequence[keras.Variable], weight_decay: float) -> None:
        super().__init__(weight_decay=weight_decay, adam_weight_decay=weight_decay)
        self._paths = {kernel.path for kernel in kernels}
        self.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])

    def _should_use_adamw(self, variable: keras.Variable) -> bool:
        return variable.path not in self._paths

    def lr_adjust(self, x: tf.Tensor) -> tf.Tensor:
        """Scale an update to the size of AdamW's, as Keras does for matrices."""
        columns = x.shape[-1]
        return x * (self.rms_rate * max(x.shape.num_elements() / columns, columns) ** 0.5)

    def zeropower_via_newtonschulz5(self, x: tf.Tensor, steps: int) -> tf.Tensor:
        """Return the nearest orthogonal matrix, approximately: all singular values are about 1.

        The Newton-Schulz iteration of Keras, but on the small Gram matrix instead of the tall
        kernel matrix, which takes two thirds of the time.
        """
        matrix = tf.reshape(x, [-1, x.shape[-1]])
        matrix /= tf.norm(matrix) + 1e-7
        gram = tf.matmul(matrix, matrix, transpose_a=True)
        identity = tf.eye(x.shape[-1])
        product = identity
        for _ in range(steps):
            factor = self.muon_a * identity + self.muon_b * gram
            factor += self.muon_c * tf.matmul(gram, gram)
            product = tf.matmul(product, factor)
            gram = tf.matmul(tf.matmul(factor, gram), factor)
        return tf.reshape(tf.matmul(matrix, product), x.shape)
