"""Small models that stand in for the large one, and its launch: muP transformers, warm starts, the target run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxies.checks import CoordCheck as CoordCheck
    from proxies.checks import coordinate_check as coordinate_check
    from proxies.command_family import CommandFamily as CommandFamily
    from proxies.config import ProxyConfig as ProxyConfig
    from proxies.family import ProxyFamily as ProxyFamily
    from proxies.growth_family import GrowthFamily as GrowthFamily
    from proxies.growth_runs import plan_growth as plan_growth
    from proxies.launch import LaunchPlan as LaunchPlan
    from proxies.model import build as build
    from proxies.mup import param_groups as param_groups
    from proxies.recipe import Recipe as Recipe
    from proxies.stagewise import autolrs as autolrs
    from proxies.together import train_together as train_together
    from proxies.together import worth_stacking as worth_stacking
    from proxies.training import train as train
    from proxies.transfers import Transfer as Transfer
    from proxies.transfers import transfer as transfer
    from proxies.warmstart import grow as grow

_HOME = {
    "CommandFamily": "command_family",
    "CoordCheck": "checks",
    "GrowthFamily": "growth_family",
    "LaunchPlan": "launch",
    "ProxyConfig": "config",
    "ProxyFamily": "family",
    "Recipe": "recipe",
    "Transfer": "transfers",
    "autolrs": "stagewise",
    "build": "model",
    "coordinate_check": "checks",
    "grow": "warmstart",
    "param_groups": "mup",
    "plan_growth": "growth_runs",
    "train": "training",
    "train_together": "together",
    "transfer": "transfers",
    "worth_stacking": "together",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"proxies.{_HOME[name]}"), name)
    raise AttributeError(f"module 'proxies' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
