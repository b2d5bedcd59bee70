"""sigmoid, log_sigmoid, softplus and logit: values, derivatives of every order in every mode, edges, dtypes, errors."""

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from jax import Array
from jax._src.ad_checkpoint import saved_residuals  # what `jax.ad_checkpoint.print_saved_residuals` prints
from jax._src.config import check_tracer_leaks  # `jax.checking_leaks`, which can only turn it on
from oracles import VALUE_AND_SLOPE, exact, points, ulp_error

import jaxact

Function = Callable[[Any], Array]

FUNCTIONS: dict[str, Function] = {
    name: getattr(jaxact, name) for name in ("sigmoid", "log_sigmoid", "softplus", "logit")
}
ARGUMENT = {name: "p" if name == "logit" else "x" for name in FUNCTIONS}

# float64: measured 2.5 ulp, and ½ is for the oracle, which is rounded too.
# float32: the largest bound of `test_exhaustive.py`. 16 bits: rounded once from float32, which is ½ and a little.
ULPS = {"float64": 4, "float32": 3.5, "bfloat16": 0.51, "float16": 0.51}

all_functions = pytest.mark.parametrize("name", FUNCTIONS)
all_dtypes = pytest.mark.parametrize("dtype", ULPS)


def value_and_slope(name: str, x: np.ndarray) -> list[np.ndarray]:
    """By mpmath in float64, where NumPy is no better than the function under test."""
    if x.dtype == np.float64:
        return [np.array([exact(name, order, float(v)) for v in x]) for order in (0, 1)]
    return [oracle(x) for oracle in VALUE_AND_SLOPE[name]]


def slopes(f: Function) -> list[Function]:
    """The first derivative, by every way to ask for it."""
    return [
        jax.vmap(jax.grad(f)),
        lambda x: jax.vjp(f, x)[1](jnp.ones_like(x))[0],
        lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1],
    ]


@all_dtypes
@all_functions
def test_values_and_first_derivatives(name: str, dtype: str) -> None:
    f, x = FUNCTIONS[name], points(name, jnp.dtype(dtype))
    value, slope = value_and_slope(name, x)
    with jax.enable_x64(dtype == "float64"):
        every, at = [f, *slopes(f)], jnp.asarray(x)
        # One operation after another, by value and backward pass; and compiled, by every way.
        results = [f(at), every[2](at), *jax.jit(lambda x: [compute(x) for compute in every])(at)]
        for result, want in zip(results, [value, slope, value, *[slope] * 3], strict=True):
            got = np.asarray(result)
            assert got.dtype == x.dtype
            error = ulp_error(got, want, x.dtype)
            assert error.max() <= ULPS[dtype], (x[np.argmax(error)], error.max())


@all_functions
def test_one_operation_at_a_time(name: str) -> None:
    f, x = FUNCTIONS[name], points(name, np.float32)
    value, slope = value_and_slope(name, x)
    with jax.disable_jit():
        assert ulp_error(f(jnp.asarray(x)), value, np.float32).max() <= ULPS["float32"]
        assert ulp_error(slopes(f)[1](jnp.asarray(x)), slope, np.float32).max() <= ULPS["float32"]


@all_functions
def test_vmap_equals_loop(name: str) -> None:
    # Rows of 16 numbers, the widest vector of a CPU: XLA may compile what is left over another way, an ulp away.
    f, rows = FUNCTIONS[name], points(name, np.float32)[:64].reshape(4, 16)
    for g in (f, slopes(f)[1]):
        np.testing.assert_array_equal(jax.vmap(g)(rows), [g(row) for row in rows])


@all_functions
def test_shapes_are_kept(name: str) -> None:
    functions = [FUNCTIONS[name], *slopes(FUNCTIONS[name])[1:]]
    shapes: list[tuple[int, ...]] = [(), (0,), (2, 0, 3), (1,), (2, 3, 4)]
    results = jax.jit(lambda xs: [[f(x) for x in xs] for f in functions])([jnp.full(shape, 0.25) for shape in shapes])
    for of_function in results:
        assert [y.shape for y in of_function] == shapes


# --- edges: by hand. σ(−x), σ′(x) and softplus(−x) are e^−x to within e^−x of themselves. ---

