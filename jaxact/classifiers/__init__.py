"""Linear classifiers, one logit with a sigmoid or several with a softmax, and the training of two as twins."""

from jaxact.classifiers._linear import (
    Params,
    cross_entropy,
    initialise,
    log_odds_against,
    logits,
    predict,
    probabilities,
)
from jaxact.classifiers._multilabel import multilabel
from jaxact.classifiers._twins import Fit, Twins, train_twins

__all__ = [
    "Fit",
    "Params",
    "Twins",
    "cross_entropy",
    "initialise",
    "log_odds_against",
    "logits",
    "multilabel",
    "predict",
    "probabilities",
    "train_twins",
]
