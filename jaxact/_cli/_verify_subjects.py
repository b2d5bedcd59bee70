"""What `verify` checks: jaxact's functions, where they are checked, and exact values to compare with.

The references share no code with jaxact: float64 NumPy, whose own error is 1e-8 of an ulp of float32, and mpmath.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

import jaxact
from jaxact import losses
from jaxact.verify import Report, rule, values

Function = Callable[..., Any]
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float64": np.float64,
}
TRANSFORMS = ("jit", "vmap")
BOUND_16 = 0.51  # ulp: the function is computed in float32 and rounded once


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """The references of an elementwise function, its peer in JAX, and what holds for every float32, in ulp."""

    value: Function  # these two in float64 NumPy
    slope: Function
    exact_slope: Function  # of one mpmath number
    peer: Function
    ulps: float
    inside: tuple[float, float] = (-100.0, 100.0)  # what the figure shows


@dataclasses.dataclass(frozen=True)
class Subject:
    """A function with arguments to verify it at, given in float64."""

    f: Function
    args: tuple[np.ndarray, ...]
    elementwise: Elementwise | None = None
    reference: Function | None = None  # in JAX
    second: tuple[str, ...] = ()  # the dtypes in which to check second derivatives too

    def rule(self, dtype: str) -> Report:
        args = [rounded(arg, dtype) if self.elementwise else arg.astype(DTYPES[dtype]) for arg in self.args]
        order = 2 if dtype in self.second else 1
        derivative = self.elementwise.exact_slope if self.elementwise else None
        # Transformations take no notice of the dtype, and compiling them takes most of the time.
        transforms = TRANSFORMS if dtype == "float32" else TRANSFORMS[:1]
        return rule(self.f, *args, reference=self.reference, derivative=derivative, order=order, transforms=transforms)

    def every_value(self, dtype: str, progress: bool = False) -> Report | None:
        """The values at all inputs of a dtype of at most 32 bits; None where that does not apply."""
        if self.elementwise is None or dtype == "float64":
            return None
        f, value = self.f, self.elementwise.value
        if f is jaxact.logit:
            f, value = logit_of_normal, functools.partial(_with_normal, value)
        bound = self.elementwise.ulps if dtype == "float32" else BOUND_16
        report = values(f, value, dtype=DTYPES[dtype], points="all", bound=bound, progress=progress)
        return dataclasses.replace(report, subject=f"{self.f.__name__}, every {dtype}")


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """In the dtype, without what became 0, 1 or subnormal there, which XLA may read as 0."""
    x = x.astype(DTYPES[dtype])
    wide = np.abs(x.astype(np.float64))
    return x[(wide >= float(ml_dtypes.finfo(x.dtype).smallest_normal)) & (wide != 1)]


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


def logit_of_normal(p: Array) -> Array:
    """logit, with what is subnormal in float32 as 0, which is how XLA on CPU reads it."""
    return jaxact.logit(jnp.where(jnp.abs(p) < TINY, 0, p))


def _with_normal(value: Function, p: np.ndarray) -> np.ndarray:
    return value(np.where(np.abs(p) < TINY, 0, p))


TINY = float(np.finfo(np.float32).smallest_normal)


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


def weighted_logsumexp(a: Any, b: Any) -> Array:
    return jaxact.logsumexp(a, axis=-1, b=b)


def logsumexp(x: Any) -> Array:
    return jaxact.logsumexp(x, axis=-1)


def softmax_with_temperature(x: Any, temperature: Any) -> Array:
    return jaxact.softmax(x, temperature=temperature)


def masked_softmax(x: Any) -> Array:
    return jaxact.softmax(x, where=MASK)


# Into both tails; 0, and ½ for logit, where the formulas have a kink, are visited by the sweep of `rule`.
LINE = np.concatenate([np.linspace(-99.5, 99.5, 40), [-17, -1, -0.5, -1e-3, 1e-3, 0.25, 0.5, 1.5, 17]])
UNIT = np.concatenate([np.linspace(0.0125, 0.9875, 40), [1e-30, 1e-4, 0.1, 0.499, 0.501, 0.996, 1 - 1e-6]])
# One class dominates the first row.
ROWS = np.array([[30, 0, -5, 1, 2], [0.5, -1.25, 2, 0.75, -3], [-4, 6, 1, 5.5, 3]])
WEIGHTS = np.array([[1, 2, 0.5, 1, 1], [0.5, -0.25, 2, 1, 3], [1, 1, 0, 3, 0.5]])
MASK = np.array([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]], bool)

# 32 bits: JAX passes wider constants to a jitted function as they are, whatever the function was compiled for.
LABELS = np.array([0, 2, 3], np.int32)
SOFT = np.array([[0.75, 0, 0.25, 0, 0], [0.5, 0.25, 0.125, 0.125, 0], [0, 1, 0, 0, 0]])
SCORES, BINARY = np.array([-9.5, -2, 0.25, 1, 12, 3, -6]), np.array([0, 1, 0.75, 0.25, 1, 0, 0])
FEATURES = np.array([[1.5, -0.5, 2, 0.25], [-1, 0.75, 0.5, 2], [0.125, 1, -1.75, 0.5]])
PROJECTION = np.array([[1, 0.5, -1, 2, 0], [0.25, -2, 1, 0.5, 1], [3, -1, 0.5, 0.75, -0.5], [-1, 1, 2, -0.25, 0.5]])

_SIGMOID = Elementwise(sigmoid, sigmoid_slope, exact_sigmoid_slope, jax.nn.sigmoid, 2.0)
_LOG_SIGMOID = Elementwise(
    lambda x: -softplus(-x), lambda x: sigmoid(-x), exact_sigmoid_of_minus, jax.nn.log_sigmoid, 3.0
)
_SOFTPLUS = Elementwise(softplus, sigmoid, exact_sigmoid, jax.nn.softplus, 3.0)
_LOGIT = Elementwise(logit, logit_slope, exact_logit_slope, jax.scipy.special.logit, 3.5, (0.0, 1.0))


def textbook_softmax(x: Any) -> Array:
    e = jnp.exp(x)
    return e / e.sum(-1, keepdims=True)


def textbook_softmax_with_temperature(x: Any, temperature: Any) -> Array:
    return textbook_softmax(x / temperature)


def textbook_masked_softmax(x: Any) -> Array:
    e = jnp.exp(x) * MASK
    return e / e.sum(-1, keepdims=True)


def integer_cross_entropy(x: Any) -> Array:
    return losses.softmax_cross_entropy_with_integer_labels(x, LABELS)


def textbook_cross_entropy(x: Any) -> Array:
    return textbook_soft_cross_entropy(x, np.eye(x.shape[-1], dtype=np.float32)[LABELS])


def textbook_soft_cross_entropy(x: Any, labels: Any) -> Array:
    return jnp.sum(labels * (jnp.log(jnp.exp(x).sum(-1, keepdims=True)) - x), -1)


def textbook_binary_cross_entropy(x: Any, y: Any) -> Array:
    return y * jnp.log(1 + jnp.exp(-x)) + (1 - y) * jnp.log(1 + jnp.exp(x))


def focal_loss(x: Any) -> Array:
    return losses.sigmoid_focal_loss(x, 1, 0.25)


def textbook_focal_loss(x: Any) -> Array:
    return 0.25 / (1 + jnp.exp(x)) ** 2 * jnp.log(1 + jnp.exp(-x))


def head(x: Any, w: Any) -> Array:
    return jaxact.linear_cross_entropy(x, w, LABELS)


def textbook_head(x: Any, w: Any) -> Array:
    return textbook_cross_entropy(x @ w).mean()


BOTH, NARROW = ("float32", "float64"), ("float32",)  # of rows, more takes too long
SUBJECTS = {
    "sigmoid": Subject(jaxact.sigmoid, (LINE,), _SIGMOID, second=BOTH),
    "log_sigmoid": Subject(jaxact.log_sigmoid, (LINE,), _LOG_SIGMOID, second=BOTH),
    "softplus": Subject(jaxact.softplus, (LINE,), _SOFTPLUS, second=BOTH),
    "logit": Subject(jaxact.logit, (UNIT,), _LOGIT, second=BOTH),
    "softmax": Subject(jaxact.softmax, (ROWS,), reference=textbook_softmax, second=NARROW),
    # First derivatives only: the second ones of these three can cancel at the class that dominates a row.
    "log_softmax": Subject(jaxact.log_softmax, (ROWS,)),
    "logsumexp": Subject(logsumexp, (ROWS,)),
    "weighted_logsumexp": Subject(weighted_logsumexp, (ROWS, WEIGHTS)),
    "softmax_with_temperature": Subject(
        softmax_with_temperature, (ROWS, np.array(2.0)), reference=textbook_softmax_with_temperature
    ),
    "masked_softmax": Subject(masked_softmax, (ROWS,), reference=textbook_masked_softmax),
    "softmax_cross_entropy_with_integer_labels": Subject(
        integer_cross_entropy, (ROWS,), reference=textbook_cross_entropy
    ),
    "softmax_cross_entropy": Subject(losses.softmax_cross_entropy, (ROWS, SOFT), reference=textbook_soft_cross_entropy),
    "sigmoid_binary_cross_entropy": Subject(
        losses.sigmoid_binary_cross_entropy, (SCORES, BINARY), reference=textbook_binary_cross_entropy
    ),
    "sigmoid_focal_loss": Subject(focal_loss, (SCORES,), reference=textbook_focal_loss),
    "linear_cross_entropy": Subject(head, (FEATURES, PROJECTION), reference=textbook_head),
}
