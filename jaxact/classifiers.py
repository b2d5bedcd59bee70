"""Two linear classifiers, one logit with a sigmoid and two logits with a softmax, and their training as twins.

Written for the bits as much as for the mathematics: `train_twins` says why and how.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Key

from jaxact._canonical import as_float, canonical_int, canonical_scalar
from jaxact._classes import label_index
from jaxact._logsumexp import logsumexp
from jaxact._sigmoid import sigmoid, softplus
from jaxact._softmax import softmax
from jaxact._unfused import apart, unfused


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
    others = (y[:, None] + jnp.arange(1, classes)[None]) % classes
    at_label = jnp.take_along_axis(z, y[:, None], axis=1)
    return logsumexp(jnp.take_along_axis(z, others, axis=1) - at_label, axis=1)


def cross_entropy(z: Float[Array, "examples logits"], y: Int[Array, " examples"]) -> Float[Array, " examples"]:
    """−log of the label's probability, one loss per example: binary for one logit, over the classes for several.

    Of finite logits; nan for a label that is none of the classes. `jaxact.losses` has masks, infinities and options.
    Computed as softplus of the log-odds against the label. Every term is positive, so the loss is relatively accurate
    however small and never falsely 0; the gradient at the label is minus the sum of the others.

    Raises:
        ValueError: if the shapes are not as above.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxact.classifiers import cross_entropy
        >>> print(cross_entropy(jnp.array([[-30.0, 0.0, 0.0]]), jnp.array([1])).round(4))
        [0.6931]
    """
    if z.ndim != 2 or y.shape != z.shape[:1]:
        raise ValueError(f"z must have shape (examples, logits) and y (examples,), got {z.shape} and {y.shape}.")
    _, exists = label_index(y, max(z.shape[1], 2), None)
    # As a factor nan reaches the gradient too.
    return softplus(log_odds_against(z * jnp.where(exists, 1, jnp.nan)[:, None], y))


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


@dataclasses.dataclass(frozen=True)
class Fit:
    """One trained classifier: the loss before each step, the accuracy at the end, and the parameters at the end."""

    loss: np.ndarray
    accuracy: float
    params: Params


@dataclasses.dataclass(frozen=True)
class Twins:
    """The two classifiers after training, and how far apart they are."""

    sigmoid: Fit
    softmax: Fit

    @property
    def gap(self) -> np.ndarray:
        """|loss of the sigmoid − loss of the softmax| at each step."""
        return np.abs(self.sigmoid.loss - self.softmax.loss)

    @property
    def relative_gap(self) -> np.ndarray:
        """The gap as a fraction of the larger loss: 0 where they are equal, 1 where one of them is 0."""
        larger = np.maximum(np.abs(self.sigmoid.loss), np.abs(self.softmax.loss))
        return self.gap / np.where(larger > 0, larger, 1)

    @property
    def gap_in_ulp(self) -> np.ndarray:
        """The gap in units of the spacing of floating-point numbers at the larger loss."""
        return self.gap / np.spacing(np.maximum(np.abs(self.sigmoid.loss), np.abs(self.softmax.loss)))

    @property
    def weight_gap(self) -> float:
        """max |w − (w₁ − w₀)| over weights and bias at the end: 0 if the two are one model."""
        return max(
            float(np.max(np.abs(np.asarray(one)[0] - (np.asarray(two)[1] - np.asarray(two)[0]))))
            for one, two in zip(self.sigmoid.params, self.softmax.params, strict=True)
        )


LossFunction = Callable[[Params, Array, Array], Array]
State = tuple[list[Params], Any]


def train_twins(
    x: ArrayLike,
    y: ArrayLike,
    *,
    optimizer: Callable[[float], Any] | None = None,
    learning_rate: float = 0.1,
    weight_decay: float = 0.0,
    steps: int = 1000,
    key: Key[Array, ""] | None = None,
    matched: bool = True,
    progress: Callable[[int], None] | None = None,
    loss: LossFunction | None = None,
) -> Twins:
    """Trains a 1-logit sigmoid and a 2-logit softmax classifier side by side, full batch, as the same model.

    With two classes softmax(z₀, z₁)₁ = σ(z₁ − z₀): a softmax over two logits is a sigmoid of their difference. Are the
    two also the same *in training*? Start from w₁ = w/2 and w₀ = −w/2, exact in binary, so that w = w₁ − w₀. Then
    ∂L/∂w₁ = ∂L/∂w = −∂L/∂w₀: each column of the softmax receives the gradient of the sigmoid up to sign, w₁ − w₀ moves
    twice as fast as w, and so the sigmoid model needs **twice the learning rate**. With that, w = w₁ − w₀ holds after
    every step of every optimizer that acts on each coordinate and is odd in the gradient: SGD, momentum, Nesterov,
    Adam, RMSProp, Adagrad. Decoupled weight decay, as in AdamW, needs half the decay, since it acts on w = 2w₁.

    That is mathematics. For the two loss curves to agree *bit for bit*, both must round alike. A column's logits and
    their gradients, the losses given the log-odds, and the update are compiled apart, so that both models run the same
    code; what lies between (`log_odds_against` with one other class, halves, signs) is exact. With `jax.nn` and
    optax the curves drift apart, and on separable data the softmax loss becomes 0 while the sigmoid's does not.

    Args:
        x: features, shape (examples, features), finite.
        y: labels, shape (examples,), 0 or 1, both present.
        optimizer: maps a learning rate to an optax transformation; `optax.sgd` by default.
        learning_rate: > 0, of the softmax model. The sigmoid model gets twice as much.
        weight_decay: ≥ 0, decoupled weight decay of the softmax model. The sigmoid model gets half as much.
        steps: number of full-batch steps, at least 1.
        key: for the starting point; `jax.random.key(0)` by default.
        matched: False gives both models the same learning rate and decay, to show that the curves then differ.
        progress: called with the number of steps done so far, of 2·`steps`: the sigmoid's, then the softmax's. Training
            is then cut into segments.
        loss: (params, x, y) ↦ mean loss, to compare another implementation; by default the mean of `cross_entropy`.

    Returns:
        `Twins`, with `.sigmoid` and `.softmax`, each with `.loss` (before each step), `.accuracy` and `.params`, and
        the gap between them. Arithmetic is in the dtype of `jnp.asarray(x)`: float64 needs `jax_enable_x64`.

    Raises:
        ValueError: if `x` or `y` has the wrong shape or dtype, no rows, nan or infinite features, labels other than 0
            and 1 or only one of them; if `steps` < 1, or `learning_rate` or `weight_decay` is out of range.
        TypeError: if an argument is not of the type above.

    Example:
        >>> import numpy as np
        >>> from jaxact.classifiers import train_twins
        >>> x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
        >>> twins = train_twins(x, x[:, 0] > 0.1, steps=50)
        >>> np.array_equal(twins.sigmoid.loss, twins.softmax.loss), twins.weight_gap
        (True, 0.0)
    """
    x, y = _checked_data(x, y)
    steps = canonical_int("steps", steps, 1)
    canonical_scalar("learning_rate", learning_rate, lambda r: 0 < r < math.inf, "positive and finite")
    canonical_scalar("weight_decay", weight_decay, lambda d: 0 <= d < math.inf, "finite and not negative")
    if not (optimizer is None or callable(optimizer)):
        raise TypeError(
            f"optimizer must be a function of the learning rate, such as optax.adam, got {type(optimizer).__name__}."
        )
    for name, function in (("progress", progress), ("loss", loss)):
        if not (function is None or callable(function)):
            raise TypeError(f"{name} must be a function, got {function!r}.")
    if not (key is None or isinstance(key, jax.Array)):
        raise TypeError(f"key must be one of jax.random.key, got {key!r}.")
    import optax  # here, so that the classifiers can be used without it

    def transformation(rate: float, decay: float) -> Any:
        update = (optimizer or optax.sgd)(rate)
        if not (hasattr(update, "init") and hasattr(update, "update")):
            raise TypeError(f"optimizer must return an optax transformation, got {update!r}.")
        return optax.chain(update, optax.add_decayed_weights(-rate * decay)) if decay else update

    w = initialise(jax.random.key(0) if key is None else key, x.shape[1], 1, x.dtype)
    half = Params(*(jnp.concatenate([-leaf / 2, leaf / 2]) for leaf in w))
    factor = 2 if matched else 1
    report = progress or (lambda done: None)
    segments = 1 if progress is None else min(20, steps)
    single = _train(
        w, x, y, transformation(factor * learning_rate, weight_decay / factor), loss, steps, segments, report
    )
    double = _train(
        half, x, y, transformation(learning_rate, weight_decay), loss, steps, segments, lambda n: report(steps + n)
    )
    return Twins(single, double)


def _checked_data(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    try:
        features, labels = np.asarray(x), np.asarray(y)
    except ValueError:
        raise ValueError("x and y must be arrays, got rows of different lengths.") from None
    if features.ndim != 2:
        raise ValueError(f"x must have shape (examples, features), got {features.shape}.")
    if labels.ndim != 1 or len(labels) != len(features):
        raise ValueError(f"y must have shape ({len(features)},), one label per row of x, got {labels.shape}.")
    if features.size == 0:
        raise ValueError(f"x must have at least one row and one column, got shape {features.shape}.")
    if not (jnp.issubdtype(features.dtype, jnp.floating) or jnp.issubdtype(features.dtype, jnp.integer)):
        raise ValueError(f"x must be numeric, got dtype {features.dtype}.")
    if jnp.issubdtype(features.dtype, jnp.integer):
        features = features.astype(float)
    with np.errstate(over="ignore"):
        features = features.astype(jax.dtypes.canonicalize_dtype(features.dtype))  # as JAX has it
    if not np.isfinite(features).all():
        row, column = np.argwhere(~np.isfinite(features))[0]
        raise ValueError(f"x must be finite, got {features[row, column]} in row {row}, column {column}.")
    classes = np.unique(labels)
    if not np.isin(classes, (0, 1)).all():
        raise ValueError(f"y must hold labels 0 and 1, got {classes.tolist()[:5]}.")
    if len(classes) < 2:
        raise ValueError(f"y must hold both classes, got only {classes.tolist()[0]}.")
    return jnp.asarray(features), jnp.asarray(labels.astype(np.int32))


def _train(
    params: Params,
    x: Array,
    y: Array,
    optimizer: Any,
    loss: LossFunction | None,
    steps: int,
    segments: int,
    progress: Callable[[int], None],
) -> Fit:
    """Full-batch training, one `lax.scan` for each segment.

    The optimizer sees each row of the parameters as an array of its own: those have the same shape in both twins.
    """
    import optax

    def objective(rows: list[Params], x: Array, y: Array, always: Array) -> Array:
        if loss is not None:
            return loss(_stack(rows), x, y)
        # A loop runs each row through one compiled body, forward and backward, and the barriers keep what is in it
        # from being simplified together with what is not where the loop has one row and is unrolled.
        z = lax.map(functools.partial(_row_logits, x=x), _stack(rows))
        return apart(lambda odds: jnp.mean(softplus(odds)), always, log_odds_against(z.T, y))

    @functools.partial(jax.jit, static_argnames="length")
    def run(carry: State, x: Array, y: Array, always: Array, length: int) -> tuple[State, Array]:
        def step(carry: State, _: None) -> tuple[State, Array]:
            rows, state = carry
            value, gradient = jax.value_and_grad(objective)(rows, x, y, always)
            updates, state = unfused(optimizer.update)(gradient, state, rows)
            return (optax.apply_updates(rows, updates), state), value

        return lax.scan(step, carry, None, length)

    carry, losses = (_rows(params), optimizer.init(_rows(params))), []
    ends = [steps * (i + 1) // segments for i in range(segments)]
    for start, end in zip([0, *ends], ends, strict=False):
        carry, values = run(carry, x, y, jnp.array(True), end - start)
        losses.append(np.asarray(values))
        progress(end)
    trained = _stack(carry[0])
    return Fit(np.concatenate(losses), float(jnp.mean(predict(trained, x) == y)), trained)


def _row_logits(row: Params, x: Array) -> Array:
    weights, bias = lax.optimization_barrier(row)
    return lax.optimization_barrier(lax.optimization_barrier(x @ weights) + bias)


def _rows(params: Params) -> list[Params]:
    return [Params(weights, bias) for weights, bias in zip(*params, strict=True)]


def _stack(rows: list[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
