"""What the tests compare with, and where: float64 NumPy and mpmath, which share no code with what is checked.

The NumPy oracles are written without cancellation. Their own error is a few float64 ulp, which is 1e-8 of a float32
ulp; `test_sigmoid.py` holds them to that against mpmath, whose formulas are the textbook's.
"""

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import mpmath
import numpy as np

from jaxact._cli._verify_references import (
    logit as logit,
    quietly,
    sigmoid as sigmoid,
    sigmoid_slope as sigmoid_slope,
    softplus as softplus,
)
from jaxact._cli._verify_subjects import SUBJECTS

Oracle = Callable[[np.ndarray], np.ndarray]


def ulp_error(got: Any, want: np.ndarray, dtype: Any) -> np.ndarray:
    """|got − want| in units of the spacing of `dtype` at the exact value `want`, element by element.

    nan must meet nan, and an infinity the same infinity (what rounds to infinity in `dtype` is one). Where `want` is
    below the smallest normal number there is nothing to measure, since XLA flushes subnormal numbers to 0, but not
    those of float16: the error is 0 if `got` is below it too. Every violation of these rules is an infinite error.
    """
    info = ml_dtypes.finfo(dtype)
    with np.errstate(all="ignore"):
        got, want = np.asarray(got).astype(np.float64), np.asarray(want, np.float64)
        # frexp gives want = m·2^exponent with m in [½, 1), one more than the exponent of IEEE.
        exponent = np.maximum(np.frexp(want)[1] - 1, info.minexp)
        error = np.abs(got - want) / np.ldexp(1.0, exponent - info.nmant)
        flushed = np.abs(want) < (0 if dtype == np.float16 else info.smallest_normal)
        special = ~(error < np.inf) | flushed | (np.abs(want) > info.max)
        if special.any():
            error[special] = _special_error(got[special], want[special], dtype)
    return error


def worst_ulp(got: Any, want: np.ndarray, dtype: Any = "float32") -> float:
    return float(ulp_error(got, want, dtype).max())


def _special_error(got: np.ndarray, want: np.ndarray, dtype: Any) -> np.ndarray:
    info = ml_dtypes.finfo(dtype)
    tiny = float(info.smallest_normal)
    rounded = want.astype(dtype).astype(np.float64)
    agree = np.where(np.abs(want) < tiny, np.abs(got) <= tiny, (got == rounded) | (np.isnan(got) & np.isnan(want)))
    return np.where(agree, 0.0, np.inf)


@quietly
def sigmoid_2(x: np.ndarray) -> np.ndarray:
    """σ″ = σ′·(1 − 2σ), and 1 − 2σ = (e − 1)/(1 + e) for x > 0: an odd function."""
    e = np.exp(-np.abs(x))
    return np.sign(x) * np.expm1(-np.abs(x)) * e / (1 + e) ** 3


@quietly
def sigmoid_3(x: np.ndarray) -> np.ndarray:
    """σ‴ = σ′·(1 − 6σ′), and 1 − 6e/(1 + e)² = (1 − 4e + e²)/(1 + e)². It has a root at e = 2 − √3."""
    e = np.exp(-np.abs(x))
    return e * ((e - (2 - np.sqrt(3))) * (e - (2 + np.sqrt(3)))) / (1 + e) ** 4


# What `python -m jaxact verify` compares with, in NumPy as well.
VALUE_AND_SLOPE: dict[str, tuple[Oracle, Oracle]] = {
    name: (subject.elementwise.value, subject.elementwise.slope)
    for name, subject in SUBJECTS.items()
    if subject.elementwise
}
log_sigmoid = VALUE_AND_SLOPE["log_sigmoid"][0]


