import importlib
from typing import Any

from jaxact import losses as losses
from jaxact._forward_mode import forward_mode as forward_mode
from jaxact._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from jaxact._log_softmax import log_softmax as log_softmax
from jaxact._logsumexp import logsumexp as logsumexp
from jaxact._sigmoid import log_sigmoid as log_sigmoid, logit as logit, sigmoid as sigmoid, softplus as softplus
from jaxact._softmax import softmax as softmax

# Not imported above: they take longer than the rest, and few programs use them.
_LATER = ("classifiers", "verify")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"jaxact.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jaxact")
    raise AttributeError(f"module 'jaxact' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, "__version__"})
