"""Losses over logits, name for name those of `optax.losses`: one value per example, or per binary decision, with all
its digits where it is small, and never nan by accident, in every mode of differentiation."""

from jaxact.losses._binary_cross_entropy import sigmoid_binary_cross_entropy
from jaxact.losses._focal import sigmoid_focal_loss
from jaxact.losses._softmax_cross_entropy import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels

__all__ = [
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
]
