"""logsumexp: a full replacement for jax.nn.logsumexp, with the values and derivatives that that one loses."""

import functools
import itertools
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracles
import pytest

import jaxact
from jaxact import verify

INF, NAN = float("inf"), float("nan")


@mpmath.workdps(60)
def test_values_against_mpmath() -> None:
    # m + log1p(Σ of others): both are rounded to an ulp or two of themselves, and log1p's argument, where it is a
    # difference, to 5 times 2 ulp. Where m cancels log1p no relative accuracy is to be had.
    rows = (np.random.default_rng(0).normal(size=(300, 5)) * 10).astype(np.float32)
    others = [[0.0, -20.0], [0.0, -80.0], [70.0, 0.0], [300.0, 300.0], [-300.0, -301.0], [1e30, 0.0]]
    for values in rows.tolist() + others:
        row = np.array(values, np.float32)
        want = mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(float(v))) for v in row))
        got = float(jaxact.logsumexp(row))
        rest = want - mpmath.mpf(float(np.max(row)))
        assert abs(got - want) <= 2**-23 * float(2 * abs(np.max(row)) + 12 * rest), row
    assert abs(float(jaxact.logsumexp(jnp.array([0.0, -20.0]))) / np.log1p(np.exp(-20.0)) - 1) <= 4 * 2**-23


@mpmath.workdps(60)
def test_float64_against_mpmath(x64: None) -> None:
    for row in np.random.default_rng(1).normal(size=(20, 4)) * 10:
        want = mpmath.log(mpmath.fsum(map(mpmath.exp, row.tolist())))
        got = jaxact.logsumexp(jnp.asarray(row))
        assert got.dtype == jnp.float64
        # As in float32.
        assert abs(float(got) - want) <= 2**-52 * float(2 * abs(row.max()) + 12 * abs(want - row.max()))


LONG = pytest.mark.long
SIGNED = np.array([[[1.5, -0.5, 0.0, 2.0]], [[-3.0, 1.0, 0.5, -0.25]]], np.float32)
MASK = np.array([[True], [False], [True]])


@pytest.mark.parametrize("axis", [None, -1, (0, 2), *(pytest.param(a, marks=LONG) for a in (0, (-1, 1), (0, 1, 2)))])
@pytest.mark.parametrize("keepdims", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_agrees_with_jax_nn_on_ordinary_inputs(axis: Any, keepdims: bool) -> None:
    # Both have the relative error of a sum of up to 24 numbers, some negative: a few u of Σ|b e^a|, and with these
    # weights |Σ| is no less than a hundredth of that. jax.nn has no more to lose where no term dominates.
    a = np.float32(np.random.default_rng(2).normal(size=(2, 3, 4)))
    cases = list(itertools.product([None, 2.0, SIGNED], [None, MASK], [False, True]))

    @jax.jit  # one program for all of them
    def run(a: Any) -> list[Any]:
        results = []
        for b, where, return_sign in cases:
            arguments: dict[str, Any] = {"axis": axis, "keepdims": keepdims, "return_sign": return_sign, "where": where}
            if b is not None:
                arguments["b"] = np.broadcast_to(np.float32(b), a.shape)
            results.append((jaxact.logsumexp(a, **arguments), jax.nn.logsumexp(a, **arguments)))
        return results

    for (_, _, return_sign), (got, want) in zip(cases, run(a), strict=True):
        assert isinstance(got, tuple) == return_sign
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert (g.shape, g.dtype) == (w.shape, w.dtype)
            np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=1e-5, atol=100 * 8 * 2**-24)


