"""Sigmoid, softmax and what is built on them, with derivatives that are right everywhere and in every mode."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxact import losses
from jaxact._forward_mode import forward_mode
from jaxact._linear_cross_entropy import linear_cross_entropy
from jaxact._log_softmax import log_softmax
from jaxact._logsumexp import logsumexp
from jaxact._sigmoid import log_sigmoid, logit, sigmoid, softplus
from jaxact._softmax import softmax

# Not imported for all: they take longer than the rest, and few programs use them.
if TYPE_CHECKING:
    from jaxact import classifiers, verify

    __version__: str
_LATER = ("classifiers", "verify")

__all__ = [
    "classifiers",
    "forward_mode",
    "linear_cross_entropy",
    "log_sigmoid",
    "log_softmax",
    "logit",
    "logsumexp",
    "losses",
    "sigmoid",
    "softmax",
    "softplus",
    "verify",
]


def _later(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"jaxact.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jaxact")
    raise AttributeError(f"module 'jaxact' has no attribute {name!r}")


if not TYPE_CHECKING:  # a type checker would take any name for one of these
    __getattr__ = _later


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
