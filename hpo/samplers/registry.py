"""Make a sampler by its name."""

from __future__ import annotations

import difflib
import warnings

import optuna
from optuna.samplers import BaseSampler

from hpo.samplers.belief import Belief
from hpo.samplers.multi_fidelity import MultiFidelitySampler
from hpo.samplers.names import MODEL_SAMPLERS, SAMPLERS


def resolve_sampler(sampler: str | BaseSampler, seed: int, belief: Belief | None = None) -> BaseSampler:
    """The sampler of that name, or the one given. ValueError when it is neither, or cannot use a belief."""
    if isinstance(sampler, BaseSampler):
        if belief:
            raise ValueError("a belief goes to a sampler that is given by name: give it to your sampler itself")
        return sampler
    if not isinstance(sampler, str):
        raise ValueError(f"sampler must be a name or an Optuna sampler, got {sampler!r}")
    return make_sampler(sampler, seed=seed, belief=belief)


def make_sampler(name: str, *, seed: int | None = None, belief: Belief | None = None) -> BaseSampler:
    """The sampler called "mfbo" (MultiFidelitySampler; "mfbo-deep" and "mfbo-nngp" are the same with other surrogates),
    or Optuna's "random", "qmc", "tpe" or "gp". ValueError for other names.

    Optuna's know nothing of fidelities: they take the losses of all rungs for one function.
    """
    if name in MODEL_SAMPLERS:
        return MultiFidelitySampler(seed=seed, surrogate=MODEL_SAMPLERS[name], belief=belief)
    if belief and name in SAMPLERS:
        raise ValueError(f"a belief needs a model, which {' and '.join(MODEL_SAMPLERS)} have, got sampler {name!r}: remove it")
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if name in ("qmc", "gp"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # unchanged since Optuna 3
            if name == "gp":
                return optuna.samplers.GPSampler(seed=seed)
            return optuna.samplers.QMCSampler(scramble=True, seed=seed)
    near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0.0)
    raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}: did you mean {near[0]!r}?")
