"""Twins: the two classifiers are one model, bit for bit; and what is needed for that is needed."""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_breast_cancer, make_blobs

import jaxact
from jaxact import classifiers
from jaxact._cli.converge import peer_loss
from jaxact.classifiers import Params, Twins, multilabel, train_twins

OPTIMIZERS: dict[str, tuple[Any, float]] = {
    "sgd": (optax.sgd, 0.0),
    "momentum": (functools.partial(optax.sgd, momentum=0.9), 0.0),
    "nesterov": (functools.partial(optax.sgd, momentum=0.9, nesterov=True), 0.0),
    "adam": (optax.adam, 0.0),
    "rmsprop": (optax.rmsprop, 0.0),
    "adagrad": (optax.adagrad, 0.0),
    "adamw": (optax.adam, 1e-2),
}


def cancer() -> tuple[np.ndarray, np.ndarray]:
    data = load_breast_cancer()
    return (data.data - data.data.mean(0)) / data.data.std(0), data.target


def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Two clusters so far apart that a hyperplane separates them: the losses go to 0."""
    return make_blobs(200, 4, centers=2, cluster_std=0.5, center_box=(-6, 6), random_state=3)


def assert_identical(twins: Twins) -> None:
    np.testing.assert_array_equal(twins.sigmoid.loss, twins.softmax.loss)
    assert twins.weight_gap == 0
    assert twins.sigmoid.accuracy == twins.softmax.accuracy
    assert twins.sigmoid.loss.min() > 0
    assert twins.softmax.loss.min() > 0
    assert not twins.gap.any()
    assert not twins.gap_in_ulp.any()
    assert not twins.relative_gap.any()


# One optimizer of each kind on the real data, and one of them in float64. With --long every optimizer, and two kinds on
# blobs; of Adam, blobs in float32 are in a test below. The other combinations are visited with --exhaustive.
def _mark(name: str, data: Any, dtype: Any) -> Any:
    i, j, k = list(OPTIMIZERS).index(name), data is blobs, dtype is np.float64
    if (i + j + k) % 2 or (data is blobs and name not in ("sgd", "adamw")):
        return pytest.mark.exhaustive
    return () if data is cancer and name in ("sgd", "adam", "adamw") else pytest.mark.long


TWINS = [
    pytest.param(name, data, dtype, marks=_mark(name, data, dtype))
    for name in OPTIMIZERS
    for data in (cancer, blobs)
    for dtype in (np.float32, np.float64)
]


@pytest.mark.parametrize(("name", "data", "dtype"), TWINS)
def test_twins_converge_identically_to_the_last_bit(
    name: str, data: Any, dtype: Any, request: pytest.FixtureRequest
) -> None:
    steps = 5000 if request.config.getoption("--exhaustive") else 500  # to save time only: both hold
    x, y = data()
    optimizer, weight_decay = OPTIMIZERS[name]
    with jax.enable_x64(dtype is np.float64):
        twins = train_twins(x.astype(dtype), y, optimizer=optimizer, weight_decay=weight_decay, steps=steps)
        assert twins.sigmoid.loss.dtype == twins.softmax.params.weights.dtype == dtype
    assert twins.sigmoid.loss.shape == (steps,)
    assert_identical(twins)


# Below the width of a vector, and above it with a remainder; widths themselves are in the data above.
@pytest.mark.long
@pytest.mark.parametrize(
    ("examples", "features"),
    [
        (2, 1),
        pytest.param(5, 1, marks=pytest.mark.exhaustive),
        pytest.param(7, 3, marks=pytest.mark.exhaustive),
        pytest.param(16, 16, marks=pytest.mark.exhaustive),
        (33, 65),
    ],
)
def test_identity_does_not_depend_on_the_number_of_examples_or_features(examples: int, features: int) -> None:
    x = np.random.default_rng(0).normal(size=(examples, features)).astype(np.float32)
    assert_identical(train_twins(x, np.arange(examples) % 2, optimizer=optax.adam, steps=100))


@pytest.mark.long
def test_identity_survives_segments_another_key_and_progress() -> None:
    x, y = cancer()
    seen: list[int] = []
    x = x.astype(np.float32)
    whole = train_twins(x, y, steps=90, key=jax.random.key(7))
    parts = train_twins(x, y, steps=90, key=jax.random.key(7), progress=seen.append)
    assert_identical(parts)
    np.testing.assert_array_equal(whole.sigmoid.loss, parts.sigmoid.loss)
    assert seen == sorted(seen)
    assert seen[-1] == 180  # both models' steps


def test_unmatched_rates_differ() -> None:
    x, y = cancer()
    twins = train_twins(x.astype(np.float32), y, steps=200, matched=False)
    assert twins.sigmoid.loss[0] == twins.softmax.loss[0]
    # The sigmoid model learns at half the pace; by then it is visibly behind.
    assert twins.relative_gap[50:].min() > 0.05


@pytest.mark.long
def test_peers_drift_apart_and_lose_the_loss() -> None:
    x, y = blobs()
    x = x.astype(np.float32) * 4
    peers = train_twins(x, y, optimizer=optax.adam, learning_rate=1.0, steps=2000, loss=peer_loss)
    assert peers.softmax.loss.min() == 0  # falsely: the sigmoid's loss of the same model is 1.6e-10
    assert peers.relative_gap.max() == 1
    assert_identical(train_twins(x, y, optimizer=optax.adam, learning_rate=1.0, steps=2000))


def test_losses_agree_with_float64() -> None:
    rng = np.random.default_rng(1)
    z, y = rng.normal(size=(50, 5)) * 20, rng.integers(0, 5, 50)
    exact = np.log(np.exp(z - z[np.arange(50), y, None]).sum(1))
    compiled = jax.jit(classifiers.cross_entropy)
    got = compiled(np.float32(z), y)
    # The logits are rounded to float32 on the way in, by 2⁻¹⁸ at 64: an absolute error of twice that in a difference.
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=2**-17)
    confident = classifiers.cross_entropy(jnp.array([[60.0, 0.0, 0.0]]), jnp.array([0]))
    # 2e⁻⁶⁰; its logarithm −59.3 is rounded on the way, by 2⁻¹⁹. Log-sum-exp minus the label's logit would give 0.
    np.testing.assert_allclose(confident, [2 * np.exp(-60.0)], rtol=2**-18)
    for logits, classes in ((1, 2), (3, 3)):
        exists = np.isfinite(compiled(np.zeros((5, logits), np.float32), np.arange(-1, 4)))
        np.testing.assert_array_equal(exists, (np.arange(-1, 4) >= 0) & (np.arange(-1, 4) < classes))


def test_gradient_at_the_label_is_the_sum_of_the_others() -> None:
    z, y = np.array([[30, 0, -1]], np.float32), np.array([0])
    gradient = np.asarray(jax.jit(jax.grad(lambda z, y: classifiers.cross_entropy(z, y).sum()))(z, y))[0]
    # One rounding in summing two others.
    np.testing.assert_allclose(gradient[0], -(gradient[1] + gradient[2]), rtol=2e-7)
    assert gradient[0] < 0


def test_models() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    one = classifiers.initialise(jax.random.key(0), 3, 1, jnp.float32)
    two = Params(*(jnp.concatenate([-leaf / 2, leaf / 2]) for leaf in one))
    assert one.weights.shape == (1, 3)
    assert one.bias.shape == (1,)
    assert classifiers.logits(two, x).shape == (6, 2)
    # A matrix product may sum in another order.
    np.testing.assert_allclose(classifiers.logits(one, x), x @ one.weights.T + one.bias, rtol=1e-5, atol=1e-6)
    p = classifiers.probabilities(one, x)
    np.testing.assert_array_equal(p, jaxact.sigmoid(classifiers.logits(one, x)[:, 0]))
    # Two formulas for one number: a few ulp of 1.
    np.testing.assert_allclose(classifiers.probabilities(two, x)[:, 1], p, rtol=1e-6)
    np.testing.assert_array_equal(classifiers.predict(one, x), classifiers.predict(two, x))
    tied = Params(jnp.zeros((1, 3)), jnp.zeros(1))
    np.testing.assert_array_equal(classifiers.predict(tied, x), np.zeros(6))


@pytest.mark.long
def test_ranks_are_promoted_explicitly() -> None:
    with jax.numpy_rank_promotion("raise"):
        x, y = jnp.ones((4, 3)), jnp.array([0, 1, 0, 1])
        assert_identical(train_twins(x, y, steps=1))
        p = classifiers.probabilities(Params(jnp.ones((5, 3)), jnp.zeros(5)), x)
        assert multilabel(p, np.full(5, 0.1)).all()
        assert classifiers.cross_entropy(p, y).shape == (4,)


def test_multilabel_is_strictly_greater_in_every_dtype() -> None:
    p = [0.01, 0.02, 0.41, 0.62, 0.3, 0.18, 0.5, 0.42, 0.06, 0.81]
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        chosen = np.flatnonzero(multilabel(jnp.asarray(p, dtype), 0.3)) + 1
        np.testing.assert_array_equal(chosen, [3, 4, 7, 8, 10])
    np.testing.assert_array_equal(multilabel(jnp.array([[0.2, 0.6]]), jnp.array([0.1, 0.7])), [[True, False]])
    np.testing.assert_array_equal(multilabel(jnp.array([jnp.nan])), [False])
    assert jax.jit(multilabel)(jnp.ones(3), 0.5).all()
    with pytest.raises(ValueError, match=r"threshold must broadcast against shape \(2,\), got shape \(3,\)"):
        multilabel(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        multilabel(jnp.ones(2), float("nan"))
    for bad in (None, "a", 1j, np.array(["a"])):
        with pytest.raises(TypeError, match=r"^probabilities must be"):
            multilabel(bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^threshold must be"):
            multilabel(jnp.ones(2), bad)  # type: ignore[arg-type]


GOOD = np.array([[0.0], [1.0], [2.0]], np.float32)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (GOOD, [0, 1, 2], {}, r"y must hold labels 0 and 1, got \[0, 1, 2\]"),
        (GOOD, [-1, 1, 1], {}, r"y must hold labels 0 and 1, got \[-1, 1\]"),
        (GOOD, [0, 0.5, 1], {}, "y must hold labels 0 and 1"),
        (GOOD, [0, np.nan, 1], {}, "y must hold labels 0 and 1"),
        (GOOD, ["a", "b", "a"], {}, "y must hold labels 0 and 1"),
        (GOOD, [1, 1, 1], {}, "y must hold both classes, got only 1"),
        (np.array([[0.0], [np.nan], [1.0]]), [0, 1, 1], {}, "x must be finite, got nan in row 1, column 0"),
        (np.array([[0.0], [np.inf], [1.0]]), [0, 1, 1], {}, "x must be finite, got inf in row 1, column 0"),
        (GOOD, [0, 1], {}, r"y must have shape \(3,\), one label per row of x, got \(2,\)"),
        (GOOD, [[0], [1], [1]], {}, r"y must have shape \(3,\)"),
        ([[1, 2], [3]], [0, 1], {}, "x and y must be arrays, got rows of different lengths"),
        (GOOD[:, 0], [0, 1, 1], {}, r"x must have shape \(examples, features\), got \(3,\)"),
        (np.zeros((0, 2)), [], {}, "x must have at least one row"),
        (np.zeros((3, 0)), [0, 1, 1], {}, "x must have at least one row and one column"),
        (np.array([["a"], ["b"], ["c"]]), [0, 1, 1], {}, "x must be numeric"),
        (GOOD, [0, 1, 1], {"steps": 0}, "steps must be at least 1, got 0"),
        (GOOD, [0, 1, 1], {"learning_rate": 0}, "learning_rate must be positive and finite, got 0"),
        (GOOD, [0, 1, 1], {"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        (GOOD, [0, 1, 1], {"learning_rate": float("inf")}, "learning_rate must be positive and finite, got inf"),
        (GOOD, [0, 1, 1], {"weight_decay": -1}, "weight_decay must be finite and not negative, got -1"),
    ],
)
def test_bad_input_is_named(x: Any, y: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_twins(x, y, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 2.5),
        ("learning_rate", "fast"),
        ("optimizer", optax.sgd(0.1)),
        ("optimizer", "sgd"),
        ("optimizer", lambda rate: rate),
        ("key", 3),
        ("progress", 3),
        ("loss", "hinge"),
    ],
)
def test_bad_types_are_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must (be|return)"):
        train_twins(GOOD, np.array([0, 1, 1]), **{name: value})


def test_optax_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ImportError, match=r"^train_twins needs optax, which comes with: pip install 'jaxact\[demo\]'"):
        train_twins(np.zeros((2, 1)), np.array([0, 1]))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_labels_of_any_integer_dtype(dtype: str, x64: None) -> None:
    z, y = jnp.array([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]), jnp.array([2, 1])
    with jax.numpy_dtype_promotion("strict"):
        got = classifiers.cross_entropy(z, y.astype(dtype))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(classifiers.cross_entropy(z, y)))
    with pytest.raises(TypeError, match="labels must be integers, got dtype float64"):
        classifiers.cross_entropy(z, jnp.array([2.0, 1.0]))


def test_whole_logits_are_numbers_like_others() -> None:
    loss = classifiers.cross_entropy(jnp.array([[1, 2], [3, 4]]), jnp.array([0, 5]))
    # log(1 + e), and no class 5.
    np.testing.assert_allclose(loss, [np.log1p(np.e), np.nan], rtol=4 * 2.0**-24)
    with pytest.raises(TypeError, match="z must be real"):
        classifiers.cross_entropy(jnp.ones((2, 2), complex), jnp.array([0, 1]))
