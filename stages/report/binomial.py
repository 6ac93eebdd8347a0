"""The exact confidence interval of a proportion, and McNemar's exact test."""

import numpy as np
from scipy.special import bdtr, betaincinv


def clopper_pearson(correct: np.ndarray | int, total: np.ndarray | int) -> tuple:
    """Return the lower and upper limit of the exact 95 % interval of a binomial proportion.

    The interval contains the true proportion with a probability of at least 95 %, whatever the
    proportion and the number of trials, if the trials are independent. It is conservative: too
    wide rather than too narrow. Without trials it is 0 to 1.

    Parameters
    ----------
    correct, total : int, or int array of any shape
        Successes and trials.

    References
    ----------
    Clopper, Pearson: The use of confidence or fiducial limits illustrated in the case of the
    binomial, Biometrika 26, 1934.
    """
    correct, total, tail = np.asarray(correct), np.asarray(total), 0.025
    wrong = total - correct
    low = np.where(correct > 0, betaincinv(np.maximum(correct, 1), wrong + 1, tail), 0.0)
    high = np.where(wrong > 0, betaincinv(correct + 1, np.maximum(wrong, 1), 1 - tail), 1.0)
    return low[()], high[()]


def mcnemar(broke: int, fixed: int) -> float:
    """Return the p-value of McNemar's exact test, two-sided.

    Parameters
    ----------
    broke, fixed : int
        Images that only the first, or only the second, of two models classifies correctly.

    References
    ----------
    McNemar: Note on the sampling error of the difference between correlated proportions or
    percentages, Psychometrika 12, 1947. The exact form uses the binomial distribution.
    """
    return float(min(1.0, 2 * bdtr(min(broke, fixed), broke + fixed, 0.5)))
