"""What `bench` measures: jaxact's functions, what users have for them now, and the inputs."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import jaxact
from jaxact import losses

Function = Callable[..., Any]
Shape = tuple[int, ...]
DTYPES = ("float32", "bfloat16")


class Shapes(NamedTuple):
    quick: tuple[Shape, ...]
    full: tuple[Shape, ...]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A function and its peer, with the same signature."""

    ours: Function
    peer: Function
    peer_name: str
    arguments: Callable[..., tuple[Array, ...]]  # of a shape, a dtype and the scale of the logits
    shapes: Shapes
    count: int = 1  # of the arguments, from the first, with respect to which they are differentiated; labels follow
    limit: Function | None = None  # with the gradients too; by default a copy of the same bytes


def _normal(shape: Shape, dtype: str, scale: float = 1.0, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(scale=scale, size=shape), dtype)


def _logits(shape: Shape, dtype: str, scale: float = 1.0) -> tuple[Array, ...]:
    return (_normal(shape, dtype, scale),)


def _probabilities(shape: Shape, dtype: str, scale: float = 1.0) -> tuple[Array, ...]:
    """Of which there is one scale."""
    return (jnp.asarray(np.random.default_rng(0).uniform(0.01, 0.99, shape), dtype),)


def _with_labels(shape: Shape, dtype: str, scale: float = 1.0) -> tuple[Array, ...]:
    return _normal(shape, dtype, scale), _labels(shape[:-1], shape[-1])


def _labels(shape: Shape, classes: int) -> Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, classes, shape), jnp.int32)


def _with_binary_labels(shape: Shape, dtype: str, scale: float = 1.0) -> tuple[Array, ...]:
    return _normal(shape, dtype, scale), _labels(shape, 2)


def _with_soft_labels(shape: Shape, dtype: str, scale: float = 1.0) -> tuple[Array, ...]:
    return _normal(shape, dtype, scale), jax.nn.softmax(_normal(shape, dtype, seed=1))


def _head(shape: Shape, dtype: str, scale: float = 1.0) -> tuple[Array, ...]:
    """Of (tokens, features, classes)."""
    n, d, v = shape
    return _normal((n, d), dtype, scale), _normal((d, v), dtype, seed=1) / math.sqrt(d), _labels((n,), v)


def _row_logsumexp(f: Function) -> Function:
    return lambda x: f(x, axis=-1)


def _dense_head(x: Array, w: Array, labels: Array) -> Array:
    logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _three_products(x: Array, w: Array, labels: Array) -> Any:
    """The matrix products of the head and its gradients. The barrier keeps the logits from being multiplied away."""
    z = lax.optimization_barrier(jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype))
    return jnp.matmul(z, w.T), jnp.matmul(x.T, z)


_ANY = Shapes(
    ((), (128, 256), (2048, 2048)),
    ((), (128, 128), (128, 256), (1024, 1024), (4096, 4096), (128, 32768), (128, 131072)),
)
# With the rows of a small classifier, where what is done once a row is a tenth of all.
_ROWS = Shapes(((8,), *_ANY.quick[1:]), ((8,), (65536, 10), *_ANY.full[1:]))
SUBJECTS = {
    "sigmoid": Subject(jaxact.sigmoid, jax.nn.sigmoid, "jax.nn", _logits, _ANY),
    "log_sigmoid": Subject(jaxact.log_sigmoid, jax.nn.log_sigmoid, "jax.nn", _logits, _ANY),
    "softplus": Subject(jaxact.softplus, jax.nn.softplus, "jax.nn", _logits, _ANY),
    "logit": Subject(jaxact.logit, jax.scipy.special.logit, "jax.scipy", _probabilities, _ANY),
    "softmax": Subject(jaxact.softmax, jax.nn.softmax, "jax.nn", _logits, _ROWS),
    "log_softmax": Subject(jaxact.log_softmax, jax.nn.log_softmax, "jax.nn", _logits, _ROWS),
    "logsumexp": Subject(_row_logsumexp(jaxact.logsumexp), _row_logsumexp(jax.nn.logsumexp), "jax.nn", _logits, _ROWS),
    "softmax_cross_entropy_with_integer_labels": Subject(
        losses.softmax_cross_entropy_with_integer_labels,
        optax.softmax_cross_entropy_with_integer_labels,
        "optax",
        _with_labels,
        _ROWS,
    ),
    "softmax_cross_entropy": Subject(
        losses.softmax_cross_entropy, optax.softmax_cross_entropy, "optax", _with_soft_labels, _ROWS
    ),
    "sigmoid_binary_cross_entropy": Subject(
        losses.sigmoid_binary_cross_entropy, optax.sigmoid_binary_cross_entropy, "optax", _with_binary_labels, _ANY
    ),
    "sigmoid_focal_loss": Subject(
        losses.sigmoid_focal_loss, optax.sigmoid_focal_loss, "optax", _with_binary_labels, _ANY
    ),
    "linear_cross_entropy": Subject(
        jaxact.linear_cross_entropy,
        _dense_head,
        "dense, optax",
        _head,
        Shapes(((512, 128, 8192),), ((512, 128, 8192), (2048, 512, 32768))),
        2,
        _three_products,
    ),
}


def beside_tokamax() -> dict[str, Subject]:
    """The head beside tokamax's, where it is installed."""
    try:
        import tokamax
    except ImportError:
        return {}
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of each shape that it has not been tuned for

    def chunked(x: Array, w: Array, labels: Array) -> Array:
        return tokamax.linear_softmax_cross_entropy_loss(x, labels, w, reduction="mean", implementation="chunked_xla")

    head = SUBJECTS["linear_cross_entropy"]
    return {"linear_cross_entropy": dataclasses.replace(head, peer=chunked, peer_name="tokamax")}
