"""How to spend compute on trials: multi-fidelity Bayesian optimization and incremental Hyperband on an ordinary Optuna study."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.hyperband import Ladder as Ladder
    from hpo.samplers import MultiFidelitySampler as MultiFidelitySampler
    from hpo.search import Job as Job
    from hpo.search import Search as Search
    from hpo.study import StudyConfig as StudyConfig
    from hpo.study import load_study as load_study

_HOME = {
    "Job": "search",
    "Ladder": "hyperband",
    "MultiFidelitySampler": "samplers",
    "Search": "search",
    "StudyConfig": "study",
    "load_study": "study",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"hpo.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