def test_positional_arguments_broadcasting_and_promotion() -> None:
    a, b = jnp.zeros((3, 1)), jnp.ones((1, 4))
    out = jaxact.logsumexp(a, 1, b, True, False, None)
    assert out.shape == (3, 1)
    np.testing.assert_allclose(np.asarray(out), np.log(4), rtol=2 * 2**-23)  # log and the sum
    assert jaxact.logsumexp(jnp.array([1, 2])).dtype == jnp.float32
    assert jaxact.logsumexp(jnp.array([True, False])).dtype == jnp.float32
    assert jaxact.logsumexp(jnp.zeros(2, jnp.bfloat16), b=jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
    assert jaxact.logsumexp(3.0).tolist() == 3.0
    assert jaxact.logsumexp(jnp.array([2.0, 5.0]), axis=()).tolist() == [2.0, 5.0]


@pytest.mark.parametrize(("dtype", "nmant"), [("bfloat16", 7), ("float16", 10)])
def test_16_bit_results_are_rounded_once(dtype: str, nmant: int) -> None:
    # Half an ulp, and float32's own error: 2^-10 ulp here, and more where m cancels log1p.
    a = jnp.asarray(np.random.default_rng(3).normal(size=(500, 9)) * 3, dtype)
    want = oracles.logsumexp(np.asarray(a, np.float64))
    ulp = 2.0 ** (np.floor(np.log2(abs(want))) - nmant)
    got = jaxact.logsumexp(a, axis=-1)
    assert got.dtype == a.dtype
    assert (abs(np.asarray(got, np.float64) - want) <= 0.51 * ulp + 2**-22).all()


# First derivatives are verified in test_rules.py, and second ones where no term dominates.


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_hessian_in_every_mode(inner: Any, outer: Any) -> None:
    # diag(p) − p pᵀ by 16 u of each element's magnitudes.
    hessian = jax.jit(outer(inner(jaxact.logsumexp)))
    rows = np.random.default_rng(4).normal(size=(5, 4)) * [[1], [3], [10], [20], [30]]
    for row in rows.astype(np.float32):
        e = np.exp(np.float64(row) - row.max())
        k = e.argmax()
        p = e / e.sum()
        rest = np.where(np.arange(4) == k, np.delete(e, k).sum() / e.sum(), 1 - p)
        want = np.where(np.eye(4) == 1, p * rest, -np.outer(p, p))
        np.testing.assert_allclose(np.asarray(hessian(row)), want, rtol=24 * 2**-24, atol=2**-124)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_weighted_second_derivatives(inner: Any, outer: Any) -> None:
    # With ∂/∂aᵢ = bᵢ e^{aᵢ}/Σ and ∂/∂bᵢ = e^{aᵢ}/Σ they are −(∂)(∂), and the diagonal, whose terms cancel where one of
    # them is near 1: elements below 1 with an absolute error. e^{a − out} has the error of `out`, a few ulp of numbers
    # below 4, so 32 u each.
    a, b = np.array([[0.5, -1.0, 2.0, 1.0], [1.0, 0.0, 2.0, -0.5]], np.float32)
    e = np.exp(np.float64(a))
    total = (b * e).sum()
    da, db = b * e / total, e / total
    got = jax.jit(outer(inner(lambda a, b: jaxact.logsumexp(a, b=b), (0, 1)), (0, 1)))(a, b)
    want = {(0, 0): np.diag(da) - np.outer(da, da), (0, 1): np.diag(db) - np.outer(da, db), (1, 1): -np.outer(db, db)}
    for (i, j), element in want.items():
        np.testing.assert_allclose(np.asarray(got[i][j]), element, rtol=0, atol=64 * 2**-24)


def test_negative_and_zero_sums() -> None:
    a = jnp.array([0.0, 1.0])
    assert jnp.isnan(jaxact.logsumexp(a, b=jnp.array([1.0, -1.0])))
    value, sign = jaxact.logsumexp(a, b=jnp.array([1.0, -1.0]), return_sign=True)
    np.testing.assert_allclose(float(value), np.log(np.e - 1), rtol=8 * 2**-23)  # a difference of twice its size
    assert sign == -1
    for b in ([1.0, -1.0], [0.0, 0.0]):
        value, sign = jaxact.logsumexp(jnp.ones(2), b=jnp.array(b), return_sign=True)
        assert (float(value), float(sign)) == (-INF, 0.0)
        for argument in (0, 1):
            f = lambda a, b: jaxact.logsumexp(a, b=b)  # noqa: E731
            for jacobian in (jax.jacrev, jax.jacfwd):
                assert jacobian(f, argument)(jnp.ones(2), jnp.array(b)).tolist() == [0, 0]
    # An exponent without a weight does not count, however large.
    assert jaxact.logsumexp(jnp.array([1e30, INF, NAN, 0.5])[:2], b=jnp.zeros(2)) == -INF
    assert jaxact.logsumexp(jnp.array([1e30, 0.5]), b=jnp.array([0.0, 1.0])) == 0.5


@functools.partial(jax.jit, static_argnames="i")
def derivatives(a: Any, b: Any, where: Any = None, i: int = 0) -> list[tuple[Any, ...]]:
    """In argument i, in reverse and in forward mode: the first; and the second, of the gradient and by `jacfwd`."""

    def f(a: Any, b: Any) -> Any:
        return jaxact.logsumexp(a, b=b, where=where)

    return [
        (run(f, i)(a, b), run(jax.grad(f, i), i)(a, b), jax.jacfwd(run(f, i), i)(a, b))
        for run in (jax.jacrev, jax.jacfwd)
    ]


@pytest.mark.parametrize("weighted", [False, True])
def test_special_values(weighted: bool) -> None:
    for a, want, gradient in [
        ([-INF, -INF], -INF, [0.0, 0.0]),
        ([INF, 1.0], INF, [1.0, 0.0]),
        ([INF, INF], INF, [0.5, 0.5]),
        ([INF, -INF], INF, [1.0, 0.0]),
        ([NAN, 1.0], NAN, [NAN, NAN]),
        ([-INF, 3.0], 3.0, [0.0, 1.0]),
        ([3e38, -3e38], 3e38, [1.0, 0.0]),
        ([], -INF, []),
    ]:
        x = np.array(a, np.float32)
        value = jaxact.logsumexp(x, b=np.ones_like(x) if weighted else None)
        np.testing.assert_array_equal(np.asarray(value), np.float32(want))
        for first, *seconds in derivatives(x, np.ones_like(x) if weighted else None):
            np.testing.assert_array_equal(np.asarray(first), np.array(gradient, np.float32))
            if NAN not in a:  # p(1 − p) and −pq, of probabilities that are 0 or share a limit
                due = np.diag(gradient) - np.outer(gradient, gradient)
                if INF in a and weighted:  # the shares are constant
                    due = np.zeros_like(due)
                for second in seconds:
                    np.testing.assert_array_equal(np.asarray(second), np.float32(due))
    rows = jaxact.logsumexp(jnp.array([[NAN, 0.0], [1.0, -INF]]), axis=1)
    assert jnp.isnan(rows).tolist() == [True, False]


@pytest.mark.parametrize("rubbish", [NAN, INF, -INF, 1e38])
@pytest.mark.parametrize("weight", [1.0, NAN, INF])
def test_a_masked_term_leaves_no_trace(rubbish: float, weight: float) -> None:
    where = np.array([True, False, True])
    a, b = np.array([0.5, rubbish, -1.0], np.float32), np.array([2.0, weight, -0.5], np.float32)
    want = np.log(2 * np.exp(0.5) - 0.5 * np.exp(-1.0))
    got = jaxact.logsumexp(a, b=b, where=where)
    np.testing.assert_allclose(float(got), want, rtol=8 * 2**-23)  # log of a sum that loses little
    np.testing.assert_allclose(float(jaxact.logsumexp(a, where=where)), np.logaddexp(0.5, -1.0), rtol=4 * 2**-23)
    for argument in (0, 1):
        for first, *seconds in derivatives(a, b, where, argument):
            gradient = np.asarray(first)
            assert gradient[1] == 0
            assert np.isfinite(gradient).all()
            assert gradient[0] != 0
            assert np.isfinite(seconds).all()


def test_bad_arguments_raise_and_are_named() -> None:
    f: Any = jaxact.logsumexp
    x = jnp.zeros((2, 3))
    for bad in (1j, [1.0], None, "a"):
        with pytest.raises(TypeError, match=r"a must be"):
            f(bad)
    with pytest.raises(TypeError, match="b must be real"):
        jaxact.logsumexp(x, b=jnp.ones(3, jnp.complex64))
    with pytest.raises(TypeError, match="b must be a float of at least 16 bits"):
        jaxact.logsumexp(x, b=jnp.ones(3, "float8_e5m2"))
    with pytest.raises(TypeError, match="b must be real"):
        jaxact.logsumexp(x, b=jax.random.key(0))
    with pytest.raises(ValueError, match=r"b must broadcast .*\(2, 3\).*\(2,\)"):
        jaxact.logsumexp(x, b=jnp.ones(2))
    with pytest.raises(TypeError, match="where must be boolean"):
        jaxact.logsumexp(x, where=jnp.ones(3))
    with pytest.raises(ValueError, match="where must broadcast"):
        jaxact.logsumexp(x, where=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="axis=2 is out of range"):
        jaxact.logsumexp(x, axis=2)
    with pytest.raises(TypeError, match="axis must be an int"):
        f(x, axis=0.5)


@pytest.mark.parametrize(("dtype", "offset"), [("bfloat16", 1000), ("float16", 100), ("float32", 1e5)])
def test_a_large_offset_with_weights_leaves_the_gradient_exact(dtype: str, offset: float) -> None:
    # It is e^{a − out}, and out is rounded by as much as 4.
    got = jax.grad(lambda a: jaxact.logsumexp(a, b=np.ones(3, dtype)))(np.full(3, offset, dtype))
    # A third, as rounded once; float32 has a few roundings of its own.
    np.testing.assert_allclose(got, np.full(3, 1 / 3).astype(got.dtype), rtol=4 * 2**-24 * (dtype == "float32"))


@pytest.mark.parametrize("others", [[50.0], [33.0, 70.0], [-3.0, 87.0]])
def test_a_weight_of_0_has_the_derivative_of_the_gradient_too(others: list[float]) -> None:
    # ∂²/∂aᵢ∂bⱼ at b = (1, 0, …) is δᵢⱼ e^{aⱼ} but in the first row, that of the one weight: −e^{aⱼ} there.
    a, b = np.array([0, *others], np.float32), np.array([1] + [0] * len(others), np.float32)
    e = np.exp(np.array(others, np.float64))
    want = np.column_stack([np.zeros(len(b)), np.vstack([-e, np.diag(e)])])

    @jax.jit
    def derivatives(a: Any, b: Any) -> Any:
        def f(a: Any, b: Any) -> Any:
            return jaxact.logsumexp(a, b=b)

        mixed = [outer(jax.grad(f, i), 1 - i)(a, b) for i in (0, 1) for outer in (jax.jacfwd, jax.jacrev)]
        return mixed, jax.jvp(lambda b: jax.grad(f)(a, b), (b,), (1 - b,))[1]

    (*by_weight, along_a, back_a), along = derivatives(a, b)
    for got in (*by_weight, along_a.T, back_a.T):
        np.testing.assert_allclose(got, want, rtol=8 * 2**-24)  # e^a, whose argument is exact
    np.testing.assert_allclose(along, want[:, 1:].sum(1), rtol=8 * 2**-24)


@pytest.mark.long
def test_the_weighted_rule_is_the_derivative_of_what_it_computes() -> None:
    # Without a reference: who checks a loss of their own that has weights in it gives none. One weight is 0.
    a = jnp.array([[30, 0, -5, 1, 2], [0.5, -1.25, 2, 0.75, -3], [-4, 6, 1, 5.5, 3]], jnp.float32)
    b = jnp.array([[1, 2, 0.5, 1, 1], [0.5, -0.25, 2, 1, 3], [1, 1, 0, 3, 0.5]], jnp.float32)
    report = verify.rule(lambda a, b: jaxact.logsumexp(a, -1, b), a, b, transforms=("jit",))
    assert report, str(report)


def test_the_types_are_those_that_return_sign_asks_for() -> None:
    a = jnp.array([0.0, -20.0])
    assert isinstance(assert_type(jaxact.logsumexp(a, 0), jax.Array), jax.Array)  # held by the type checker as well
    out, sign = assert_type(jaxact.logsumexp(a, return_sign=True), tuple[jax.Array, jax.Array])
    assert (out.shape, sign.tolist()) == ((), 1)
