"""What past runs say about larger runs: the run table, laws fitted to it, recommendations with intervals.

Names are imported when first used, so that `scaling --help` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling.compute import Fidelity as Fidelity
    from scaling.curves import annealed_ends as annealed_ends
    from scaling.curves import fit_curve as fit_curve
    from scaling.design import plan_next as plan_next
    from scaling.envelope import compare_approaches as compare_approaches
    from scaling.envelope import fit_envelope as fit_envelope
    from scaling.fit import Fit as Fit
    from scaling.fit import FitError as FitError
    from scaling.fit import fit_loss_law as fit_loss_law
    from scaling.forecast import learn_prior as learn_prior
    from scaling.forecast import predict_end as predict_end
    from scaling.forms import Comparison as Comparison
    from scaling.forms import FormFit as FormFit
    from scaling.forms import compare_forms as compare_forms
    from scaling.forms import fit_form as fit_form
    from scaling.hpfit import HPFit as HPFit
    from scaling.hpfit import fit_hp_law as fit_hp_law
    from scaling.imports import import_runs as import_runs
    from scaling.isoflop import Frontier as Frontier
    from scaling.isoflop import fit_isoflop as fit_isoflop
    from scaling.laws import HPLaw as HPLaw
    from scaling.laws import LossLaw as LossLaw
    from scaling.laws import PowerLaw as PowerLaw
    from scaling.recommendation import Recommendation as Recommendation
    from scaling.recommendation import recommend as recommend
    from scaling.runs import Measurement as Measurement
    from scaling.runs import load_runs as load_runs
    from scaling.runs import usable as usable

_HOME = {
    "Comparison": "forms",
    "Fidelity": "compute",
    "Fit": "fit",
    "FitError": "fit",
    "FormFit": "forms",
    "Frontier": "isoflop",
    "HPFit": "hpfit",
    "HPLaw": "laws",
    "LossLaw": "laws",
    "Measurement": "runs",
    "PowerLaw": "laws",
    "Recommendation": "recommendation",
    "compare_approaches": "envelope",
    "compare_forms": "forms",
    "annealed_ends": "curves",
    "fit_curve": "curves",
    "fit_envelope": "envelope",
    "fit_form": "forms",
    "fit_hp_law": "hpfit",
    "fit_isoflop": "isoflop",
    "fit_loss_law": "fit",
    "import_runs": "imports",
    "learn_prior": "forecast",
    "load_runs": "runs",
    "plan_next": "design",
    "predict_end": "forecast",
    "recommend": "recommendation",
    "usable": "runs",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"scaling.{_HOME[name]}"), name)
    raise AttributeError(f"module 'scaling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
