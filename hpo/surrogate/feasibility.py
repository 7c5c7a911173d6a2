"""How likely a run with given settings is to end with a loss: a Gaussian process classifier beside the surrogate.

Runs that raise an exception, run out of memory or return NaN show which settings can be run. They say nothing about
the loss: counted as very high losses, they would bend the surrogate of the settings beside them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from scaling.common.arrays import Array

# A function of cube points [m, p] that returns the probability, [m], that a run there ends with a loss.
Feasibility = Callable[[Array], Array]

# Expected gains ignore the losses that are predicted for settings that are less likely than this to end with a loss.
MIN_FEASIBILITY = 0.5
# Settings that are less likely than this are not recommended, unless runs so far were hardly likelier.
SAFE_FEASIBILITY = 0.8
# Power of the probability in the gain of a run. With 1, a search whose optimum lies on the border of the failing
# region halves the gap every time, so half of its runs fail; with 2, a third do.
RISK_AVERSION = 2.0
# Runs of each kind that the classifier is fitted to: the latest, and others spread evenly over the earlier ones.
MAX_ROWS = (50, 100)
# Variance of the latent function, and its share of a constant, which is how it learns the overall rate of failure.
VARIANCE, CONSTANT_VARIANCE = 9.0, 4.0
# Bounds of the variance and of the length scales, in units of the cube. Assumed, not tuned.
VARIANCE_BOUNDS, LENGTH_BOUNDS = (1.0, 100.0), (0.05, 5.0)


def fit_feasibility(succeeded: Array, failed: Array) -> Callable[[Array], Array]:
    """Fit the probability of success to runs.

    It is scikit-learn's Gaussian process classifier (Laplace's approximation with a logistic link; Rasmussen and
    Williams 2006, algorithms 3.1 and 5.1) with one length scale per feature. The result depends on the data only.

    Args:
        succeeded: Features of the runs that ended with a loss, [n, d], at least one.
        failed: Features of those that failed, [f, d], at least one.

    Returns:
        A function of features [m, d] that returns probabilities [m].
    """
    # Slow to import, and needed only in studies with failures.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessClassifier
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel

    rows = [_thin(succeeded), _thin(failed)]
    labels = np.repeat([1, 0], [len(r) for r in rows])
    kernel = ConstantKernel(VARIANCE, VARIANCE_BOUNDS) * RBF([0.5] * succeeded.shape[1], LENGTH_BOUNDS)
    kernel += ConstantKernel(CONSTANT_VARIANCE, "fixed")
    with warnings.catch_warnings():
        # A length scale at its bound is usual: failures rarely depend on every parameter.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = GaussianProcessClassifier(kernel).fit(np.vstack(rows), labels)

    def predict(features: Array) -> Array:
        probability: Array = model.predict_proba(features)[:, 1]
        return probability

    return predict


def _thin(rows: Array) -> Array:
    """Return at most `MAX_ROWS` rows, in their order."""
    latest, earlier = MAX_ROWS
    if len(rows) <= latest + earlier:
        return rows
    spread = np.linspace(0, len(rows) - latest - 1, earlier).round().astype(int)
    return np.vstack([rows[spread], rows[-latest:]])
