"""Temperature scaling: make a confidence of 90 % right in 90 of 100 cases."""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from stages.model.parameters import MIN_TO_CALIBRATE

LIMITS = 0.2, 5.0  # of the temperature


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that minimizes the log loss.

    Parameters
    ----------
    probabilities : float array [n, classes]
        Predictions for images that the network was not trained on.
    labels : int array [n]

    Returns
    -------
    temperature : float in [0.2, 5]
        Divide the logits by it. 1 if there are fewer than 50 images, too few for an estimate, or
        if all predictions are right, because nothing then limits the confidence.

    References
    ----------
    Guo, Pleiss, Sun, Weinberger: On calibration of modern neural networks, ICML 2017.
    """
    if len(labels) < MIN_TO_CALIBRATE or np.all(probabilities.argmax(1) == labels):
        return 1.0

    def loss(log_temperature: float) -> float:
        return log_loss(apply_temperature(probabilities, np.exp(log_temperature)), labels)

    best = float(np.exp(minimize_scalar(loss, bounds=np.log(LIMITS)).x))
    # The search only comes close to a limit.
    return next(
        (limit for limit in LIMITS if math.isclose(best, limit, rel_tol=1e-3)), round(best, 4)
    )


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probabilities after dividing their logits by a temperature.

    Parameters
    ----------
    probabilities : float array [n, classes]
    temperature : float > 0
        Above 1 lowers the confidence, below 1 raises it.

    Returns
    -------
    probabilities : float64 array [n, classes]
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), 1e-30))
    return softmax(logits / temperature, axis=1)


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean cross-entropy, in nats, of labels [n] under probabilities [n, classes]."""
    of_labels = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(of_labels, 1e-15)).mean())
