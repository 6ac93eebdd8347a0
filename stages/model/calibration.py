"""One temperature, so that a confidence of 90 % is right in 90 of 100 cases."""

import numpy as np
from scipy.optimize import minimize_scalar

_ENOUGH = 50  # images; fewer say too little
_BOUNDS = (0.2, 5.0)


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature under which the labels have the least log loss.

    Parameters
    ----------
    probabilities : float array [n, classes]
        Of images that did not train the network.
    labels : int array [n]

    Returns
    -------
    temperature : float in [0.2, 5]
        The logits are to be divided by it. 1 where there are fewer than 50 images, or where none
        is wrong, since nothing then bounds the confidence.

    References
    ----------
    Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017.
    """
    if len(labels) < _ENOUGH or np.all(probabilities.argmax(1) == labels):
        return 1.0

    def loss(exponent: float) -> float:
        return log_loss(soften(probabilities, np.exp(exponent)), labels)

    return round(float(np.exp(minimize_scalar(loss, bounds=np.log(_BOUNDS)).x)), 4)


def soften(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probabilities after their logits are divided by a temperature.

    Parameters
    ----------
    probabilities : float array [n, classes]
    temperature : float > 0
        Above 1 they move towards equal shares, below 1 away from them.

    Returns
    -------
    probabilities : float64 array [n, classes]
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), 1e-30)) / temperature
    logits -= logits.max(1, keepdims=True)
    shares = np.exp(logits)
    return shares / shares.sum(1, keepdims=True)


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean cross-entropy, in nats, of labels [n] under probabilities [n, classes]."""
    chosen = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(chosen, 1e-15)).mean())