# mpmath.exp(-x); subnormal in float32 from 88 on, in float64 from 710 on
TAILS = {
    40.0: 4.248354255291589e-18,
    88.0: 6.054601895401186e-39,
    104.0: 6.813556821545298e-46,
    500.0: 7.124576406741286e-218,
    710.0: 4.47628622567513e-309,
}
LOG_2 = 0.6931471805599453  # mpmath.log(2)


def edges(name: str, dtype: Any) -> list[tuple[float, float, float]]:
    """Input, value, slope."""
    info = ml_dtypes.finfo(dtype)
    largest, tiny = float(info.max), float(info.smallest_normal)
    inf, nan = np.inf, np.nan
    if name == "logit":
        outside = [(p, nan, nan) for x in (tiny, 0.5, 40.0, largest, inf) for p in (-x, 1 + x)]
        # 0 and −0 are one point, at which the limits from inside are meant.
        return [
            (0.0, -inf, inf),
            (-0.0, -inf, inf),
            (tiny, {4: -87.33654475055310, 8: -708.3964185322641}[np.dtype(dtype).itemsize], 1 / tiny),  # log of it
            (0.5, 0.0, 4.0),
            (1.0, inf, inf),
            (nan, nan, nan),
            *(edge for edge in outside if edge[0] != 1),
        ]
    at_zero = [0.0, -0.0, tiny, -tiny]
    if name == "sigmoid":
        saturated = [(s * x, (1 + s) / 2, 0.0) for x in (largest, inf) for s in (1, -1)]
        return [*((x, 0.5, 0.25) for x in at_zero), *saturated, (nan, nan, nan)]
    if name == "softplus":
        saturated = [(s * x, max(s * x, 0.0), (1 + s) / 2) for x in (largest, inf) for s in (1, -1)]
        return [*((x, LOG_2, 0.5) for x in at_zero), *saturated, (nan, nan, nan)]
    return [(-x, -value, slope) for x, value, slope in edges("softplus", dtype)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@all_functions
def test_edges(name: str, dtype: str) -> None:
    x, value, slope = np.array(edges(name, jnp.dtype(dtype))).T
    with jax.enable_x64(dtype == "float64"):
        every = [FUNCTIONS[name], *slopes(FUNCTIONS[name])]
        got, *derivatives = jax.jit(lambda x: [compute(x) for compute in every])(jnp.asarray(x, dtype))
        np.testing.assert_array_equal(got, value.astype(dtype))
        for derivative in derivatives:
            np.testing.assert_array_equal(derivative, slope.astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("x", TAILS)
def test_saturated(x: float, dtype: str) -> None:
    tail = TAILS[x]
    expected: dict[str, list[tuple[float, float, float]]] = {
        "sigmoid": [(x, 1, tail), (-x, tail, tail)],
        "softplus": [(x, x, 1), (-x, tail, tail)],
        "log_sigmoid": [(x, -tail, tail), (-x, -x, 1)],
        "logit": [(x, np.nan, np.nan), (-x, np.nan, np.nan)],
    }
    with jax.enable_x64(dtype == "float64"):
        for name, cases in expected.items():
            for at, value, slope in cases:
                got = FUNCTIONS[name](jnp.asarray(at, dtype)), jax.grad(FUNCTIONS[name])(jnp.asarray(at, dtype))
                assert ulp_error(got, np.array([value, slope]), dtype).max() <= ULPS[dtype], (name, at, got)


# --- dtypes and errors ---


@pytest.mark.parametrize("x", [1, True, np.int8(1), np.ones(3, bool), np.ones(3, np.int32), np.ones((), np.uint8)])
@pytest.mark.parametrize("default", ["float32", "float64"])
@all_functions
def test_integers_and_bools_become_the_default_float(name: str, default: str, x: Any) -> None:
    with jax.enable_x64(default == "float64"):
        y = FUNCTIONS[name](x)
        assert (y.dtype, y.shape) == (default, np.shape(x))
        np.testing.assert_array_equal(y, FUNCTIONS[name](np.ones(np.shape(x), default)))


@all_functions
def test_python_scalars_stay_weak(name: str) -> None:
    # As in jax.nn: a Python number must not decide the dtype of what it meets.
    f, x = FUNCTIONS[name], jnp.ones(2, jnp.bfloat16)
    assert f(0.5).dtype == jnp.float32
    assert (f(0.5) * x).dtype == jnp.bfloat16
    assert (jax.grad(f)(0.5) * x).dtype == jnp.bfloat16
    several = jnp.full(2, 0.5)
    assert (f(several) * x).dtype == jnp.bfloat16
    assert (jax.grad(lambda x: f(x).sum())(several) * x).dtype == jnp.bfloat16
    assert not f(np.float32(0.5)).weak_type


@all_functions
def test_a_python_number_made_before_float64_was_enabled(name: str) -> None:
    # With a constant it would promote to float64, whose bits are twice as many.
    f, x = FUNCTIONS[name], jnp.asarray(0.25)
    want = f(jnp.float32(0.25)), jax.grad(f)(jnp.float32(0.25))
    with jax.enable_x64(True):
        got = f(x), jax.grad(f)(x)
    assert [a.dtype for a in got] == [jnp.float32, jnp.float32]
    # With constants of 64 bits a few roundings of one u each may go the other way.
    np.testing.assert_allclose(got, want, rtol=4 * 2**-24)


@all_dtypes
@all_functions
def test_strict_promotion(name: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        for f in (FUNCTIONS[name], jax.grad(FUNCTIONS[name]), jax.hessian(FUNCTIONS[name])):
            assert jax.eval_shape(f, jnp.asarray(0.25, dtype)).dtype == dtype  # JAX promotes where it traces


@all_functions
def test_complex_raises(name: str) -> None:
    for x in (1j, np.ones(2, np.complex64)):
        with pytest.raises(TypeError, match=f"^{ARGUMENT[name]} must be real, got dtype complex64"):
            FUNCTIONS[name](x)


@pytest.mark.parametrize("x", ["0.5", None, [0.5], (0.5,)])
@all_functions
def test_not_an_array_raises(name: str, x: Any) -> None:
    with pytest.raises(TypeError, match=f"^{ARGUMENT[name]} must be an array or a number, got {type(x).__name__}"):
        FUNCTIONS[name](x)


# --- higher derivatives ---

SATURATED = [40.0, -40.0, 500.0, -500.0]
PROBABILITIES = [1e-10, 0.25, 0.5 - 1e-6, 0.5 + 1e-6, 1 - 1e-10]


@pytest.mark.parametrize("order", [1, 2, 3])
@all_functions
def test_every_nesting_of_forward_and_reverse_is_exact(name: str, order: int, x64: None) -> None:
    x = PROBABILITIES if name == "logit" else SATURATED
    want = [exact(name, order, v) for v in x]
    nestings = itertools.product((jax.jacfwd, jax.grad), repeat=order)
    derivatives = [functools.reduce(lambda f, mode: mode(f), modes, FUNCTIONS[name]) for modes in nestings]
    # The check for leaks, in the strict configuration, traces everything anew, exponentially often at order 3.
    with check_tracer_leaks(False) if order == 3 else contextlib.nullcontext():
        every = jax.jit(lambda x: [jax.vmap(derivative)(x) for derivative in derivatives])(jnp.array(x))
    for got in every:
        # Measured 1e-15: some ten roundings. A difference of near numbers anywhere would lose 1e-10 of these or more.
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@all_functions
def test_reverse_mode_keeps_one_array(name: str, dtype: str) -> None:
    x = jnp.full((8, 16), 0.25, dtype)
    residuals: Any = saved_residuals(FUNCTIONS[name], x)
    ((kept, _),) = residuals
    assert kept.size * kept.dtype.itemsize == x.nbytes


# --- public defects. Expected values: mpmath.exp(-x) of the inputs in the issues. To 9 u of float64: exp has two, and
# there are some products. ---


def first_derivatives(f: Function, x: float) -> list[float]:
    return [float(d(f)(x)) for d in (jax.grad, jax.jacfwd)]


def second_derivatives(f: Function, x: float) -> list[float]:
    nestings = [outer(inner(f)) for outer in (jax.grad, jax.jacfwd) for inner in (jax.grad, jax.jacfwd)]
    return [float(y) for y in jax.jit(lambda x: [derivative(x) for derivative in nestings])(x)]


def test_jax_40385_sigmoid_gradient_is_not_falsely_zero(x64: None) -> None:
    np.testing.assert_allclose(first_derivatives(jaxact.sigmoid, 37.42994775023705), 5.551115123125775e-17, rtol=1e-15)


def test_jax_40342_sigmoid_pushforward_keeps_the_tail(x64: None) -> None:
    np.testing.assert_allclose(first_derivatives(jaxact.sigmoid, 40.0), 4.248354255291589e-18, rtol=1e-15)


def test_jax_40383_log_sigmoid_second_derivative_is_not_falsely_zero(x64: None) -> None:
    got = second_derivatives(jaxact.log_sigmoid, -37.42994775023705)
    np.testing.assert_allclose(got, -5.551115123125775e-17, rtol=1e-15)


def test_jax_40387_softplus_second_derivative_is_not_falsely_zero(x64: None) -> None:
    np.testing.assert_allclose(second_derivatives(jaxact.softplus, 40.0), 4.248354255291589e-18, rtol=1e-15)


# --- properties ---

EPS = 2.0**-23  # float32; ulp(y) ≤ EPS·|y|


def properties(low: float, high: float) -> Callable[[Any], Any]:
    numbers = arrays(np.float32, 32, elements=st.floats(low, high, width=32, allow_subnormal=False))
    return lambda test: settings(derandomize=True, deadline=None, max_examples=25)(given(x=numbers)(test))


@properties(-200, 200)
def test_sigmoid_of_x_and_of_minus_x_add_up_to_1(x: np.ndarray) -> None:
    # 2 ulp of a number in [½, 1) and 2 of a smaller one, and the rounding of the sum: 2 ulp of 1.
    np.testing.assert_allclose(jaxact.sigmoid(x) + jaxact.sigmoid(-x), 1, rtol=0, atol=2 * EPS)


@properties(-200, 200)
def test_sigmoid_is_monotone(x: np.ndarray) -> None:
    y = np.asarray(jaxact.sigmoid(np.sort(x)), np.float64)
    assert np.all(np.diff(y) >= -4 * EPS * y[1:])  # neighbours may each be off by 2 ulp


@properties(-80, 10)
def test_logit_inverts_sigmoid(x: np.ndarray) -> None:
    # 2 ulp of σ(x) move logit by 2·EPS·σ/σ′ = 2·EPS/σ(−x); above 10 that is not small. logit itself: 3.5 ulp.
    bound = EPS * (2 / oracles.sigmoid(-x) + 4 * np.abs(x))
    assert np.all(np.abs(np.asarray(jaxact.logit(jaxact.sigmoid(x)), np.float64) - x) <= bound)


@properties(-200, 200)
def test_softplus_of_x_and_of_minus_x_differ_by_x(x: np.ndarray) -> None:
    up, down = (np.asarray(jaxact.softplus(s * x), np.float64) for s in (1, -1))
    assert np.all(np.abs(up - down - x) <= 3 * EPS * (up + down))  # 3 ulp each


# --- the oracles, tested ---


@all_functions
def test_oracles_agree(name: str) -> None:
    x = points(name, np.float32).astype(np.float64)
    for order, oracle in enumerate(VALUE_AND_SLOPE[name]):
        # A handful of roundings of float64, 1e-8 ulp of float32.
        assert ulp_error(oracle(x), np.array([exact(name, order, v) for v in x]), np.float64).max() <= 6


def test_oracles_of_higher_order_agree() -> None:
    at = np.array([-500, -40, -3, -1e-3, 1e-9, 0.5, 2, 40, 700])
    for order, oracle in ((2, oracles.sigmoid_2), (3, oracles.sigmoid_3)):
        want = [exact("sigmoid", order, v) for v in at]
        np.testing.assert_allclose(oracle(at), want, rtol=1e-14)  # σ‴ has a root at 1.317, far enough from all of these


def test_ulp_error_can_tell() -> None:
    one, nan, inf, tiny, largest = 1.0, np.nan, np.inf, 2.0**-126, float(np.finfo(np.float32).max)
    want = np.array([one, one, 2.0, nan, inf, inf, one, nan, tiny, tiny / 2, tiny / 2, 1e39, -inf, tiny])
    got = [1 + EPS, 1 - EPS / 2, 2.0 - EPS, nan, inf, largest, nan, inf, 0, 0, 2 * tiny, inf, inf, tiny * (1 + EPS)]
    expected = [1, 0.5, 0.5, 0, 0, inf, inf, inf, 2**23, 0, inf, 0, inf, 1]
    np.testing.assert_array_equal(ulp_error(np.array(got, np.float32), want, np.float32), expected)
