"""Store a run's learning curve in its trial, for Optuna's plots and its dashboard."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.search.view import Job
from hpo.storage.retry import get_storage_errors

if TYPE_CHECKING:
    from hpo.search.search import Search
    from scaling.common.measurement import Measurement

logger = logging.getLogger("muscale.hpo")

# Points of a run that are stored at most, evenly spread over its tokens, and the final loss.
MAX_POINTS = 50
# Share of the time that storing points may take. A point costs 0.5 ms in a journal and 15 ms in a SQLite database, so
# short runs get fewer points there.
TIME_SHARE = 0.02


@dataclass
class CurveRecorder:
    """Stores some points of a run as the intermediate values of its trial, with the tokens as steps.

    It never stops a run. A point that the storage does not take is left out, because the record in MLflow has the whole
    curve.

    Attributes:
        search: The search.
        job: The job. Of several seeds, the curve of the first one is stored.
        first_result: The file that exists once the first seed has finished.
    """

    search: Search
    job: Job
    first_result: Path

    def __post_init__(self) -> None:
        self._last_slot = -1
        self._next_time = -math.inf

    def check(self) -> None:
        """Do nothing."""

    def observe(self, point: Measurement) -> None:
        """Store a point, unless one close to it is stored, or storing took too long lately.

        Raises:
            LeaseLost: If the trial is another worker's by now.
        """
        slot = int(point.tokens / self.job.fidelity.D * MAX_POINTS)
        began = time.monotonic()
        if slot <= self._last_slot or began < self._next_time or not math.isfinite(point.loss):
            return
        if self.first_result.exists():
            return
        self._last_slot = slot
        try:
            self.search.report(self.job, int(point.tokens), point.loss)
        except get_storage_errors() as error:
            logger.debug(f"trial {self.job.number}: a point of its curve is not stored ({type(error).__name__})")
        ended = time.monotonic()
        self._next_time = ended + (ended - began) / TIME_SHARE
