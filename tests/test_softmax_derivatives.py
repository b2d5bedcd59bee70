"""Derivatives of softmax and log_softmax against float64 and mpmath, element by element."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals
from oracles import worst_ulp
from softmax_oracle import exact_product, exact_value, logits, parts

import jaxact
from jaxact import losses

BOTH = pytest.mark.parametrize("name", ["softmax", "log_softmax"])
NARROW = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
# The unit roundoff u; and the size of what may be lost to underflow: XLA flushes subnormal float32 to 0, and float16
# has subnormals, 2^-24 apart.
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-53}
LOST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-25, "float64": 2.0**-1022}
# exp has 1.4 u, so a probability has 6: its exponential, up to 3.6 in the sum, a reciprocal and a product.
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


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("shape", [(1, 2), (50, 3), (200, 5), (250, 8), (100, 40), (5000, 100), (70_000, 8)])
def test_a_derivative_along_a_product(name: str, shape: tuple[int, int]) -> None:
    """XLA may contract it with what is subtracted from it, in one place and not in another."""
    rows, classes = shape
    f = getattr(jaxact, name)
    along = {
        "vjp": jax.jit(lambda x, v: jax.vjp(f, x)[1](2.3 * v)[0]),
        "jvp": jax.jit(lambda x, v: jax.jvp(f, (x,), (2.3 * v,))[1]),
    }
    for lead in (15, 40):  # above the others, and then above what they can be seen beside
        rng = np.random.default_rng(lead)
        leading = np.eye(classes)[rng.integers(0, classes, rows)]
        x, normal = np.float32(rng.normal(size=shape) + lead * leading), np.float32(rng.normal(size=shape))
        for v in (normal, np.float32(np.eye(classes)[x.argmax(-1)])):
            for mode, product in along.items():
                want, size = exact_product(name, mode, x, np.float32(2.3) * v)
                got = np.asarray(product(x, v), np.float64)
                small = size <= 2.0**-100  # as above
                bound = BOUND[name, mode] * 2.0**-24 * size  # measured 8.1
                assert (small | (abs(got - want) <= bound)).all(), (lead, mode)


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


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_ties(name: str, dtype: str, count: int) -> None:
    f = getattr(jaxact, name)
    x = jnp.asarray([2.5] * count, dtype)
    want = exact_value(name, x)
    assert worst_ulp(f(x), want, dtype) <= (0.51 if dtype != "float32" else 2)  # e/Σ, two roundings and a reciprocal's
    exact, bound = exact_product(name, "vjp", x, np.eye(count)[0])
    got = np.asarray(product(name, "vjp")(x, jnp.asarray(np.eye(count)[0], dtype)), np.float64)
    bound_in_u = BOUND[name, "vjp"] if dtype == "float32" else 4
    assert (abs(got - exact) <= bound_in_u * UNIT[dtype] * bound).all()
    assert len(set(got[1:].tolist())) == 1


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


SECOND = {
    "logsumexp": lambda x, y: jaxact.logsumexp(x, -1),
    "integer labels": losses.softmax_cross_entropy_with_integer_labels,
    "soft labels": lambda x, y: losses.softmax_cross_entropy(x, jax.nn.one_hot(y, x.shape[-1])),
    "head": lambda x, y: jaxact.linear_cross_entropy(x, jnp.eye(x.shape[-1]), y, reduction="none"),
}


# Numbers of rows and classes for which the total is found in different ways.
@pytest.mark.parametrize("shape", [(64, 40), (1024, 3), (40, 300)])
@pytest.mark.parametrize("name", SECOND)
def test_a_second_derivative_at_a_class_that_takes_everything(name: str, shape: tuple[int, int]) -> None:
    # With o the sum of the others' e^{x − m}, ∂²f/∂m² = o/(1 + o)², some 1e-20. It is ε² where the probability is not
    # 1 but 1 − ε. Tolerance: 8 u, for an exponential, the sum and six products; and where m itself is taken off the
    # logits, as in the head, 32 more: half an ulp of 50.
    x = np.zeros(shape, np.float32)
    x[:, 0] = np.random.default_rng(0).uniform(0, 20, shape[0])
    x[:, 1:] = x[:, :1] - 50
    others = (shape[1] - 1) * np.exp(x[:, 1].astype(float) - x[:, 0])
    v = np.zeros_like(x)
    v[:, 0] = 1
    labels, bound = np.ones(shape[0], int), 40 if name == "head" else 8

    @jax.jit
    def along(x: Any) -> Any:
        return jax.jvp(jax.grad(lambda x: SECOND[name](x, labels).sum()), (x,), (v,))[1]

    np.testing.assert_allclose(np.asarray(along(x))[:, 0], others / (1 + others) ** 2, rtol=bound * UNIT["float32"])


@pytest.mark.long
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


@BOTH
def test_reverse_mode_keeps_one_array(name: str) -> None:
    x = jnp.ones((8, 16))
    kept: list[Any] = [aval for aval, _ in saved_residuals(lambda x: getattr(jaxact, name)(x), x)]
    # The rest is one number a row at most.
    assert [aval.shape for aval in kept if aval.size > 8] == [(8, 16)]
