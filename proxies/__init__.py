"""Small models that stand in for the large one, and its launch: muP transformers, warm starts, the target run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxies.config.proxy import ProxyConfig as ProxyConfig
    from proxies.diagnostics.coord_check import CoordCheck as CoordCheck
    from proxies.diagnostics.coord_check import coordinate_check as coordinate_check
    from proxies.diagnostics.lr_transfer import Transfer as Transfer
    from proxies.diagnostics.lr_transfer import transfer as transfer
    from proxies.growth.runs import plan_growth as plan_growth
    from proxies.growth.trainer import GrowthFamily as GrowthFamily
    from proxies.growth.weights import grow as grow
    from proxies.launch.plan import LaunchPlan as LaunchPlan
    from proxies.model.mup import param_groups as param_groups
    from proxies.model.recipe import Recipe as Recipe
    from proxies.model.transformer import build as build
    from proxies.trainers.command_family import CommandFamily as CommandFamily
    from proxies.trainers.proxy_family import ProxyFamily as ProxyFamily
    from proxies.training.auto_lr import autolrs as autolrs
    from proxies.training.loop import train as train
    from proxies.training.stacked import train_together as train_together
    from proxies.training.stacked import worth_stacking as worth_stacking

_HOME = {
    "CommandFamily": "proxies.trainers.command_family",
    "CoordCheck": "proxies.diagnostics.coord_check",
    "GrowthFamily": "proxies.growth.trainer",
    "LaunchPlan": "proxies.launch.plan",
    "ProxyConfig": "proxies.config.proxy",
    "ProxyFamily": "proxies.trainers.proxy_family",
    "Recipe": "proxies.model.recipe",
    "Transfer": "proxies.diagnostics.lr_transfer",
    "autolrs": "proxies.training.auto_lr",
    "build": "proxies.model.transformer",
    "coordinate_check": "proxies.diagnostics.coord_check",
    "grow": "proxies.growth.weights",
    "param_groups": "proxies.model.mup",
    "plan_growth": "proxies.growth.runs",
    "train": "proxies.training.loop",
    "train_together": "proxies.training.stacked",
    "transfer": "proxies.diagnostics.lr_transfer",
    "worth_stacking": "proxies.training.stacked",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'proxies' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
