import importlib
from typing import Any

from jaxact import losses as losses
from jaxact._forward_mode import forward_mode as forward_mode
from jaxact._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from jaxact._logsumexp import logsumexp as logsumexp
from jaxact._sigmoid import log_sigmoid as log_sigmoid, logit as logit, sigmoid as sigmoid, softplus as softplus
from jaxact._softmax import log_softmax as log_softmax, softmax as softmax


def __getattr__(name: str) -> Any:
    # Not imported above: they take longer than the rest, and few programs use them.
    if name in ("classifiers", "verify"):
        return importlib.import_module(f"jaxact.{name}")
    raise AttributeError(f"module 'jaxact' has no attribute {name!r}")
