"""The values of softmax and log_softmax against float64 and mpmath."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from oracles import worst_ulp
from softmax_oracle import exact_value, logits

import jaxact

INF, NAN = float("inf"), float("nan")
BOTH = pytest.mark.parametrize("name", ["softmax", "log_softmax"])
NARROW = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@pytest.mark.parametrize("offset", [0, 50, -50, 300, -300, 1e4])
@pytest.mark.parametrize("classes", [2, 3, 10, 1000, 32768])
def test_softmax_within_6_ulp_at_logit_scale_30(classes: int, offset: float) -> None:
    # Documented. exp alone has 1, the sum and the product with a reciprocal the rest; measured 5.0.
    x = np.float32(logits(30, max(2, 300_000 // classes), classes) + offset)
    assert worst_ulp(jaxact.softmax(x), exact_value("softmax", x)) <= 6


@pytest.mark.parametrize(
    "row", [[-60.3, 0.3], [-29.7, 0.3, -80.1], [10.3, -30], [92.33687, 5.668205], [0.1, -86.9], [88.7, 1.5]]
)
@pytest.mark.parametrize("padding", [0, 998, 32766])
def test_softmax_of_hard_rows(row: list[float], padding: int) -> None:
    x = np.array(row + [-1e4] * padding, np.float32)  # the padding has probability 0 and must not cost accuracy
    assert worst_ulp(jaxact.softmax(x), exact_value("softmax", x)) <= 6


@pytest.mark.parametrize("shape", [(100, 2), (1000, 2), (1000, 20), (100, 1000)])
def test_what_takes_everything_is_exactly_1(shape: tuple[int, int]) -> None:
    # A product with the reciprocal of the sum would be 1 − 2⁻²⁴ in one of eight rows. The derivative rests on this.
    x = np.full(shape, -500, np.float32)
    x[:, 0] = np.random.default_rng(0).uniform(-300, 300, shape[0])
    y = np.asarray(jaxact.softmax(x))
    assert (y[:, 0] == 1).all()
    assert not y[:, 1:].any()


@pytest.mark.parametrize("classes", [16, 64, 1000])
@pytest.mark.parametrize(("rows", "limit"), [(1, 60), (2500, 12)])
def test_one_class_above_many_that_are_equal(classes: int, rows: int, limit: int) -> None:
    # What a row's sum loses where each of the others is just too small to count beside the one: documented, in u. Two
    # levels of 32 additions in small arrays; in large ones up to 12 in each of the lanes.
    gaps = np.linspace(12, 17.4, 55, dtype=np.float32)
    for gap in gaps if rows == 1 else [np.resize(gaps, rows)]:
        x = np.tile(np.reshape(-gap, (-1, 1)), (1, classes))
        x[:, 0] = 0
        error = abs(np.asarray(jaxact.softmax(x), np.float64) / exact_value("softmax", x) - 1)
        assert error.max() <= limit * 2.0**-24


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "room"), [("float32", 86), ("float64", 707)])
@pytest.mark.parametrize(("count", "classes"), [(28, 28), (29, 29), (8, 2**15), (2**15, 2**15)])
def test_many_classes_at_a_large_maximum(count: int, classes: int, dtype: str, room: int, x64: None) -> None:
    # Each exponential is up to e^room: 2^15 of them overflow, and 1 over the sum of 8 is not a normal number. Up to 28
    # classes have a shift of their own.
    tops = np.array([room - 2.5, room - 0.5, room, room + 1.5, room + 20, 1e4])
    x = np.full((len(tops), classes), -INF, dtype)
    x[:, :count] = tops[:, None]
    y = np.asarray(jaxact.softmax(x))
    assert worst_ulp(y[:, :count], np.full((len(tops), count), 1 / count), dtype) <= 6  # documented
    assert not y[:, count:].any()
    bound = 2 * float(np.finfo(dtype).eps)  # one rounding of the logarithm, one of the sum
    np.testing.assert_allclose(np.asarray(jaxact.log_softmax(x))[:, :count], -math.log(count), rtol=bound)
    np.testing.assert_allclose(np.asarray(jaxact.logsumexp(x, axis=1)), tops + math.log(count), rtol=bound)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [2, 3, 8, 20, 100])
def test_a_maximum_of_any_size(classes: int, dtype: str, x64: None) -> None:
    # Where numbers are more than 1 apart, the maximum less what an exponent may be is rounded, to one further below.
    tops = np.outer(2.0 ** np.arange(np.finfo(dtype).maxexp - 1), [1, 1.37, 1.999]).reshape(-1, 1)
    alone, all_alike = np.zeros((2, len(tops), classes), dtype)
    alone[:, :1], all_alike[:] = tops, tops
    for x in alone, all_alike:
        assert worst_ulp(jaxact.softmax(x), exact_value("softmax", x), dtype) <= 6  # documented
        assert worst_ulp(jaxact.log_softmax(x), exact_value("log_softmax", x), dtype) <= 12  # documented
        # m + log1p(others): three roundings of it, and one of the difference here.
        with np.errstate(over="ignore"):
            want = x.max(1) - exact_value("log_softmax", x).max(1)
        np.testing.assert_allclose(np.asarray(jaxact.logsumexp(x, axis=1)), want, rtol=4 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("scale", [1, 30, "dominated"])
def test_log_softmax_is_relatively_accurate(scale: float | str, classes: int) -> None:
    # Two terms of one sign. The largest error is log1p's argument: Σ − 1 ≥ 1/4 has 5 times the relative error of Σ,
    # which is 2 ulp. Measured 8.9.
    x = np.float32(logits(scale, 2000, classes))
    assert worst_ulp(jaxact.log_softmax(x), exact_value("log_softmax", x)) <= 12


@pytest.mark.parametrize("gap", [1.0, 5.0, 17.0, 20.0, 40.0, 69.5, 70.0, 86.0])
def test_log_softmax_of_the_top_entry_down_to_the_smallest_numbers(gap: float) -> None:
    want = float(-mpmath.log1p(mpmath.exp(-gap)))
    for x in ([gap, 0.0], [0.0, -gap], [0.0, gap, -200.0]):
        got = np.max(np.asarray(jaxact.log_softmax(np.array(x, np.float32)), np.float64))
        assert abs(got - want) <= 4 * 2**-23 * abs(want)  # exp, log1p and the division by e^m have an ulp each


@BOTH
@NARROW
@pytest.mark.parametrize("scale", [1, 10])
def test_16_bit_results_are_rounded_once(name: str, dtype: str, scale: float) -> None:
    # Half an ulp is the rounding; the rest of 0.51 is for float32's error, 2^-13 ulp of bfloat16, 2^-10 of float16.
    x = jnp.asarray(logits(scale, 300, 7), dtype)
    got = getattr(jaxact, name)(x)
    assert got.dtype == x.dtype
    assert worst_ulp(got, exact_value(name, x), dtype) <= 0.51


@BOTH
@mpmath.workdps(40)
def test_float64_against_mpmath(name: str, x64: None) -> None:
    for x in logits(30, 20, 5).tolist():
        total = mpmath.fsum(map(mpmath.exp, x))
        exact = [mpmath.exp(a) / total if name == "softmax" else a - mpmath.log(total) for a in x]
        got = np.asarray(getattr(jaxact, name)(jnp.asarray(x)))
        assert got.dtype == np.float64
        # As for float32.
        assert all(abs(mpmath.mpf(float(g)) - w) <= 6 * 2.0**-52 * abs(w) for g, w in zip(got, exact, strict=True))


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("count", [2, 3])
def test_ties_at_every_height(count: int, rows: int) -> None:
    # Each of the exponentials, in the sum and by itself, has its own rounding; none may make one of the classes vanish.
    log_softmax = jax.jit(jaxact.log_softmax)
    for height in np.random.default_rng(0).uniform(-400, 400, 300):
        x = np.full((rows, count), height, np.float32)
        assert worst_ulp(log_softmax(x), np.full(x.shape, -np.log(count))) <= 2  # as above


@BOTH
@pytest.mark.parametrize("temperature", [0.01, 0.7, 3.0, 1e4])
def test_temperature_divides_the_logits(name: str, temperature: float) -> None:
    # (x − m)/T has two roundings, of which the exponential makes an error of 2 u |x − m|/T: in a probability relative
    # to it, in its logarithm relative to each term of the sum.
    x, f = np.float32(logits(10, 500, 6)), getattr(jaxact, name)
    t = float(np.float32(temperature))
    want = exact_value(name, x / np.float64(t))
    distance = (x.max(-1, keepdims=True) - x.astype(np.float64)) / t
    error = distance * want if name == "softmax" else (distance * np.exp(-distance)).sum(-1, keepdims=True)
    allowed = 2**-24 * (24 * abs(want) + 2 * error) + 2.0**-126  # below which XLA flushes to 0
    for got in (f(x, temperature=temperature), jax.jit(lambda x, t: f(x, temperature=t))(x, temperature)):
        assert (abs(np.asarray(got, np.float64) - want) <= allowed).all()


@BOTH
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, (0, 2), (2, -2), None, (0, 1, 2)])
def test_axis_jit_and_vmap(name: str, axis: Any) -> None:
    f = functools.partial(getattr(jaxact, name), axis=axis)
    x = np.float32(logits(3, 6, 20).reshape(4, 5, 6))
    axes = tuple(range(3)) if axis is None else tuple(a % 3 for a in np.atleast_1d(np.array(axis, int)))
    rest = tuple(a for a in range(3) if a not in axes)
    moved = np.transpose(x, rest + axes)
    flat = moved.reshape(*moved.shape[: len(rest)], -1)
    want = np.transpose(exact_value(name, flat).reshape(moved.shape), np.argsort(rest + axes))
    limit = 6 if name == "softmax" else 12  # as above
    xs = np.stack([x, 2 * x, x - 7])
    compiled, mapped = jax.jit(lambda x, xs: (f(x), jax.vmap(f)(xs)))(x, xs)
    assert worst_ulp(f(x), want) <= limit
    assert worst_ulp(compiled, want) <= limit
    loop = np.stack([np.asarray(f(row)) for row in xs])
    # The same formula, compiled for another shape, may sum in another order: both sides have their own error.
    np.testing.assert_allclose(np.asarray(mapped), loop, rtol=2 * limit * 2**-23)


@BOTH
def test_shapes_and_promotion(name: str) -> None:
    f = getattr(jaxact, name)
    certain = float(name == "softmax")  # a class alone has probability 1
    assert f(jnp.array([[5.0], [-1e30]])).tolist() == [[certain], [certain]]
    assert f(np.zeros((3, 0), np.float32)).shape == (3, 0)
    assert f(np.zeros((0, 3), np.float32)).shape == (0, 3)
    assert jax.grad(lambda x: f(x).sum())(np.zeros((3, 0), np.float32)).shape == (3, 0)
    assert f(np.float32(3), axis=None).tolist() == certain
    assert f(jnp.array([3.0, -7.0]), axis=()).tolist() == [certain, certain]
    for x in (jnp.array([True, False]), jnp.array([1, 0]), np.array([1, 0], np.uint8)):
        assert f(x).dtype == jnp.float32
        assert f(x).tolist() == f(jnp.array([1.0, 0.0])).tolist()
    with jax.enable_x64(True):
        assert f(jnp.array([1, 0])).dtype == jnp.float64