@quietly
def log_softmax(x: np.ndarray) -> np.ndarray:
    """(x − m) − log1p(Σ of the others), where m is the maximum and "the others" leaves out one place that attains it.

    The limit at infinities: −inf takes part in nothing, several +inf share equally, −inf throughout stays −inf.
    """
    largest, others = _largest_and_others(x)
    below = np.where(x == largest, 0, x - largest)
    return np.where(largest == -np.inf, -np.inf, below - np.log1p(others))


@quietly
def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(x))


@quietly
def logsumexp(x: np.ndarray) -> np.ndarray:
    largest, others = _largest_and_others(x)
    return np.squeeze(np.where(np.isinf(largest), largest, largest + np.log1p(others)), -1)


def _largest_and_others(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The maximum m, and the sum of e^(x − m) over all places but the first that attains m."""
    largest = np.max(x, -1, keepdims=True)
    terms = np.exp(np.where(x == largest, 0, x - largest))
    np.put_along_axis(terms, np.argmax(x, -1, keepdims=True), 0, -1)
    return largest, np.sum(terms, -1, keepdims=True)


@functools.cache
def exact(name: str, order: int, x: float) -> float:
    """The derivative of that order, 0 to 3, of sigmoid, log_sigmoid, softplus or logit, rounded once to float64."""
    # 1 + e^−|x| and 1 − p keep every digit of numbers down to the smallest of float64, which is 1e-308.
    with mpmath.workdps(400):
        return float(_exact(name, order, mpmath.mpf(x)))


def _exact(name: str, order: int, x: Any) -> Any:
    if name == "log_sigmoid":  # −softplus(−x)
        return (-1) ** (order + 1) * _exact("softplus", order, -x)
    if name == "softplus":
        return mpmath.log(1 + mpmath.exp(x)) if order == 0 else _exact("sigmoid", order - 1, x)
    if name == "sigmoid":
        s = 1 / (1 + mpmath.exp(-x))
        return (s, s * (1 - s), s * (1 - s) * (1 - 2 * s), s * (1 - s) * (1 - 6 * s * (1 - s)))[order]
    if name == "logit":
        odds, variance = x / (1 - x), x * (1 - x)
        derivatives = (1 / variance, (2 * x - 1) / variance**2, 2 * (1 - 3 * variance) / variance**3)
        return mpmath.log(odds) if order == 0 else derivatives[order - 1]
    raise ValueError(f"no oracle for {name!r}")


def neighbours(center: float, dtype: Any) -> np.ndarray:
    """`center` and eight numbers of the dtype on either side of it."""
    at = np.asarray(center, dtype)
    return (at.view(f"i{at.itemsize}") + np.arange(-8, 9, dtype=f"i{at.itemsize}")).view(dtype)


def points(name: str, dtype: Any) -> np.ndarray:
    """Random and adversarial inputs: all magnitudes, both tails, and around every point where a formula changes."""
    rng = np.random.default_rng(0)
    if name == "logit":
        spread = [rng.uniform(0, 1, 200), 10 ** rng.uniform(-300, 0, 100), 1 - 10 ** rng.uniform(-16, 0, 100)]
        centers = [0.25, 0.5, 0.75]
    else:
        # At e⁻³⁷ and e⁻¹⁷ 1 + e rounds to 1 in float64 and float32; at e^41.6 the sigmoid stops correcting it.
        spread = [rng.normal(0, 10, 200), rng.normal(0, 250, 100), 10 ** rng.uniform(-300, 2, 100)]
        centers = [x * sign for x in (np.log(2), 1, 17, 36.7, 41.6, 87.3, 708) for sign in (1, -1)]
    with np.errstate(all="ignore"):  # not all fit into 16 bits
        x = np.concatenate([np.concatenate(spread).astype(dtype)] + [neighbours(c, dtype) for c in centers])
    wide = x.astype(np.float64)
    # Zeros, infinities and nan have their own test, and XLA reads subnormal numbers as 0.
    normal = np.isfinite(wide) & (np.abs(wide) >= float(ml_dtypes.finfo(dtype).smallest_normal))
    return x[normal & (wide < 1)] if name == "logit" else x[normal]


def label_cross_entropy(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Value and gradient of −log p_y, and what rounding z_j − z_y changes in them, in units of the unit roundoff u.

    A rounded difference is (z_j − z_y)(1 + δ) with |δ| ≤ u, and ∂loss/∂(z_j − z_y) = p_j. So the loss is off by up to
    u Σ p_j |z_j − z_y|, and e^(z_j − c), relatively, by u |z_j − c|, whether c is z_y or the maximum.
    """
    x, here = np.asarray(x, np.float64), np.arange(x.shape[-1]) == y[:, None]
    d = x - x[here][:, None]
    others = np.logaddexp.reduce(np.where(here, -np.inf, d), -1, keepdims=True)
    loss, rest = np.logaddexp(0, others), np.exp(-np.logaddexp(0, -others))  # rest is 1 − p_y, without the 1
    p = np.exp(d - loss)
    off = (p * abs(d)).sum(-1, keepdims=True)
    moved = np.where(here, off, p * (abs(d) + d.max(-1, keepdims=True) - d + off))
    return loss[:, 0], np.where(here, -rest, p), off[:, 0], moved


def focal_loss(x: np.ndarray, positive: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Value and slope of q^γ·log(1 + e^−m), m = ±x and q = σ(−m): binary cross-entropy for γ = 0."""
    x, sign = np.asarray(x, np.float64), np.where(positive, 1, -1)
    loss, q = np.logaddexp(0, -sign * x), np.exp(-np.logaddexp(0, sign * x))
    return q**gamma * loss, -sign * q**gamma * (q + gamma * np.exp(-loss) * loss)


def cross_entropy(x: Any, labels: Any, where: Any = True, **options: Any) -> Any:
    """−Σ labels·log p of ordinary logits with every option of the losses, in plain NumPy that takes complex numbers."""
    cap, w, e = options.get("logit_softcap"), options.get("class_weight", 1), options.get("label_smoothing", 0)
    z = (x if cap is None else cap * np.tanh(x / cap)) / options.get("temperature", 1)
    exist = np.broadcast_to(where, x.shape)
    lse = np.log((exist * np.exp(z)).sum(-1, keepdims=True))
    q = exist * ((1 - e) * labels + e / exist.sum(-1, keepdims=True))
    return (w * q * (lse - z)).sum(-1) + options.get("z_loss", 0) * lse[..., 0] ** 2


def complex_step(f: Callable[..., Any], arguments: dict[str, Any], name: str) -> np.ndarray:
    """The derivative of f(**arguments) in one of them: the imaginary part of f(a + ih)/h, which is no difference."""
    at = np.asarray(arguments[name], complex)
    gradient = np.zeros(at.shape)
    for i in np.ndindex(at.shape):
        moved = at.copy()
        moved[i] += 1e-30j
        gradient[i] = f(**arguments | {name: moved}).imag / 1e-30
    return gradient


def linear_cross_entropy(
    x: Any,
    w: Any,
    labels: np.ndarray,
    *,
    bias: Any = 0,
    w_layout: str = "dv",
    where: Any = True,
    ignore_index: int | None = -100,
    token_weight: Any = 1,
    reduction: str = "mean",
    **options: Any,
) -> Any:
    """The loss of the logits x·w + bias, dense, in plain NumPy that takes complex numbers."""
    z = x @ (w if w_layout == "dv" else w.T) + bias
    live = where & (labels != ignore_index)
    y = np.where(live, labels, 0)
    weight = live * token_weight
    loss = weight * cross_entropy(z, np.eye(z.shape[-1])[y], **options)
    if reduction == "none":
        return loss
    total = np.sum(weight * np.asarray(options.get("class_weight", np.ones(z.shape[-1])))[y])
    return loss.sum() / (1 if reduction == "sum" else total if total != 0 else np.inf)
