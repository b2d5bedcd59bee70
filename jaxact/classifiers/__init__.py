"""Linear classifiers, one logit with a sigmoid or several with a softmax, and the training of two as twins."""

from jaxact.classifiers._linear import (
    Params as Params,
    cross_entropy as cross_entropy,
    initialise as initialise,
    log_odds_against as log_odds_against,
    logits as logits,
    predict as predict,
    probabilities as probabilities,
)
from jaxact.classifiers._multilabel import multilabel as multilabel
from jaxact.classifiers._twins import Fit as Fit, Twins as Twins, train_twins as train_twins
