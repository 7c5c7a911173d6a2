"""Create samplers by name."""

from __future__ import annotations

import warnings

import optuna
from optuna.samplers import BaseSampler

from hpo.samplers.belief import Belief
from hpo.samplers.multi_fidelity import MultiFidelitySampler
from hpo.samplers.names import MODEL_SAMPLERS, SAMPLERS
from scaling.common.suggest import did_you_mean


def resolve_sampler(sampler: str | BaseSampler, seed: int, belief: Belief | None = None) -> BaseSampler:
    """Return the sampler with a name, or the given sampler itself.

    Args:
        sampler: A name, see `make_sampler`, or an Optuna sampler.
        seed: Seed of a sampler that is given by name.
        belief: Prior belief of a sampler that is given by name.

    Raises:
        ValueError: If it is neither, or it cannot use a belief.
    """
    if isinstance(sampler, BaseSampler):
        if belief:
            raise ValueError("a belief needs a sampler given by name: pass the belief to your sampler itself")
        return sampler
    if not isinstance(sampler, str):
        raise ValueError(f"sampler must be a name or an Optuna sampler, got {sampler!r}")
    return make_sampler(sampler, seed=seed, belief=belief)


def make_sampler(name: str, *, seed: int | None = None, belief: Belief | None = None) -> BaseSampler:
    """Create a sampler by name.

    Args:
        name: "mfbo", "mfbo-deep" or "mfbo-nngp" for a `MultiFidelitySampler` with one of its surrogates, or "random",
            "qmc", "tpe" or "gp" for one of Optuna's. Optuna's samplers ignore fidelities: they treat the losses of all
            rungs as values of one function.
        seed: Seed of the sampler.
        belief: Prior belief about the optimum, for a sampler with a model.

    Raises:
        ValueError: If the name is unknown, or the sampler cannot use a belief.
    """
    if name in MODEL_SAMPLERS:
        return MultiFidelitySampler(seed=seed, surrogate=MODEL_SAMPLERS[name], belief=belief)
    if belief and name in SAMPLERS:
        raise ValueError(
            f"a belief needs a model, which {' and '.join(MODEL_SAMPLERS)} have, got sampler {name!r}: remove it"
        )
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if name in ("qmc", "gp"):
        with warnings.catch_warnings():
            # These samplers are called experimental, but have not changed since Optuna 3.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if name == "gp":
                return optuna.samplers.GPSampler(seed=seed)
            return optuna.samplers.QMCSampler(scramble=True, seed=seed)
    hint = did_you_mean(name, SAMPLERS, cutoff=0.0)
    raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}: {hint}")
