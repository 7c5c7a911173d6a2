"""Read past runs, fit scaling laws to them, and recommend settings for a larger run, with intervals.

Names are imported when they are first used, so that `scaling --help` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling.advice.next_run import plan_next as plan_next
    from scaling.advice.recommendation import Recommendation as Recommendation
    from scaling.advice.recommendation import recommend as recommend
    from scaling.common.measurement import Measurement as Measurement
    from scaling.curves.in_progress import learn_prior as learn_prior
    from scaling.curves.in_progress import predict_end as predict_end
    from scaling.curves.loss_curve import annealed_ends as annealed_ends
    from scaling.curves.loss_curve import fit_curve as fit_curve
    from scaling.fitting.envelope import compare_approaches as compare_approaches
    from scaling.fitting.envelope import fit_envelope as fit_envelope
    from scaling.fitting.forms import Comparison as Comparison
    from scaling.fitting.forms import FormFit as FormFit
    from scaling.fitting.forms import compare_forms as compare_forms
    from scaling.fitting.forms import fit_form as fit_form
    from scaling.fitting.isoflop import Frontier as Frontier
    from scaling.fitting.isoflop import fit_isoflop as fit_isoflop
    from scaling.fitting.loss_law import Fit as Fit
    from scaling.fitting.loss_law import FitError as FitError
    from scaling.fitting.loss_law import fit_loss_law as fit_loss_law
    from scaling.fitting.lr_batch_law import HPFit as HPFit
    from scaling.fitting.lr_batch_law import fit_hp_law as fit_hp_law
    from scaling.laws.compute import Fidelity as Fidelity
    from scaling.laws.formulas import HPLaw as HPLaw
    from scaling.laws.formulas import LossLaw as LossLaw
    from scaling.laws.formulas import PowerLaw as PowerLaw
    from scaling.runs.importer import import_runs as import_runs
    from scaling.runs.io import load_runs as load_runs
    from scaling.runs.table import usable as usable

_HOME = {
    "Comparison": "scaling.fitting.forms",
    "Fidelity": "scaling.laws.compute",
    "Fit": "scaling.fitting.loss_law",
    "FitError": "scaling.fitting.loss_law",
    "FormFit": "scaling.fitting.forms",
    "Frontier": "scaling.fitting.isoflop",
    "HPFit": "scaling.fitting.lr_batch_law",
    "HPLaw": "scaling.laws.formulas",
    "LossLaw": "scaling.laws.formulas",
    "Measurement": "scaling.common.measurement",
    "PowerLaw": "scaling.laws.formulas",
    "Recommendation": "scaling.advice.recommendation",
    "annealed_ends": "scaling.curves.loss_curve",
    "compare_approaches": "scaling.fitting.envelope",
    "compare_forms": "scaling.fitting.forms",
    "fit_curve": "scaling.curves.loss_curve",
    "fit_envelope": "scaling.fitting.envelope",
    "fit_form": "scaling.fitting.forms",
    "fit_hp_law": "scaling.fitting.lr_batch_law",
    "fit_isoflop": "scaling.fitting.isoflop",
    "fit_loss_law": "scaling.fitting.loss_law",
    "import_runs": "scaling.runs.importer",
    "learn_prior": "scaling.curves.in_progress",
    "load_runs": "scaling.runs.io",
    "plan_next": "scaling.advice.next_run",
    "predict_end": "scaling.curves.in_progress",
    "recommend": "scaling.advice.recommendation",
    "usable": "scaling.runs.table",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'scaling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
