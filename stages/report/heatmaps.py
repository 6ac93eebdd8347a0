"""Heatmaps: the parts of an image that a prediction rests on, by occlusion."""

from collections.abc import Callable, Iterable

import numpy as np

_GRID = 8  # places per side; 64 altered copies of an image are two full batches
_WIDTH = 2 / 3  # standard deviation of what covers a place, in units of their distance
_FULL = 0.1  # log-odds; a smaller change does not reach the full colour
_ORANGE = np.array([230, 97, 1])  # told from grey by the colour-blind, too


def heatmaps(
    predict_fn: Callable[[Iterable[np.ndarray]], np.ndarray], images: np.ndarray
) -> np.ndarray:
    """Return how much each part of an image speaks for the predicted class.

    In 64 copies of an image, one place each is covered by a soft-edged spot of the image's mean
    colour. The value of a place is by how much this lowers the log-odds of the predicted class, or
    0 if it raises them.

    Parameters
    ----------
    predict_fn : function
        Takes an iterable of uint8 arrays of shape (n, height, width, channels) and returns the
        probabilities of all their images, shape (total, classes).
    images : uint8 array of shape (n, height, width, channels)

    Returns
    -------
    heatmaps : float array of shape (n, height, width)
        From 0 to 1, the maximum of the image; all 0 if no place speaks for the class.

    Notes
    -----
    A heatmap says where, not why. It does not see what is smaller than about a tenth of the image,
    nor evidence that is there twice, for one copy of it is enough. The network is only asked for
    probabilities, so that this works for any network in any format.

    References
    ----------
    Zeiler, Fergus: Visualizing and understanding convolutional networks, ECCV 2014. On planted
    evidence (a small square that decides the class), its maximum was on the square more often than
    that of Grad-CAM and HiResCAM, whose feature maps are coarse in small networks.
    """
    rows, columns = (_spots(side) for side in images.shape[1:3])
    masks = np.einsum("ay,bx->abyx", rows, columns).reshape(-1, *images.shape[1:3], 1)
    weights = np.outer(rows.sum(0), columns.sum(0))
    probabilities = predict_fn([images])
    labels = probabilities.argmax(1)
    maps = np.zeros(images.shape[:3])
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        covered = image + masks * (image.mean((0, 1)) - image)
        lowered = _log_odds(predict_fn([np.rint(covered).astype(np.uint8)]), label)
        drops = np.maximum(_log_odds(probabilities[number : number + 1], label) - lowered, 0)
        heat = rows.T @ drops.reshape(_GRID, _GRID) @ columns / weights
        maps[number] = heat / max(heat.max(), _FULL)
    return maps


def overlay(image: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """Return an image in grey below its heatmap in orange: uint8 [height, width, 3].

    Parameters
    ----------
    image : uint8 array of shape (height, width, channels)
    heatmap : float array of shape (height, width)
        From 0 (transparent) to 1.
    """
    grey = image.mean(-1, keepdims=True)
    opacity = 0.75 * heatmap[..., None]
    return np.rint(grey + opacity * (_ORANGE - grey)).astype(np.uint8)


def _spots(side: int) -> np.ndarray:
    """Return a Gaussian around each place along a side: [_GRID, side], at most 1."""
    distance = (np.arange(side) + 0.5) * _GRID / side - (np.arange(_GRID)[:, None] + 0.5)
    return np.exp(-0.5 * (distance / _WIDTH) ** 2).astype(np.float32)


def _log_odds(probabilities: np.ndarray, label: int) -> np.ndarray:
    """Return the log-odds of a class: unlike its probability, not flat where it is near 1."""
    chance, others = probabilities[:, label], np.delete(probabilities, label, 1).sum(1)
    return np.log(np.maximum(chance, 1e-30)) - np.log(np.maximum(others, 1e-30))
