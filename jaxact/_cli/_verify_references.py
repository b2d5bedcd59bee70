"""Exact values for `verify` to compare with. They share no code with jaxact.

Elementwise functions in float64 NumPy, whose own error is 1e-8 of an ulp of float32, and their slopes in mpmath too;
functions of rows as the textbook has them, which the verifier evaluates in float64 or mpmath.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

Function = Callable[..., Any]


def quietly(f: Function) -> Function:
    """In float64, with infinities and nan as the answer at the edges."""

    @functools.wraps(f)
    def quiet(x: Any) -> np.ndarray:
        with np.errstate(all="ignore"):
            return f(np.asarray(x).astype(np.float64))

    return quiet


@quietly
def sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


@quietly
def sigmoid_slope(x: np.ndarray) -> np.ndarray:
    """σ′ = e/(1 + e)² with e = e^−|x|: an even function."""
    e = np.exp(-np.abs(x))
    return e / (1 + e) ** 2


@quietly
def softplus(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


@quietly
def logit(p: np.ndarray) -> np.ndarray:
    """log(p/(1 − p)). Near ½ it is small, and only log1p of odds − 1 = (2p − 1)/(1 − p) keeps its digits."""
    y = np.asarray(np.log(p) - np.log1p(-p))
    near = np.abs(p - 0.5) <= 0.25
    y[near] = np.log1p((2 * p[near] - 1) / (1 - p[near]))
    return y


@quietly
def logit_slope(p: np.ndarray) -> np.ndarray:
    """1/(p(1 − p)), +inf at both ends, −0 included, since that is the limit from inside; nan outside."""
    return np.where((p < 0) | (p > 1), np.nan, 1 / (np.abs(p) * (1 - p)))


def exact_sigmoid(x: Any) -> Any:
    import mpmath

    return 1 / (1 + mpmath.exp(-x))


def exact_sigmoid_of_minus(x: Any) -> Any:
    return exact_sigmoid(-x)


def exact_sigmoid_slope(x: Any) -> Any:
    import mpmath

    return 1 / ((1 + mpmath.exp(-x)) * (1 + mpmath.exp(x)))


def exact_logit_slope(p: Any) -> Any:
    import mpmath

    if not 0 <= p <= 1:
        return mpmath.nan
    return 1 / (p * (1 - p)) if 0 < p < 1 else mpmath.inf


def textbook_softmax(x: Any) -> Array:
    e = jnp.exp(x)
    return e / e.sum(-1, keepdims=True)


def textbook_softmax_with_temperature(x: Any, temperature: Any) -> Array:
    return textbook_softmax(x / temperature)


def textbook_masked_softmax(x: Any, mask: Any) -> Array:
    e = jnp.exp(x) * mask
    return e / e.sum(-1, keepdims=True)


def textbook_log_softmax(x: Any) -> Array:
    return jnp.log(textbook_softmax(x))


def textbook_logsumexp(a: Any) -> Array:
    return jnp.log(jnp.exp(a).sum(-1))


def textbook_weighted_logsumexp(a: Any, b: Any) -> Array:
    return jnp.log((b * jnp.exp(a)).sum(-1))


def textbook_cross_entropy(x: Any, labels: Any) -> Array:
    return textbook_soft_cross_entropy(x, np.eye(x.shape[-1], dtype=np.float32)[labels])


def textbook_soft_cross_entropy(x: Any, labels: Any) -> Array:
    return jnp.sum(labels * (jnp.log(jnp.exp(x).sum(-1, keepdims=True)) - x), -1)


def textbook_binary_cross_entropy(x: Any, y: Any) -> Array:
    return y * jnp.log(1 + jnp.exp(-x)) + (1 - y) * jnp.log(1 + jnp.exp(x))


def textbook_focal_loss(x: Any) -> Array:
    return 0.25 / (1 + jnp.exp(x)) ** 2 * jnp.log(1 + jnp.exp(-x))


def textbook_head(x: Any, w: Any, labels: Any) -> Array:
    return textbook_cross_entropy(x @ w, labels).mean()
