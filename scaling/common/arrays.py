"""What numeric code shares: the array type, and the limit of threads."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

Array = NDArray[np.float64]


@cache
def _find_thread_pools() -> ThreadpoolController:
    """Return the thread pools of the loaded libraries, which take long to find."""
    # Loaded first, so that its pools are found, too.
    import scipy.linalg  # noqa: F401

    return ThreadpoolController()


def limit_to_one_thread() -> AbstractContextManager[Any]:
    """Return a context in which NumPy and SciPy use a single thread.

    The matrices of fits are small, and on busy cores their threads wait for each other: a report took five times as
    much CPU time.
    """
    pools: AbstractContextManager[Any] = _find_thread_pools().limit(limits=1)
    return pools
