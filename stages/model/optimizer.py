"""The optimizer: AdamW, with orthogonal steps for the kernels of convolutions."""

import keras
import tensorflow as tf


class Optimizer(keras.optimizers.Muon):
    """Muon for the kernels of the trunk's own convolutions, AdamW for every other weight.

    Muon makes each kernel's step an orthogonal matrix: every direction of a layer learns equally
    fast, and a short training gets further (K. Jordan et al., Muon: An optimizer for hidden layers
    in neural networks, 2024). Keras's own takes it for dense layers only; here a kernel
    [height, width, in, out] is the matrix [height · width · in, out], as in the authors' code.
    Steps are as long as those of AdamW, so that both share learning rate and weight decay (J. Liu
    et al., Muon is Scalable for LLM Training, 2025).

    Parameters
    ----------
    kernels : sequence of Keras variables
        What Muon is for.
    weight_decay : float
        Of all weights but biases and those of normalisation.
    """

    def __init__(self, kernels, weight_decay: float) -> None:
        super().__init__(weight_decay=weight_decay, adam_weight_decay=weight_decay)
        self._paths = {kernel.path for kernel in kernels}
        self.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])

    def _should_use_adamw(self, variable) -> bool:
        return variable.path not in self._paths

    def lr_adjust(self, x: tf.Tensor) -> tf.Tensor:
        """Give a step the length that AdamW's has, as Keras does for matrices."""
        columns = x.shape[-1]
        return x * (self.rms_rate * max(x.shape.num_elements() / columns, columns) ** 0.5)

    def zeropower_via_newtonschulz5(self, x: tf.Tensor, steps: int) -> tf.Tensor:
        """Return the nearest orthogonal matrix, roughly: each singular value becomes about 1.

        The same Newton-Schulz iteration as Keras's, but on the small Gram matrix and not on the
        tall kernel itself, which takes two thirds of the time.
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
