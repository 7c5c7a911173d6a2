"""The module of `Fidelity` in version 0.1, kept for scripts that import it from here. New ones import `scaling`."""

from scaling.laws.compute import Fidelity

__all__ = ["Fidelity"]
