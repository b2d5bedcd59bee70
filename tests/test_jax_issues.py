"""What users of jax.nn.softmax, log_softmax and logsumexp have reported, one test an issue, each with its number.

`nn` is the module under test. With `nn = jax.nn` in the fixture below, the tests of the issues in `STILL_FAILING` fail.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxact

INF = float("inf")

# The issues whose test jax.nn fails, in jax 0.10.2 and 0.12.0 alike. The others were fixed there.
STILL_FAILING = {40384, 40386, 40344, 40409, 37234, 6811, 22398, 13529, 15677}


@pytest.fixture
def nn() -> Any:
    return jaxact


def relative(got: Any, want: Any) -> float:
    return float(np.max(np.abs(np.asarray(got, np.float64) / np.asarray(want, np.float64) - 1)))


@pytest.mark.parametrize("gap", [12.0, 17.5, 20.0, 40.0, 80.0])
def test_jax_40384_gradient_of_log_softmax_keeps_the_dominating_entry(nn: Any, gap: float) -> None:
    # ∂ log p₀/∂x₀ = 1 − p₀ = 1/(1 + e^gap), which is no more than 12 roundings.
    x = jnp.array([gap, 0.0])
    want = np.array([1, -1]) / (1 + np.exp(gap))
    assert relative(jax.grad(lambda x: nn.log_softmax(x)[0])(x), want) <= 12 * 2**-24
    assert relative(jax.jvp(nn.log_softmax, (x,), (jnp.array([1.0, 0.0]),))[1][0], want[0]) <= 12 * 2**-24


@pytest.mark.parametrize("gap", [12.0, 17.5, 20.0, 40.0, 80.0])
def test_jax_40386_gradient_of_softmax_keeps_the_dominating_entry(nn: Any, gap: float) -> None:
    # ∂p₀/∂x₀ = p₀(1 − p₀), again by 12 roundings.
    x = jnp.array([gap, 0.0])
    want = np.array([1, -1]) * np.exp(gap) / (1 + np.exp(gap)) ** 2
    assert relative(jax.grad(lambda x: nn.softmax(x)[0])(x), want) <= 12 * 2**-24


def test_jax_40344_diagonal_of_the_softmax_jacobian_where_a_class_is_certain(nn: Any) -> None:
    # In three classes, in both modes and off the origin: the rounding of a probability just below 1 must not count.
    for x in ([14.03, -0.68, -0.7], [30.3, -10.0, -9.0], [-3.3, -30.0, -43.6], [10.3, -30.0, -1000.0]):
        e = np.exp(np.float64(np.array(x, np.float32)) - np.float64(np.float32(x[0])))
        want = (e[1] + e[2]) / e.sum() ** 2
        for jacobian in (jax.jacrev, jax.jacfwd):
            assert relative(np.asarray(jacobian(nn.softmax)(np.array(x, np.float32)))[0, 0], want) <= 12 * 2**-24


def test_jax_40409_float16_gradient_of_log_softmax_over_65536_elements(nn: Any) -> None:
    # Σ 65,536 is not a float16. The gradient at equal logits is 1 − 1/65,536 and −1/65,536, both to half an ulp.
    x = jnp.zeros(65536, jnp.float16)
    gradient = np.asarray(jax.grad(lambda x: nn.log_softmax(x)[0])(x), np.float64)
    assert gradient[0] == 1
    assert (gradient[1:] == -(2.0**-16)).all()
    # And a cotangent of ones, whose sum overflows: ȳ − p Σ ȳ = 0, to the float16 rounding of ones.
    gradient = jax.grad(lambda x: nn.log_softmax(x).astype(jnp.float32).sum())(x)
    assert np.max(abs(np.asarray(gradient, np.float64))) <= 2**-11


@pytest.mark.parametrize(
    "scale", [0.3, pytest.param(1 / 7, marks=pytest.mark.long), pytest.param(3.3333, marks=pytest.mark.long), 1e-3]
)
def test_jax_37234_softmax_of_scaled_logits_under_jit(nn: Any, scale: float) -> None:
    # The product is computed twice, once with the subtraction in one rounding: an ulp of 1e21 is no small difference.
    x = jnp.asarray(np.float32(np.random.default_rng(0).normal(size=(64, 33)) * 1e21))
    one_hot = np.eye(33)[np.asarray(x).argmax(-1)]
    for f in (nn.softmax, exp_of(nn.log_softmax)):
        np.testing.assert_array_equal(np.asarray(jax.jit(lambda x, f=f: f(x * scale))(x)), one_hot)
    for f in scaled(nn):
        np.testing.assert_array_equal(np.asarray(f(x, scale)), one_hot)


def exp_of(f: Any) -> Any:
    return lambda x, **options: jnp.exp(f(x, **options))


@functools.cache
def scaled(nn: Any) -> list[Any]:
    """By a factor that is an argument, and by a temperature, which only jaxact has. Compiled once for all factors."""
    both = nn.softmax, exp_of(nn.log_softmax)
    warm = both if hasattr(nn, "forward_mode") else ()
    return [
        *(jax.jit(lambda x, s, f=f: f(x * s)) for f in both),
        *(jax.jit(lambda x, s, f=f: f(x, temperature=1 / s)) for f in warm),
    ]


def test_jax_6811_gradient_of_logsumexp_of_nothing(nn: Any) -> None:
    x = jnp.full(3, -INF)
    value, gradient = jax.value_and_grad(nn.logsumexp)(x)
    assert value == -INF
    assert gradient.tolist() == [0, 0, 0]
    assert jax.jvp(nn.logsumexp, (x,), (jnp.ones(3),))[1] == 0


def test_jax_22398_logsumexp_derivative_in_a_weight_of_zero(nn: Any) -> None:
    a = jnp.array([0.0, 1.0, 2.0])
    b = jnp.array([1.0, 0.0, 2.0])
    want = np.exp([0, 1, 2]) / (1 + 2 * np.exp(2))
    for jacobian in (jax.jacrev, jax.jacfwd):
        # exp, log, exp again and a few sums of numbers near 1.
        assert relative(jacobian(lambda b: nn.logsumexp(a, b=b))(b), want) <= 16 * 2**-24


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_jax_17117_gradient_with_a_large_masked_logit(nn: Any, name: str) -> None:
    f, mask = getattr(nn, name), jnp.array([True, True, False])
    for large in (100.0, 1e30, INF):
        x = jnp.array([1.0, 1.0, large])
        jacobian = jax.jacrev(lambda x: jnp.where(mask, f(x, where=mask), 0))(x)
        p = 0.25 if name == "softmax" else 0.5  # powers of 2, so exact but for the reciprocal of a sum
        want: list[list[float]] = [[p, -p, 0], [-p, p, 0], [0, 0, 0]]
        np.testing.assert_allclose(np.asarray(jacobian), want, rtol=8 * 2**-24)


def test_jax_19490_masked_log_softmax_under_vmap_with_logits_in_the_hundreds(nn: Any) -> None:
    rng = np.random.default_rng(12322351)
    x, mask = np.float32(rng.normal(size=(1000, 12)) * 100), rng.random((1000, 12)) < 0.5
    mask[:, 0] = True

    def loss(x: Any) -> Any:
        return jax.vmap(lambda x, mask: nn.log_softmax(x, where=mask)[0])(x, mask).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(x)
    z = np.where(mask, np.float64(x), -INF)
    e = np.exp(z - z.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    want = z[:, 0] - z.max(-1) - np.log(e.sum(-1))
    assert relative(value, want.sum()) <= 64 * 2**-24  # a sum of 1000 numbers of one sign
    # Each element is a number up to 1, off by the 8 u of its derivative; so is the want, by the rounding of x.
    np.testing.assert_allclose(np.asarray(gradient), np.eye(12)[0] - p, rtol=0, atol=16 * 2**-24)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_jax_23842_masked_entries_far_above_the_rest(nn: Any, name: str) -> None:
    # The maximum must be that of the entries that count: else all of them underflow.
    f = getattr(nn, name)
    x, mask = jnp.array([[-1e4, -1e4 + 1, 3e38], [1e4, 1e4 + 1, -3e38]]), jnp.array([True, True, False])
    want = np.exp(np.array([0.0, 1.0]) - np.log1p(np.e))
    got, pullback = jax.vjp(lambda x: f(x, where=mask), x)
    np.testing.assert_allclose(
        np.asarray(got)[:, :2], [want if name == "softmax" else np.log(want)] * 2, rtol=8 * 2**-24
    )
    assert (got[:, 2] == (0 if name == "softmax" else -INF)).all()
    gradient = np.asarray(pullback(jnp.ones((2, 3)))[0])
    assert (gradient[:, 2] == 0).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_13529_gradients_at_ties_in_bfloat16(nn: Any, name: str, dtype: str) -> None:
    # Equal logits, as at the start of a training: by symmetry the gradient of one entry is the same at all the others,
    # and the entries sum to 0 up to the error of each: 4 u in bfloat16, some 8 u to 16 u in float32
    # (test_softmax_derivatives.py).
    u = {"float32": 12 * 2.0**-24, "bfloat16": 4 * 2.0**-8}[dtype]
    pull = jax.jit(lambda x, g: jax.vjp(getattr(nn, name), x)[1](g)[0])
    for count in (2, 3, 7, 100, 1000):
        x = np.zeros((2, count), dtype)
        gradient = np.asarray(pull(x, np.eye(count)[[0, 0]].astype(dtype)), np.float64)
        p = 1 / count if name == "softmax" else 1.0
        want = p * (np.eye(count)[0] - 1 / count)
        assert (abs(gradient - want) <= u * abs(want)).all()
        assert len(set(gradient[:, 1:].ravel().tolist())) == 1
        # A cotangent of ones, and one of thousands, have gradient 0 to the rounding of the type.
        for size in (1.0, 1000.0):
            zero = pull(x, np.full(x.shape, size, dtype))
            assert (abs(np.asarray(zero, np.float64)) <= u * size * 2 * p).all()


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_jax_15677_16096_bfloat16_gradients_of_a_training(nn: Any, name: str) -> None:
    # A softmax rule was once blamed for bfloat16 training that diverged, and switched off. Train two layers in float32,
    # and at every tenth step compare the gradient of the logits in bfloat16 with float64's at the same logits: each
    # element within 4 u of Σ|J||ȳ|, and no bias: the mean error is below a tenth of u of the mean size.
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(256, 8)).astype(np.float32), rng.integers(0, 5, 256)
    inputs[np.arange(256), labels] += 2
    targets = np.eye(5)[labels]
    w = rng.normal(size=(8, 5)) * 0.1
    pull = jax.jit(lambda x, g: jax.vjp(getattr(nn, name), x)[1](g)[0])
    errors, sizes = [], []
    for _ in range(40):
        x = np.asarray(inputs @ w, jnp.bfloat16)
        z = np.asarray(x, np.float64)
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        # Cross-entropy for log_softmax, the squared distance of probabilities (Brier's score) for softmax.
        g = -targets if name == "log_softmax" else 2 * (p - targets)
        g = np.asarray(g, jnp.bfloat16)
        got, g = pull(x, g), np.asarray(g, np.float64)
        if name == "log_softmax":
            want = g - p * g.sum(-1, keepdims=True)
            bound = (1 - p) * abs(g) + p * (abs(g).sum(-1, keepdims=True) - abs(g))
        else:
            want = p * (g - (p * g).sum(-1, keepdims=True))
            bound = p * ((1 - 2 * p) * abs(g) + (p * abs(g)).sum(-1, keepdims=True))
        error = np.asarray(got, np.float64) - want
        assert (abs(error) <= 4 * 2**-8 * bound).all()
        errors.append(error)
        sizes.append(abs(want))
        w -= 0.5 * inputs.T @ np.asarray(got, np.float64) / len(inputs)
    assert abs(np.mean(errors)) <= 0.1 * 2**-8 * np.mean(sizes)
    assert (np.argmax(inputs @ w, -1) == labels).mean() > 0.8


def test_jax_16096_training_in_bfloat16_follows_float32(nn: Any) -> None:
    # Attention-like weights from softmax and a cross-entropy from log_softmax, both in bfloat16, with parameters in
    # float32. A gradient has a relative error of a few times 2^-8 that is not biased, so that after 60 steps the loss
    # is within 2 % of float32's.
    rng = np.random.default_rng(1)
    inputs, labels = rng.normal(size=(128, 4, 6)).astype(np.float32), rng.integers(0, 3, 128)
    inputs[np.arange(128), rng.integers(0, 4, 128), labels] += 4
    start = {"query": np.float32(rng.normal(size=6) * 0.1), "out": np.float32(rng.normal(size=(6, 3)) * 0.1)}

    def loss(parameters: Any, dtype: Any) -> Any:
        weights = nn.softmax(jnp.asarray(inputs @ parameters["query"], dtype), axis=1).astype(jnp.float32)
        logits = jnp.asarray(jnp.einsum("bt,btd->bd", weights, jnp.asarray(inputs)) @ parameters["out"], dtype)
        picked = jnp.take_along_axis(nn.log_softmax(logits), jnp.asarray(labels)[:, None], 1)
        return -picked.astype(jnp.float32).mean()

    def train(dtype: Any) -> Any:
        def step(parameters: Any, _: Any) -> Any:
            value, gradient = jax.value_and_grad(loss)(parameters, dtype)
            return jax.tree.map(lambda p, g: p - 0.3 * g, parameters, gradient), value

        return jax.jit(lambda p: jax.lax.scan(step, p, length=60)[1])(jax.tree.map(jnp.asarray, start))

    wide, narrow = train(jnp.float32), train(jnp.bfloat16)
    assert wide[-1] < 0.7 * wide[0]
    assert relative(narrow, wide) <= 0.02
