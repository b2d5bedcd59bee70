"""What softmax and log_softmax do with masks, infinities, nan, rows without classes, bad arguments and devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from softmax_oracle import logits
from test_softmax_derivatives import product

import jaxact

INF, NAN = float("inf"), float("nan")
BOTH = pytest.mark.parametrize("name", ["softmax", "log_softmax"])
LARGEST = float(np.finfo(np.float32).max)


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
