"""What `verify` checks: jaxact's functions, where they are checked, and what they are compared with."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

import jaxact
from jaxact import losses
from jaxact._cli import _verify_references as references
from jaxact._cli._verify_references import Function
from jaxact.verify import Report, rule, values

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


def logit_of_normal(p: Array) -> Array:
    """logit, with what is subnormal in float32 as 0, which is how XLA on CPU reads it."""
    return jaxact.logit(jnp.where(jnp.abs(p) < TINY, 0, p))


def _with_normal(value: Function, p: np.ndarray) -> np.ndarray:
    return value(np.where(np.abs(p) < TINY, 0, p))


TINY = float(np.finfo(np.float32).smallest_normal)


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

_SIGMOID = Elementwise(
    references.sigmoid, references.sigmoid_slope, references.exact_sigmoid_slope, jax.nn.sigmoid, 2.0
)
_LOG_SIGMOID = Elementwise(
    lambda x: -references.softplus(-x),
    lambda x: references.sigmoid(-x),
    references.exact_sigmoid_of_minus,
    jax.nn.log_sigmoid,
    3.0,
)
_SOFTPLUS = Elementwise(references.softplus, references.sigmoid, references.exact_sigmoid, jax.nn.softplus, 3.0)
_LOGIT = Elementwise(
    references.logit, references.logit_slope, references.exact_logit_slope, jax.scipy.special.logit, 3.5, (0.0, 1.0)
)


def softmax_cross_entropy_with_integer_labels(x: Any) -> Array:
    return losses.softmax_cross_entropy_with_integer_labels(x, LABELS)


def sigmoid_focal_loss(x: Any) -> Array:
    return losses.sigmoid_focal_loss(x, 1, 0.25)


def linear_cross_entropy(x: Any, w: Any) -> Array:
    return jaxact.linear_cross_entropy(x, w, LABELS)


BOTH, NARROW = ("float32", "float64"), ("float32",)  # of rows, more takes too long
SUBJECTS = {
    "sigmoid": Subject(jaxact.sigmoid, (LINE,), _SIGMOID, second=BOTH),
    "log_sigmoid": Subject(jaxact.log_sigmoid, (LINE,), _LOG_SIGMOID, second=BOTH),
    "softplus": Subject(jaxact.softplus, (LINE,), _SOFTPLUS, second=BOTH),
    "logit": Subject(jaxact.logit, (UNIT,), _LOGIT, second=BOTH),
    "softmax": Subject(jaxact.softmax, (ROWS,), reference=references.textbook_softmax, second=NARROW),
    # First derivatives only: the second ones can cancel at the class that dominates a row.
    "log_softmax": Subject(jaxact.log_softmax, (ROWS,), reference=references.textbook_log_softmax),
    "logsumexp": Subject(logsumexp, (ROWS,), reference=references.textbook_logsumexp),
    "weighted_logsumexp": Subject(
        weighted_logsumexp, (ROWS, WEIGHTS), reference=references.textbook_weighted_logsumexp
    ),
    # Not a power of two: to divide by that rounds nothing.
    "softmax_with_temperature": Subject(
        softmax_with_temperature, (ROWS, np.array(0.7)), reference=references.textbook_softmax_with_temperature
    ),
    "masked_softmax": Subject(
        masked_softmax, (ROWS,), reference=functools.partial(references.textbook_masked_softmax, mask=MASK)
    ),
    "softmax_cross_entropy_with_integer_labels": Subject(
        softmax_cross_entropy_with_integer_labels,
        (ROWS,),
        reference=functools.partial(references.textbook_cross_entropy, labels=LABELS),
    ),
    "softmax_cross_entropy": Subject(
        losses.softmax_cross_entropy, (ROWS, SOFT), reference=references.textbook_soft_cross_entropy
    ),
    "sigmoid_binary_cross_entropy": Subject(
        losses.sigmoid_binary_cross_entropy, (SCORES, BINARY), reference=references.textbook_binary_cross_entropy
    ),
    "sigmoid_focal_loss": Subject(sigmoid_focal_loss, (SCORES,), reference=references.textbook_focal_loss),
    "linear_cross_entropy": Subject(
        linear_cross_entropy,
        (FEATURES, PROJECTION),
        reference=functools.partial(references.textbook_head, labels=LABELS),
    ),
}
