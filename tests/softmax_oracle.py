"""softmax and log_softmax in float64, over the last axis: values and products with the Jacobian.

Nothing in it subtracts from 1 or from a sum what dominates there.
"""

from typing import Any

import numpy as np


def parts(x: Any) -> tuple[Any, Any, Any]:
    """Probabilities, what each leaves to the others, and where the maximum is."""
    x = np.asarray(x, np.float64)
    top = np.arange(x.shape[-1]) == x.argmax(-1)[..., None]
    e = np.exp(x - x.max(-1, keepdims=True))
    others = np.where(top, 0, e).sum(-1, keepdims=True)
    y = e / (1 + others)
    return y, np.where(top, others / (1 + others), 1 - y), top


def sum_of_others(w: Any, top: Any) -> Any:
    rest = np.where(top, 0, w).sum(-1, keepdims=True)
    return np.where(top, rest, np.maximum(rest - w, 0) + np.where(top, w, 0).sum(-1, keepdims=True))


def exact_value(name: str, x: Any) -> Any:
    y, _, top = parts(x)
    if name == "softmax":
        return y
    x = np.asarray(x, np.float64)
    d = x - x.max(-1, keepdims=True)
    return d - np.log1p(np.where(top, 0, np.exp(d)).sum(-1, keepdims=True))


def exact_product(name: str, mode: str, x: Any, v: Any) -> tuple[Any, Any]:
    """J v (jvp) or Jᵀ v (vjp), and Σⱼ |Jᵢⱼ||vⱼ|."""
    y, rest, top = parts(x)
    v = np.asarray(v, np.float64)
    if (name, mode) == ("log_softmax", "vjp"):
        others = np.where(top, 0, v).sum(-1, keepdims=True)
        product = np.where(top, v * rest - y * others, v - y * v.sum(-1, keepdims=True))
        return product, rest * abs(v) + y * sum_of_others(abs(v), top)
    h = v - np.where(top, v, 0).sum(-1, keepdims=True)  # a common offset changes nothing, and h is 0 at the top
    product, bound = h - (y * h).sum(-1, keepdims=True), rest * abs(v) + sum_of_others(y * abs(v), top)
    return (y * product, y * bound) if name == "softmax" else (product, bound)


def logits(scale: float | str, rows: int, classes: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    if scale != "dominated":
        return rng.normal(size=(rows, classes)) * scale
    x = rng.normal(size=(rows, classes))
    x[np.arange(rows), rng.integers(0, classes, rows)] += rng.uniform(10, 80, rows)
    return x
