"""Which labels apply, where they do not exclude each other."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool

from jaxact._canonical import as_float


def multilabel(probabilities: ArrayLike, threshold: ArrayLike = 0.5) -> Bool[Array, "..."]:
    """Which labels apply, where labels do not exclude each other: probability **strictly greater** than threshold.

    Args:
        probabilities: one for each label, any shape.
        threshold: a number, or an array that broadcasts against `probabilities`.

    Returns:
        Booleans of the broadcast shape; False where the probability is nan.

    Raises:
        TypeError: if one of them is complex or not an array.
        ValueError: if the threshold does not broadcast, or is known and nan.

    Numerics:
        Both sides are compared as they are stored. A threshold of 0.3 is first rounded to the dtype of the
        probabilities, so that a stored 0.3 equals it, and is not above it, in every dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxact.classifiers import multilabel
        >>> p = jnp.array([0.01, 0.02, 0.41, 0.62, 0.3, 0.18, 0.5, 0.42, 0.06, 0.81])
        >>> [i + 1 for i in jnp.flatnonzero(multilabel(p, 0.3)).tolist()]
        [3, 4, 7, 8, 10]
    """
    p = as_float("probabilities", probabilities)
    as_float("threshold", threshold)  # for its errors: its result, rounded again, might be another
    t = jnp.asarray(threshold, p.dtype)
    try:
        shape = np.broadcast_shapes(p.shape, t.shape)
    except ValueError:
        raise ValueError(f"threshold must broadcast against shape {p.shape}, got shape {t.shape}.") from None
    if not isinstance(t, jax.core.Tracer) and bool(jnp.isnan(t).any()):
        raise ValueError("threshold must be a number, got nan.")
    return jnp.broadcast_to(p, shape) > jnp.broadcast_to(t, shape)
