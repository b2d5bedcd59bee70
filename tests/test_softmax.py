"""softmax and log_softmax against float64 and mpmath: values, every derivative, the policies, and the errors."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxact

INF, NAN = float("inf"), float("nan")
BOTH = pytest.mark.parametrize("name", ["softmax", "log_softmax"])
NARROW = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
# The unit roundoff u; and the size of what may be lost to underflow: XLA flushes subnormal float32 to 0, and float16
# has subnormals, 2^-24 apart.
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-53}
LOST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-25, "float64": 2.0**-1022}
LARGEST = float(np.finfo(np.float32).max)


# The oracle: float64, over the last axis. Nothing in it subtracts from 1 or from a sum what dominates there.


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


def ulps(got: Any, want: Any, dtype: str = "float32") -> float:
    """The largest error in units of the spacing at the exact result, where that is a normal number."""
    info = jnp.finfo(dtype)
    spacing = 2.0 ** (np.floor(np.log2(np.maximum(abs(want), float(info.tiny)))) - info.nmant)
    error = abs(np.asarray(got, np.float64) - want) / spacing
    return float(error[abs(want) >= float(info.tiny)].max())


def logits(scale: float | str, rows: int, classes: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    if scale != "dominated":
        return rng.normal(size=(rows, classes)) * scale
    x = rng.normal(size=(rows, classes))
    x[np.arange(rows), rng.integers(0, classes, rows)] += rng.uniform(10, 80, rows)
    return x


# Values.


@pytest.mark.parametrize("offset", [0, 50, -50, 300, -300, 1e4])
@pytest.mark.parametrize("classes", [2, 3, 10, 1000, 32768])
def test_softmax_within_6_ulp_at_logit_scale_30(classes: int, offset: float) -> None:
    # Documented. exp alone has 1, the sum and the product with a reciprocal the rest; measured 5.0.
    x = np.float32(logits(30, max(2, 300_000 // classes), classes) + offset)
    assert ulps(jaxact.softmax(x), exact_value("softmax", x)) <= 6


@pytest.mark.parametrize(
    "row", [[-60.3, 0.3], [-29.7, 0.3, -80.1], [10.3, -30], [92.33687, 5.668205], [0.1, -86.9], [88.7, 1.5]]
)
@pytest.mark.parametrize("padding", [0, 998, 32766])
def test_softmax_of_hard_rows(row: list[float], padding: int) -> None:
    x = np.array(row + [-1e4] * padding, np.float32)  # the padding has probability 0 and must not cost accuracy
    assert ulps(jaxact.softmax(x), exact_value("softmax", x)) <= 6


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


@pytest.mark.parametrize(("dtype", "room"), [("float32", 86), ("float64", 707)])
@pytest.mark.parametrize(("count", "classes"), [(28, 28), (29, 29), (8, 2**15), (2**15, 2**15)])
def test_many_classes_at_a_large_maximum(count: int, classes: int, dtype: str, room: int, x64: None) -> None:
    # Each exponential is up to e^room: 2^15 of them overflow, and 1 over the sum of 8 is not a normal number. Up to 28
    # classes have a shift of their own.
    tops = np.array([room - 2.5, room - 0.5, room, room + 1.5, room + 20, 1e4])
    x = np.full((len(tops), classes), -INF, dtype)
    x[:, :count] = tops[:, None]
    y = np.asarray(jaxact.softmax(x))
    assert ulps(y[:, :count], np.full((len(tops), count), 1 / count), dtype) <= 6  # documented
    assert not y[:, count:].any()
    bound = 2 * float(np.finfo(dtype).eps)  # one rounding of the logarithm, one of the sum
    np.testing.assert_allclose(np.asarray(jaxact.log_softmax(x))[:, :count], -math.log(count), rtol=bound)
    np.testing.assert_allclose(np.asarray(jaxact.logsumexp(x, axis=1)), tops + math.log(count), rtol=bound)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [2, 3, 8, 20, 100])
def test_a_maximum_of_any_size(classes: int, dtype: str, x64: None) -> None:
    # Where numbers are more than 1 apart, the maximum less what an exponent may be is rounded, to one further below.
    tops = np.outer(2.0 ** np.arange(np.finfo(dtype).maxexp - 1), [1, 1.37, 1.999]).reshape(-1, 1)
    alone, all_alike = np.zeros((2, len(tops), classes), dtype)
    alone[:, :1], all_alike[:] = tops, tops
    for x in alone, all_alike:
        assert ulps(jaxact.softmax(x), exact_value("softmax", x), dtype) <= 6  # documented
        assert ulps(jaxact.log_softmax(x), exact_value("log_softmax", x), dtype) <= 12  # documented
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
    assert ulps(jaxact.log_softmax(x), exact_value("log_softmax", x)) <= 12


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
    assert ulps(got, exact_value(name, x), dtype) <= 0.51


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
    assert ulps(f(x), want) <= limit
    assert ulps(compiled, want) <= limit
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


# Derivatives. exp has 1.4 u, so a probability has 6: its exponential, up to 3.6 in the sum, a reciprocal and a product.
# A derivative of log_softmax has one probability, and two roundings, and the pushforward those of a sum; one of softmax
# has two probabilities and two roundings more, and those of a sum in which one class dominates are of one sign.
# Measured over many seeds 8.5, 18.3 and 15.7. In 16-bit types the saved y has 1 u, and the result another.

BOUND = {("log_softmax", "vjp"): 10, ("log_softmax", "jvp"): 20, ("softmax", "vjp"): 20, ("softmax", "jvp"): 20}


@functools.cache
def product(name: str, mode: str) -> Any:
    def along(x: Any, v: Any, where: Any = None) -> Any:
        f = functools.partial(getattr(jaxact, name), where=where)
        return jax.vjp(f, x)[1](v)[0] if mode == "vjp" else jax.jvp(f, (x,), (v,))[1]

    return jax.jit(along)


@functools.cache
def hessian(outer: Any, inner: Any) -> Any:
    return jax.jit(outer(inner(lambda x, g: jnp.vdot(g, jaxact.softmax(x)))))


@BOTH
@pytest.mark.parametrize("shape", [(20_000, 2), (5000, 10), (5000, 20), (400, 100), (600, 1000)])
def test_a_pullback_is_within_8_u_at_logit_scale_30(name: str, shape: tuple[int, int]) -> None:
    # Documented. Nearly everything is then a product of two probabilities, and their sum has few terms; measured 7.5.
    rows, classes = shape
    for seed in range(3):
        x, rng = np.float32(logits(30, rows, classes, seed)), np.random.default_rng(100 + seed)
        normal, some = rng.normal(size=shape), np.eye(classes)[rng.integers(0, classes, rows)]
        for g in (normal, some, np.eye(classes)[x.argmax(-1)], 1000 + normal, np.full(shape, 3.0)):
            want, size = exact_product(name, "vjp", x, np.float32(g))
            got = np.asarray(product(name, "vjp")(x, np.float32(g)), np.float64)
            # Below 2⁻¹⁰⁰ a term that is flushed, of up to 2⁻¹²⁶, is more than 8 u.
            assert (abs(got - want)[size > 2.0**-100] <= 8 * 2.0**-24 * size[size > 2.0**-100]).all(), (seed, g)


@BOTH
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    # From 4096 rows on, there is another formula for the sums and for log_softmax's rule; and one for few classes.
    [
        ("float32", (600, 1000)),
        ("float32", (5000, 100)),
        ("float32", (5000, 10)),
        ("bfloat16", (600, 1000)),
        ("float16", (600, 1000)),
    ],
)
@pytest.mark.parametrize("scale", [1, 10, 30, "dominated"])
def test_each_element_of_a_derivative_of_many_classes(
    name: str, mode: str, dtype: str, shape: tuple[int, int], scale: float | str
) -> None:
    # Of few rows test_rules.py verifies the whole Jacobian.
    bound_in_u = BOUND[name, mode] if dtype == "float32" else 4
    rows, classes = shape
    x = jnp.asarray(logits(scale, rows, classes, seed=0), dtype)
    rng = np.random.default_rng(1)
    normal, hot = rng.normal(size=x.shape), np.eye(classes)[rng.integers(0, classes, len(x))]
    y, *_ = parts(x)
    for v in (normal, hot, np.eye(classes)[np.asarray(x).argmax(-1)], 1000 + normal, np.full(x.shape, 3.0)):
        v = jnp.asarray(v, dtype)
        want, bound = exact_product(name, mode, x, v)
        got = product(name, mode)(x, v)
        assert got.dtype == x.dtype
        # Of y, of each product and of the result, whatever lies below the smallest number is lost.
        size = np.max(abs(np.asarray(v, np.float64)))
        lost = LOST[dtype] * (1 + 4 * size + y * classes * size)
        allowed = bound_in_u * UNIT[dtype] * bound + lost
        fits = abs(want) <= float(jnp.finfo(dtype).max)
        error = abs(np.asarray(got, np.float64) - want)
        assert (error <= allowed)[fits].all(), np.max((error / allowed)[fits])


@pytest.mark.parametrize("scale", [1, 10, "dominated"])
def test_hessians_of_softmax_in_every_nesting_of_modes(scale: float | str) -> None:
    # diag(z) − z yᵀ − y zᵀ with z = Jᵀg: a product of three probabilities and a few sums, 32 u of the magnitudes of
    # these terms, which can cancel.
    g = np.array([1.5, -0.7, 0.3, 2.0], np.float32)
    for x in logits(scale, 20, 4, seed=3).astype(np.float32):
        y, *_ = parts(x)
        z, size = exact_product("softmax", "vjp", x, g)
        want = np.diag(z) - np.outer(z, y) - np.outer(y, z)
        bound = np.diag(size) + np.outer(size, y) + np.outer(y, size)
        for outer in (jax.jacfwd, jax.jacrev):
            for inner in (jax.jacfwd, jax.jacrev):
                got = np.asarray(hessian(outer, inner)(x, g), np.float64)
                assert (abs(got - want) <= 32 * 2**-24 * bound + 8 * LOST["float32"]).all(), (x, got, want)


@BOTH
def test_reverse_mode_keeps_one_array(name: str) -> None:
    x = jnp.ones((8, 16))
    kept: list[Any] = [aval for aval, _ in saved_residuals(lambda x: getattr(jaxact, name)(x), x)]
    # The rest is one number a row at most.
    assert [aval.shape for aval in kept if aval.size > 8] == [(8, 16)]


# Policies.


@functools.cache
def masked_hessian(name: str) -> Any:
    f = getattr(jaxact, name)
    return jax.jit(jax.hessian(lambda x, g, mask: jnp.where(mask, f(x, where=mask), 0) @ g))


@BOTH
@pytest.mark.parametrize("rubbish", [NAN, INF, -INF, 1e38, -1e38, 100.0])
def test_a_masked_entry_leaves_no_trace(name: str, rubbish: float) -> None:
    f = getattr(jaxact, name)
    mask = np.array([True, False, True, True])
    x, g = np.array([[1.0, rubbish, -2.0, 0.5], [0.3, 7.0, -1.0, 2.0]], np.float32)
    short = x[mask]
    absent = 0.0 if name == "softmax" else -INF

    def close(got: Any, want: Any) -> None:
        # The same sums over one more 0: a few roundings of numbers of size 1.
        np.testing.assert_allclose(np.asarray(got)[mask], want, rtol=8 * 2**-23, atol=8 * 2**-24)

    value = np.asarray(f(x, where=mask))
    assert value[1] == absent
    close(value, f(short))
    for mode in ("vjp", "jvp"):
        for v in (g, np.where(mask, g, np.float32(NAN))):
            got = product(name, mode)(x, v, mask)
            assert got.tolist()[1] == 0
            close(got, product(name, mode)(short, g[mask]))
    second = np.asarray(masked_hessian(name)(x, g, mask))
    assert not second[1].any()
    assert not second[:, 1].any()
    assert np.isfinite(second).all()
    np.testing.assert_array_equal(np.asarray(f(np.stack([x, x]), where=mask)), np.stack([value, value]))


@BOTH
def test_minus_infinity_is_masked(name: str) -> None:
    f = getattr(jaxact, name)
    x, mask = jnp.array([1.0, -INF, -2.0]), jnp.array([True, False, True])
    g = jnp.array([0.3, 7.0, -1.0])
    for run in (lambda f: f(x), lambda f: jax.vjp(f, x)[1](g)[0], lambda f: jax.jvp(f, (x,), (g,))[1]):
        np.testing.assert_array_equal(np.asarray(run(f)), np.asarray(run(lambda x: f(x, where=mask))))


@BOTH
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_row_without_classes(name: str, temperature: float) -> None:
    rows = np.array([[-INF, -INF], [NAN, 3.0], [0.0, 0.0]], np.float32)
    where = np.array([[True, True], [False, False], [True, True]])
    f = functools.partial(getattr(jaxact, name), where=where, temperature=temperature)
    assert f(rows)[:2].tolist() == [[0.0, 0.0] if name == "softmax" else [-INF, -INF]] * 2
    g = np.array([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]], np.float32)

    @jax.jit
    def derivatives(rows: Any, g: Any, t: Any) -> Any:
        def by_temperature(x: Any, mask: Any) -> Any:
            return jax.grad(lambda t: getattr(jaxact, name)(x, where=mask, temperature=t)[0])(t)

        first = jax.vjp(f, rows)[1](g)[0], jax.jvp(f, (rows,), (g,))[1]
        second = jax.hessian(lambda rows: jnp.where(rows == 0, f(rows), 0).sum())(rows)
        return first, second, [by_temperature(x, mask) for x, mask in zip(rows[:2], where[:2], strict=True)]

    first, second, slopes = derivatives(rows, g, temperature)
    for derivative in map(np.asarray, first):
        assert derivative[:2].tolist() == [[0.0, 0.0]] * 2
        assert derivative[2].all()
    assert np.isfinite(second).all()
    assert slopes == [0, 0]


SPECIAL = [
    ([INF, 1.0, -INF], [1.0, 0.0, 0.0]),
    ([INF, 1.0, INF, INF, INF], [0.25, 0.0, 0.25, 0.25, 0.25]),
    ([INF, LARGEST], [0.5, 0.5]),
    ([INF, 1e38], [1.0, 0.0]),
    ([NAN, 1.0], [NAN, NAN]),
    ([NAN, INF], [NAN, NAN]),
    ([NAN, -INF], [NAN, NAN]),
    ([LARGEST, -LARGEST], [1.0, 0.0]),
    ([LARGEST, LARGEST], [0.5, 0.5]),
    ([-LARGEST, -LARGEST, -LARGEST, -LARGEST], [0.25] * 4),
    ([1e38, -1e38, 1e38], [0.5, 0.0, 0.5]),
    ([-LARGEST, -INF], [1.0, 0.0]),
    ([-0.0, 0.0], [0.5, 0.5]),
    ([5.0], [1.0]),
    ([NAN], [NAN]),
    ([INF], [1.0]),
]


@pytest.mark.parametrize("shape", [(1, 2), (3, 40), (5000, 3), (5000, 20)])  # each has a formula of its own
def test_the_least_number_is_a_logit_like_others(shape: tuple[int, int]) -> None:
    # Many use it to mask. Unlike that of -inf, its log-probability is finite, and follows the logit.
    x, g = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    x[:, 1], g[:, 1] = -LARGEST, 3
    products = jax.jit(
        lambda x, g: (jax.vjp(jaxact.log_softmax, x)[1](g)[0], jax.jvp(jaxact.log_softmax, (x,), (g,))[1])
    )
    loss = jax.jit(jax.grad(lambda x, q: jaxact.losses.softmax_cross_entropy(x, q).sum()))
    others = shape[1] - 1
    pull, push = products(x, g)
    slope = loss(x, g / (others + 3))
    close = 8 * 2.0**-24  # sums of at most 39 ones are exact, and there are some products and quotients
    np.testing.assert_allclose(pull, np.where(x < 0, 3, 1 - (others + 3) / others), atol=4 * close)
    np.testing.assert_allclose(push, np.where(x < 0, 2, 0), atol=4 * close)
    np.testing.assert_allclose(slope, np.where(x < 0, 0, 1 / others) - g / (others + 3), atol=close)


@jax.jit
def gradients_of_the_first(rows: Any) -> list[Any]:
    return [jax.grad(lambda x, f=f: f(x)[:, 0].sum())(rows) for f in (jaxact.softmax, jaxact.log_softmax)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("x", "want"), SPECIAL)
def test_special_values(x: list[float], want: list[float], temperature: float) -> None:
    # A power of 2 as a share is exact, and so is its logarithm after rounding, to half an ulp of log1p.
    run = jax.jit(jaxact.softmax)
    np.testing.assert_array_equal(np.asarray(run(jnp.array(x), temperature=temperature)), np.array(want, np.float32))
    rows = np.array([x, [0.0] * len(x)], np.float32)
    assert not np.isnan(np.asarray(jaxact.softmax(rows))[1]).any()  # a nan stays in its row
    with np.errstate(divide="ignore"):
        log = np.log(np.array(want, np.float64))
    got = np.asarray(jaxact.log_softmax(rows, temperature=temperature))
    finite = np.array(want) != 0
    np.testing.assert_allclose(got[0][finite], log[finite], rtol=2 * 2**-23)
    assert (got[0][~finite] <= -1e37).all()  # −inf, or the difference of the logits where that is a number
    assert not np.isnan(got[1]).any()
    for gradient in map(np.asarray, gradients_of_the_first(rows)):
        assert np.isnan(gradient[0]).all() == np.isnan(want).all()
        assert np.isfinite(gradient[1]).all()


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_ties(name: str, dtype: str, count: int) -> None:
    f = getattr(jaxact, name)
    x = jnp.asarray([2.5] * count, dtype)
    want = exact_value(name, x)
    assert ulps(f(x), want, dtype) <= (0.51 if dtype != "float32" else 2)  # e/Σ, two roundings and a reciprocal's
    exact, bound = exact_product(name, "vjp", x, np.eye(count)[0])
    got = np.asarray(product(name, "vjp")(x, jnp.asarray(np.eye(count)[0], dtype)), np.float64)
    bound_in_u = BOUND[name, "vjp"] if dtype == "float32" else 4
    assert (abs(got - exact) <= bound_in_u * UNIT[dtype] * bound).all()
    assert len(set(got[1:].tolist())) == 1


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("count", [2, 3])
def test_ties_at_every_height(count: int, rows: int) -> None:
    # Each of the exponentials, in the sum and by itself, has its own rounding; none may make one of the classes vanish.
    log_softmax = jax.jit(jaxact.log_softmax)
    for height in np.random.default_rng(0).uniform(-400, 400, 300):
        x = np.full((rows, count), height, np.float32)
        assert ulps(log_softmax(x), np.full(x.shape, -np.log(count))) <= 2  # as above


# Temperature.


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
    allowed = 2**-24 * (24 * abs(want) + 2 * error) + LOST["float32"]
    for got in (f(x, temperature=temperature), jax.jit(lambda x, t: f(x, temperature=t))(x, temperature)):
        assert (abs(np.asarray(got, np.float64) - want) <= allowed).all()


def test_temperature_limits() -> None:
    x = jnp.array([[1.0, 3.0, -2.0], [5.0, 4.9, 4.0]])
    assert jaxact.softmax(x, temperature=1e-6).tolist() == [[0, 1, 0], [1, 0, 0]]
    np.testing.assert_allclose(
        np.asarray(jaxact.softmax(x, temperature=1e30)), 1 / 3, rtol=2 * 2**-23
    )  # three roundings
    assert jax.grad(lambda t: jaxact.softmax(x[0], temperature=t)[0])(1e-6) == 0
    one_class = x[:, :1]
    traced = jax.jit(lambda x, t: [f(x, temperature=t) for f in (jaxact.softmax, jaxact.log_softmax)])
    for bad in (0.0, -1.0, NAN):
        assert np.isnan(traced(x, bad)).all()
        assert np.isnan(traced(one_class, bad)).all()
    assert np.asarray(traced(one_class, 0.3)).tolist() == [[[1], [1]], [[0], [0]]]


@BOTH
@mpmath.workdps(60)
def test_derivatives_in_temperature_against_mpmath(name: str, x64: None) -> None:
    # float64, 64 roundings of terms that cancel by a factor below 100; differences in mpmath have 30 digits.
    x, g = [0.3, -1.7, 2.2, 4.0], [1.0, -0.3, 0.7, 2.0]

    def exact(t: Any, x0: Any) -> Any:
        z = [a / t for a in [x0, *x[1:]]]
        total = mpmath.fsum(map(mpmath.exp, z))
        return mpmath.fsum(
            b * (mpmath.exp(a) / total if name == "softmax" else a - mpmath.log(total))
            for a, b in zip(z, g, strict=True)
        )

    def f(t: Any, x0: Any) -> Any:
        return jnp.array(g) @ getattr(jaxact, name)(jnp.concatenate([x0[None], jnp.array(x[1:])]), temperature=t)

    at = (jnp.array(0.8), jnp.array(x[0]))
    want = {order: float(mpmath.diff(exact, (0.8, x[0]), order)) for order in [(1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]}
    for outer, inner in ((jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd)):
        of_first = inner(f, (0, 1))
        first, second = jax.jit(lambda *at, of=of_first, mode=outer: (of(*at), mode(of, (0, 1))(*at)))(*at)
        got = [*first, second[0][0], second[0][1], second[1][1]]
        np.testing.assert_allclose(
            np.array(got), [want[k] for k in [(1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]], rtol=1e-12
        )


def test_the_derivative_of_a_probability_that_float16_does_not_hold() -> None:
    # The cotangent may be as large as this where the loss is scaled so that gradients do not vanish.
    for classes, rows in ((2, 1), (2, 300), (40, 5)):
        for a in (5.0, 17.0, 18.0, 20.0):
            x = np.zeros((rows, classes), np.float16)
            x[:, 0] = a
            g = jnp.asarray(np.where(x == 0, np.float16(1e4), x * 0))
            got = np.asarray(jax.vjp(jaxact.softmax, x)[1](g)[0], np.float64)
            rest = (classes - 1) / (np.exp(a) + classes - 1)
            # Rounded once, to float16, whose least number is 2⁻²⁴.
            want = 1e4 * (1 - rest) * rest
            np.testing.assert_allclose(got[:, 0], -want, rtol=1.01 * 2.0**-11, atol=2.0**-25)
            want /= classes - 1
            np.testing.assert_allclose(got[:, 1:], want, rtol=1.01 * 2.0**-11, atol=2.0**-25)


# Errors, and several devices.


@BOTH
def test_bad_arguments_raise_and_are_named(name: str) -> None:
    f, x = getattr(jaxact, name), jnp.zeros((2, 3))
    for bad in (
        jnp.zeros(2, jnp.complex64),
        1j,
        "logits",
        [1.0, 2.0],
        None,
        np.array("a"),
        jnp.ones(2, "float8_e4m3fn"),
    ):
        with pytest.raises(TypeError, match=r"^x must be"):
            f(bad)
    with pytest.raises(TypeError, match="where must be boolean"):
        f(x, where=jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"where must broadcast .*\(2, 3\).*\(2,\)"):
        f(x, where=jnp.ones(2, bool))
    for axis in (2, -3, (0, 5)):
        with pytest.raises(ValueError, match=r"axis=.* is out of range"):
            f(x, axis=axis)
    with pytest.raises(ValueError, match="axis=-1 is out of range"):
        f(jnp.float32(1))
    with pytest.raises(ValueError, match=r"axis=\(1, -1\) names an axis twice"):
        f(x, axis=(1, -1))
    np.testing.assert_array_equal(f(x, axis=[0, 1]), f(x, axis=(0, 1)))  # as jax.nn has it
    for no_axis in (1.5, "1", (0, 0.5), [0.5], np.zeros(2)):
        with pytest.raises(TypeError, match="axis must be an int"):
            f(x, axis=no_axis)
    for temperature in (0, 0.0, -1.0, INF, NAN, jnp.float32(-2), jnp.array([1.0]), np.ones(3)):
        with pytest.raises(ValueError, match="temperature must be"):
            f(x, temperature=temperature)


@BOTH
def test_sharded_over_the_batch(name: str) -> None:
    f = getattr(jaxact, name)
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.float32(logits(3, 4, 5)))

    def both(f: Any) -> Any:
        return lambda x: (f(x), jax.grad(lambda x: f(x)[:, 0].sum())(x))

    want = both(f)(x)
    sharded = jax.device_put(x, NamedSharding(mesh, P("batch")))
    inside = jax.shard_map(f, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
    for g in (f, inside):
        # One device computes the same, but may fuse otherwise: a few roundings of numbers up to 20.
        value, gradient = jax.jit(both(g))(sharded)
        np.testing.assert_allclose(np.asarray(value), want[0], rtol=12 * 2**-23)
        np.testing.assert_allclose(np.asarray(gradient), want[1], rtol=12 * 2**-23, atol=24 * 2**-24)
