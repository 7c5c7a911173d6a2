"""The module in which version 0.1 offered `Fidelity`, kept so that scripts written for it run: import it from `scaling`."""

from scaling.laws.compute import Fidelity

__all__ = ["Fidelity"]
