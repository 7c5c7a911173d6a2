"""What past runs say about larger runs: the run table, laws fitted to it, recommendations with intervals.

Names are imported when first used, so that `scaling --help` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling.compute import Fidelity as Fidelity
    from scaling.curves import fit_curve as fit_curve
    from scaling.fit import Fit as Fit
    from scaling.fit import FitError as FitError
    from scaling.fit import fit_loss_law as fit_loss_law
    from scaling.hpfit import HPFit as HPFit
    from scaling.hpfit import fit_hp_law as fit_hp_law
    from scaling.laws import HPLaw as HPLaw
    from scaling.laws import LossLaw as LossLaw
    from scaling.laws import PowerLaw as PowerLaw
    from scaling.recommendation import Recommendation as Recommendation
    from scaling.recommendation import recommend as recommend
    from scaling.runs import Measurement as Measurement
    from scaling.runs import load_runs as load_runs

_HOME = {
    "Fidelity": "compute",
    "Fit": "fit",
    "FitError": "fit",
    "HPFit": "hpfit",
    "HPLaw": "laws",
    "LossLaw": "laws",
    "Measurement": "runs",
    "PowerLaw": "laws",
    "Recommendation": "recommendation",
    "fit_curve": "curves",
    "fit_hp_law": "hpfit",
    "fit_loss_law": "fit",
    "load_runs": "runs",
    "recommend": "recommendation",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"scaling.{_HOME[name]}"), name)
    raise AttributeError(f"module 'scaling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
