"""Linear classifiers: one logit with a sigmoid, or several with a softmax, and their loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key

from jaxact._canonical import as_float, require_labels
from jaxact._classes import integer_labels, label_index
from jaxact._logsumexp import logsumexp
from jaxact._sigmoid import sigmoid, softplus
from jaxact._softmax import softmax


class Params(NamedTuple):
    """A linear classifier: one row of weights and one bias for each logit."""

    weights: Float[Array, "logits features"]
    bias: Float[Array, " logits"]


def initialise(key: Key[Array, ""], features: int, logits: int, dtype: Any = None) -> Params:
    """Random weights of variance 1/features, and biases of 0, for a classifier with the given number of logits."""
    weights = jax.random.normal(key, (logits, features), dtype or float)
    return Params(weights / features**0.5, jnp.zeros((logits,), weights.dtype))


def logits(params: Params, x: Float[Array, "examples features"]) -> Float[Array, "examples logits"]:
    """x·w + b for each row of weights."""
    return x @ params.weights.T + params.bias[None]


def probabilities(params: Params, x: Float[Array, "examples features"]) -> Float[Array, "examples ..."]:
    """Of class 1, shape (examples,), for one logit; of every class, shape (examples, logits), for several."""
    z = logits(params, x)
    return sigmoid(z[:, 0]) if z.shape[1] == 1 else softmax(z)


def predict(params: Params, x: Float[Array, "examples features"]) -> Int[Array, " examples"]:
    """The class of greatest probability. A tie goes to the lower class, so one logit of exactly 0 to class 0."""
    z = logits(params, x)
    return (z[:, 0] > 0).astype(int) if z.shape[1] == 1 else jnp.argmax(z, axis=1)


def log_odds_against(z: Float[Array, "examples logits"], y: Int[Array, " examples"]) -> Float[Array, " examples"]:
    """log of the odds against the label: −z or z for one logit, log Σ_{j≠y} e^{zⱼ − z_y} for several.

    For two logits the sum has one term, and the log-odds are their difference: exactly what one logit models.
    """
    classes = z.shape[1]
    if classes == 1:
        return jnp.where(y == 1, -z[:, 0], z[:, 0])
    others = (y[:, None] + jnp.arange(1, classes, dtype=y.dtype)[None]) % classes
    at_label = jnp.take_along_axis(z, y[:, None], axis=1)
    return logsumexp(jnp.take_along_axis(z, others, axis=1) - at_label, axis=1)


def cross_entropy(z: Float[Array, "examples logits"], y: Int[Array, " examples"]) -> Float[Array, " examples"]:
    """−log of the label's probability, one loss per example: binary for one logit, over the classes for several.

    Of finite logits; nan for a label that is none of the classes. `jaxact.losses` has masks, infinities and options.
    Computed as softplus of the log-odds against the label. Every term is positive, so the loss is relatively accurate
    however small and never falsely 0; the gradient at the label is minus the sum of the others.

    Raises:
        TypeError: if `z` is complex or not an array, or `y` are not integers.
        ValueError: if the shapes are not as above.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxact.classifiers import cross_entropy
        >>> print(cross_entropy(jnp.array([[-30.0, 0.0, 0.0]]), jnp.array([1])).round(4))
        [0.6931]
    """
    z, y = as_float("z", z), jnp.asarray(require_labels("y", y))
    if z.ndim != 2 or y.shape != z.shape[:1]:
        raise ValueError(f"z must have shape (examples, logits) and y (examples,), got {z.shape} and {y.shape}.")
    labels = integer_labels(y, z.shape[:1], "z without its last axis")
    place, exists = label_index(labels, max(z.shape[1], 2), None)
    # As a factor nan reaches the gradient too.
    return softplus(log_odds_against(z * jnp.where(exists, 1, jnp.nan)[:, None].astype(z.dtype), place))
