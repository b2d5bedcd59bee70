"""The training of two linear classifiers as twins, written for the bits as much as for the mathematics."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Key

from jaxact._canonical import canonical_int, canonical_scalar
from jaxact._sigmoid import softplus
from jaxact.classifiers._linear import Params, initialise, log_odds_against, predict
from jaxact.classifiers._unfused import apart, unfused


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
    ∂L/∂w₁ = ∂L/∂w = −∂L/∂w₀: each row of the softmax receives the gradient of the sigmoid up to sign, w₁ − w₀ moves
    twice as fast as w, and so the sigmoid model needs **twice the learning rate**. With that, w = w₁ − w₀ holds after
    every step of every optimizer that acts on each coordinate and is odd in the gradient: SGD, momentum, Nesterov,
    Adam, RMSProp, Adagrad. Decoupled weight decay, as in AdamW, needs half the decay, since it acts on w = 2w₁.

    That is mathematics. For the two loss curves to agree *bit for bit*, both must round alike. A row's logits and
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
        ImportError: if optax, which comes with the `demo` extra, is not installed.

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
    try:
        import optax  # here, so that the classifiers can be used without it
    except ImportError:
        raise ImportError("train_twins needs optax, which comes with: pip install 'jaxact[demo]'.") from None

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
