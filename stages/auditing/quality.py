"""Images of poor quality: blank, dark, bright, of low contrast, of an odd shape, tiny, blurred."""

import numpy as np
import pandas as pd

# What is too small in an image of each kind, and below which value; the first that holds counts.
_LIMITS = {
    "blank": 1,  # level of contrast, without noise
    "dark": 80,  # levels from black to its brightest
    "bright": 105,  # levels from white to its darkest
    "low contrast": 8,  # levels
    "odd shape": 1 / 4,  # the short side by the long one
    "tiny": 64,  # pixels: the side of a square of its area
    "blurred": 0.42,  # sharpness
}
_CLEAR = 16  # levels of contrast, above which sharpness can be told
KINDS = tuple(_LIMITS)
# An image also has to stand out among the others, by these on a logarithmic scale.
_SPREADS, _LEAST = 3, 0.5  # standard deviations, and a factor of 1.6
_TO_DEVIATION = 1.4826  # of a normal distribution, from the median deviation


def quality(facts: pd.DataFrame) -> pd.DataFrame:
    """Return the images of poor quality, at most one kind of each.

    Each kind has a limit, and where most images of a dataset are near it or beyond (drawings on
    white, small pictures), an image has to stand out among them.

    Parameters
    ----------
    facts : DataFrame
        As `read_facts` returns them.

    Returns
    -------
    found : DataFrame
        Columns ``row`` (position in `facts`), ``kind`` (of `KINDS`) and ``score`` (how many times
        beyond the limit it is, above 1; greater is worse), by kind, the worst first.
    """
    shorter, longer = np.sort(facts[["width", "height"]].to_numpy(float)).T
    values = {
        "blank": facts["smooth_contrast"] + 0.01,  # so that no logarithm is infinite
        "dark": facts["brightest"] + 1.0,
        "bright": 256.0 - facts["darkest"],
        "low contrast": facts["contrast"] + 0.01,
        "odd shape": shorter / longer,
        "tiny": np.sqrt(shorter * longer),
        "blurred": facts["sharpness"].where(facts["contrast"] > _CLEAR) + 0.01,
    }
    rows, kinds, scores = [], [], []
    is_free = np.ones(len(facts), bool)
    for kind, limit in _LIMITS.items():
        value = np.asarray(values[kind], float)
        ratio = min(limit, _low_end(value)) / value
        found = np.flatnonzero(is_free & (ratio > 1))
        is_free[found] = False
        found = found[np.argsort(-ratio[found], kind="stable")]
        rows += found.tolist()
        kinds += [kind] * len(found)
        scores += ratio[found].tolist()
    return pd.DataFrame({"row": rows, "kind": kinds, "score": scores})


def _low_end(values: np.ndarray) -> float:
    """Return the value below which one stands out among the others; NaN does not count."""
    logs = np.log(values[~np.isnan(values)])
    if not len(logs):
        return 0.0
    middle = np.median(logs)
    deviation = _TO_DEVIATION * np.median(np.abs(logs - middle))
    return float(np.exp(middle - max(_LEAST, _SPREADS * deviation)))
