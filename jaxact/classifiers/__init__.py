"""Two linear classifiers, one logit with a sigmoid and two logits with a softmax, and their training as twins."""

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
