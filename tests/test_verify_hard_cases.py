"""What is hard to verify: many entries, rules that see how they are called, loops, and programs JAX cannot trace."""

import functools
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap

from jaxact import verify

LINE = jnp.linspace(-1.0, 2.0, 9)
plainly = functools.partial(verify.rule, transforms=(), edges=None)


def normal(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_rule(f: Any, backward: Any) -> Any:
    ruled = jax.custom_vjp(f)
    ruled.defvjp(lambda *args: (f(*args), args), lambda args, g: backward(*args, g))
    return ruled


def layer_norm(x: Any, scale: Any, shift: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + shift


def attention(q: Any, k: Any, v: Any) -> Any:
    return jax.nn.softmax(q @ k.T / 4, -1) @ v


@pytest.mark.long
@pytest.mark.parametrize(
    ("f", "args"),
    [
        # Of so many entries some hardly move with inputs that are off at random.
        (lambda x: jax.nn.logsumexp(x, -1), [3 * normal(16, 4000)]),
        (layer_norm, [normal(4, 256), normal(256, seed=10), normal(256, seed=20)]),
        # Its Jacobian is not looked at as a whole, and under jit outputs near 0 are rounded otherwise.
        (attention, [normal(64, 16, seed=s) for s in range(3)]),
    ],
    ids=["logsumexp", "layer_norm", "attention"],
)
def test_plain_functions_of_many_numbers(f: Any, args: list[Any]) -> None:
    report = verify.rule(f, *args, transforms=("jit",))
    assert report, str(report)


def test_a_backward_rule_that_is_wrong_in_the_cotangent() -> None:
    @jax.custom_vjp
    def backward(x: Any, g: Any) -> Any:
        return g * jnp.cos(x)

    backward.defvjp(
        lambda x, g: (backward(x, g), (x, g)), lambda of, c: (-c * of[1] * jnp.sin(of[0]), 3 * c * jnp.cos(of[0]))
    )
    f = with_rule(jnp.sin, lambda x, g: (backward(x, g),))
    assert plainly(f, LINE)
    report = plainly(f, LINE, order=2)
    assert report.verdict == "refuted"
    assert "reverse over reverse mode, with respect to the vector, is wrong in element" in str(report)
    assert plainly(with_rule(jnp.sin, lambda x, g: (g * jnp.cos(x),)), LINE, order=2)


def test_a_batching_rule_that_takes_one_row_for_all() -> None:
    @custom_vmap
    def slope(x: Any) -> Any:
        return jnp.cos(x)

    @slope.def_vmap
    def _(size: int, batched: Any, x: Any) -> Any:
        return jnp.broadcast_to(jnp.cos(x[0]), x.shape), True

    report = verify.rule(with_rule(jnp.sin, lambda x, g: (g * slope(x),)), LINE, edges=None)
    assert report.verdict == "refuted"
    assert "in a batch of 4096" in report.reasons[0]


def test_a_rule_that_fails_where_one_result_alone_is_differentiated() -> None:
    f: Any = jax.custom_vjp(lambda x: (jnp.sin(x), x * x))
    f.defvjp(
        lambda x: ((jnp.sin(x.value), x.value**2), x.value),
        lambda x, g: (g[0] * jnp.cos(x) + g[1] * 2 * x,),  # of which one may be a SymbolicZero
        symbolic_zeros=True,
    )
    report = plainly(f, LINE)
    assert report.verdict == "refuted"
    assert "with one result differentiated and the others not, reverse mode raises TypeError" in report.reasons[0]
    assert plainly(lambda x: (jnp.sin(x), x * x), LINE)


def test_sorted_numbers_do_not_make_a_function_elementwise() -> None:
    report = verify.rule(with_rule(lambda x: jnp.sort(x), lambda x, g: (g,)), LINE, transforms=())
    assert "f is not elementwise in the sweep" in str(report)


@jax.custom_vjp
def root(a: Any) -> Any:
    """By Newton's method, which does not end at a negative number."""

    def far(last: Any) -> Any:
        return jnp.any(jnp.abs(last[0] - last[1]) > 1e-4 * jnp.abs(last[0]))

    return lax.while_loop(far, lambda last: ((last[0] + a / last[0]) / 2, last[0]), (a, 2 * a))[0]


root.defvjp(lambda a: (root(a), root(a)), lambda y, g: (g / (2 * y),))


def test_a_loop_that_does_not_end_elsewhere() -> None:
    report = verify.rule(root, jnp.linspace(0.5, 9, 9), transforms=())
    assert report, str(report)
    assert "f has a loop, which need not end elsewhere" in str(report)


@pytest.mark.long
def test_a_loop_that_ends_before_its_limit() -> None:
    def fixed_point(x: Any) -> Any:
        def far(last: Any) -> Any:
            return jnp.max(jnp.abs(last[0] - last[1])) > 1e-3

        start = (jnp.zeros_like(x), jnp.ones_like(x))
        return lax.while_loop(far, lambda last: (jnp.tanh(last[0] / 2 + x), last[0]), start)[0]

    def backward(x: Any, g: Any) -> Any:
        slope = 1 - fixed_point(x) ** 2
        return (g * slope / (1 - slope / 2),)

    report = plainly(with_rule(fixed_point, backward), LINE)
    assert report.verdict == "refuted"
    assert "if a loop of f ends before its limit, what f computes has another derivative" in report.reasons[-1]


@pytest.mark.long
def test_a_long_loop_is_not_run_in_mpmath() -> None:
    def f(x: Any, steps: Any) -> Any:
        return lax.fori_loop(jnp.int32(0), steps, lambda i, y: y + 1e-3 * jnp.sin(y), x)

    report = plainly(f, np.array([0.5, 1.0]), jnp.int32(1000))
    assert report.facts["oracle"] == "what f computes, in float64, by autodiff"


@pytest.mark.long
def test_reverse_mode_that_cannot_be_traced_is_a_verdict() -> None:
    # Eagerly the number of steps is known, and it is a scan.
    def f(x: Any, steps: Any) -> Any:
        return lax.fori_loop(jnp.int32(0), steps, lambda i, y: 2 * y, x)

    assert verify.rule(f, LINE, jnp.int32(3), transforms=("jit",), edges=None).verdict == "refuted"
    report = plainly(f, LINE, jnp.int32(3))
    assert report, str(report)
    assert "ValueError" in report.facts["residual bytes"]


@pytest.mark.long
def test_a_table_with_rows_that_are_not_looked_up() -> None:
    ids = jnp.array([3, 0, 7, 0])
    tracemalloc.start()
    try:
        report = plainly(lambda table: jnp.where((ids != 0)[:, None], table[ids], 0), normal(500, 8))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report, str(report)
    assert peak < 8 * 4000**2  # as many numbers as the inputs squared


def test_the_witness_binds_what_jax_takes_as_no_argument() -> None:
    def scaled(x: Any, name: str, by: Any) -> Any:
        return by * getattr(jnp, name)(x)

    def wrong(x: Any, name: str, by: Any) -> Any:
        return with_rule(lambda x: scaled(x, name, by), lambda x, g: (g * x,))(x)

    args = (LINE, "tanh", jnp.arange(9))
    report = plainly(wrong, *args)
    lines = report.witness.splitlines()
    names: dict[str, Any] = {"f": wrong, "args": args}
    exec("\n".join(lines[:-1]), names)
    came = float(lines[-1].split("# ")[1].split(",")[0])
    np.testing.assert_allclose(eval(lines[-1], names), came, rtol=1e-4)  # five digits are printed


def test_a_python_float_that_should_be_a_constant() -> None:
    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def scaled(x: Any, by: float) -> Any:
        return by * x

    scaled.defvjp(lambda x, by: (by * x, None), lambda by, _, g: (by * g,))
    with pytest.raises(jax.errors.UnexpectedTracerError) as error:
        plainly(scaled, LINE, 2.0)
    assert "give functools.partial(f, ...)" in error.value.__notes__[-1]
    assert plainly(functools.partial(scaled, by=2.0), LINE)
