"""The verifier on a corpus of right and wrong rules, and on itself."""

import functools
import gc
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import tracemalloc
import weakref
from typing import Any

import corpus
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracles
import pytest

import jaxact
from jaxact import verify

# The corpus. Each case is compiled in every mode and under every transformation, so that one in 80 is what a default
# run has time for; the rest are visited with --exhaustive.


def cases(of: list[corpus.Case]) -> Any:
    return [
        pytest.param(case, id=case.name, marks=[] if i % 80 == 0 else [pytest.mark.exhaustive])
        for i, case in enumerate(of)
    ]


def check(case: corpus.Case, **options: Any) -> verify.Report:
    return verify.rule(case.f, *case.args, reference=case.reference, edges=case.edges, **options)


@pytest.mark.parametrize("case", cases(corpus.WRONG))
def test_a_wrong_rule_is_refuted(case: corpus.Case) -> None:
    report = check(case)
    assert report.verdict == "refuted", str(report)
    assert report.reasons
    assert not report
    with pytest.raises(verify.NotVerified, match="refuted"):
        report.raise_if_not_ok()


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", cases(corpus.WRONG_AT_ORDER_2))
def test_a_wrong_second_derivative_is_refuted_at_order_2(case: corpus.Case) -> None:
    assert check(case, order=2).verdict == "refuted"


@pytest.mark.parametrize("case", cases(corpus.RIGHT))
def test_a_right_rule_is_verified_and_every_mutant_refuted(case: corpus.Case) -> None:
    report = check(case)
    if case.name == "empty":
        assert (report.verdict, report.reasons) == ("inconclusive", ("there is no element to check",))
        return
    assert report.verdict == "verified", str(report)
    assert report
    report.raise_if_not_ok()
    killed, _, made, *_ = report.facts["power"].split()
    assert killed == made, str(report)


# The verifier's own failures.


@pytest.mark.parametrize(
    ("f", "dtype"),
    [(jaxact.sigmoid, "float32"), pytest.param(jaxact.softmax, "bfloat16", marks=pytest.mark.exhaustive)],
)
def test_a_blinded_verifier_is_caught(f: Any, dtype: str) -> None:
    x = jnp.asarray(np.linspace(-3, 3, 12).reshape(3, 4), dtype)
    assert verify.rule(f, x, transforms=()).verdict == "verified"
    report = verify.rule(f, x, bound=8e6, transforms=())
    assert report.verdict == "inconclusive"
    assert "the check cannot fail" in report.reasons[0]


def test_a_check_that_refutes_is_not_said_to_be_unable_to() -> None:
    # Of the mutants of a product with the wrong sign the one with the other sign is right.
    @jax.custom_vjp
    def against(x: Any) -> Any:
        return x

    against.defvjp(lambda x: (x, None), lambda _, g: (-g,))
    report = verify.rule(against, jnp.array([-1.0, 0.5, 2.0]), transforms=())
    assert (report.verdict, report.reasons) == ("refuted", ("the backward rule has the wrong sign",))


def test_an_oracle_that_does_not_know_is_inconclusive() -> None:
    # At 0 the two sides of |x| have different slopes. Whatever a rule says there, nobody can verify it.
    report = verify.rule(jnp.abs, jnp.array([-1.0, 0.0, 2.0]), transforms=())
    assert report.verdict == "inconclusive"
    assert "the oracle does not know" in report.reasons[0]


def test_a_false_zero_of_the_oracle_convicts_nobody() -> None:
    # In float64 1 − tanh² is 0 beyond 19, and the true slope of this sigmoid is not. In mpmath it is what it is.
    @jaxact.forward_mode
    @jax.custom_vjp
    def half_tanh(x: Any) -> Any:
        return 0.5 * (jnp.tanh(x / 2) + 1)

    half_tanh.defvjp(
        lambda x: (half_tanh(x), x), lambda x, g: (g * jax.vjp(jaxact.sigmoid, x)[1](jnp.ones_like(x))[0],)
    )
    report = verify.rule(half_tanh, jnp.array([-3.0, 1.0, 50.0, 80.0]), edges=None, transforms=())
    assert report.verdict == "verified", str(report)
    assert "mpmath" in report.facts["oracle"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", [(512,), (8, 128)])
def test_the_oracle_knows_a_function_with_a_maximum_of_many_numbers(shape: tuple[int, ...]) -> None:
    # Too long a program for mpmath, so that autodiff must do. Its rounding was found by moving the maximum too, which
    # no number then equalled, and whose derivative became 0/0.
    def parts(x: Any) -> Any:
        top = jnp.max(x, -1, keepdims=True)
        return top, jnp.exp(x - top), jnp.sum(jnp.exp(x - top), -1, keepdims=True)

    @jax.custom_vjp
    def logsumexp(x: Any) -> Any:
        top, _, total = parts(x)
        return (top + jnp.log(total))[..., 0]

    def backward(x: Any, g: Any) -> Any:
        _, e, total = parts(x)
        return (g[..., None] * e / total,)

    logsumexp.defvjp(lambda x: (logsumexp(x), x), backward)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), "float32")
    for f in (logsumexp, functools.partial(jaxact.logsumexp, axis=-1)):
        report = verify.rule(f, x, transforms=())
        assert report.verdict == "verified", str(report)
        assert "autodiff" in report.facts["oracle"]


@pytest.mark.exhaustive
def test_two_runs_print_the_same_report_and_leave_the_configuration_alone() -> None:
    x = jnp.linspace(-4.0, 4.0, 7)
    before = jax.config.values.copy()
    rule: Any = functools.partial(verify.rule, jaxact.softplus, x, order=2, transforms=("jit",))
    texts = [str(rule(seed=3)) for _ in range(2)]
    assert texts[0] == texts[1]
    assert jax.config.values == before
    assert texts[0] != str(rule(seed=4))


# References and derivatives of every kind.

X = np.float32(np.linspace(-20, 20, 11))


@pytest.mark.long
@pytest.mark.parametrize(
    "how",
    [
        {"reference": oracles.sigmoid},
        {"reference": lambda x: 1 / (1 + mpmath.exp(-x))},
        {"reference": lambda x: 0.5 * (1 + jnp.tanh(x / 2))},
        {"derivative": oracles.sigmoid_slope},
        {"derivative": lambda x: mpmath.exp(-x) / (1 + mpmath.exp(-x)) ** 2},
        {"derivative": lambda x: np.diag(oracles.sigmoid_slope(x))},
    ],
    ids=["numpy", "mpmath", "jax", "numpy slopes", "mpmath slopes", "numpy jacobian"],
)
def test_references(how: dict[str, Any]) -> None:
    rule: Any = functools.partial(verify.rule, edges=None, transforms=(), **how)
    right = rule(jaxact.sigmoid, X)
    assert right.verdict == "verified", str(right)
    assert rule(jax.nn.sigmoid, X).verdict == "refuted"
    wrong_value = rule(lambda x: jaxact.sigmoid(x) * 1.001, X)
    assert wrong_value.verdict == "refuted", str(wrong_value)


def test_edges() -> None:
    x = jnp.array([0.5, 1.5])
    rule: Any = functools.partial(verify.rule, transforms=())
    assert rule(jaxact.softplus, x, edges={-np.inf: 0.0, np.inf: 1.0, 0.0: 0.5, np.nan: np.nan}).ok
    report = rule(jaxact.softplus, x, edges={0.0: 0.25})
    assert report.verdict == "refuted"
    assert report.reasons[0] == "at x = 0, reverse mode gives 0.5 where edges= says 0.25"
    assert report.witness.splitlines()[-1].startswith("jax.vjp(f, jnp.array([0.0], jnp.float32))[1]")


@pytest.mark.long
def test_the_sweep_of_inputs_away_from_the_arguments() -> None:
    x = jnp.array([0.5, 1.5])
    rule: Any = functools.partial(verify.rule, transforms=())
    assert "at x = " in rule(jax.nn.sigmoid, x).reasons[0]
    # Right down to −40, and then 0 where e^x is not yet.
    false_zero: Any = jax.custom_vjp(lambda x: jnp.logaddexp(x, 0.0))
    false_zero.defvjp(lambda x: (false_zero(x), x), lambda x, g: (g * jnp.where(x < -40, 0, jaxact.sigmoid(x)),))
    for dtype in ("float32", "bfloat16"):
        assert rule(false_zero, x.astype(dtype)).verdict == "refuted"
    # What takes no other array, or is finite at no other number, is checked without.
    here = jnp.array([0.3, 0.3001])
    with_labels: Any = functools.partial(jaxact.losses.sigmoid_binary_cross_entropy, labels=here)
    for f in (with_labels, lambda x: jnp.sqrt(1e-4 - (x - 0.3) ** 2)):
        report = rule(f, here)
        assert report.ok, str(report)
        assert {c.name: c.verdict for c in report.checks}["edges"] == "absent"
    with pytest.raises(ValueError, match="labels must broadcast"):
        rule(with_labels, here, edges={1.0: 0.5})


def test_the_sweep_says_where_f_is_finite() -> None:
    report = verify.rule(lambda x: x**4, jnp.array([0.5, 1.5]), transforms=())
    (edges,) = (c.detail for c in report.checks if c.name == "edges")
    assert re.fullmatch(
        r"(\d+) of a sweep of \d+ inputs, of which f is finite at \1, from -5.*e\+08 to 5.*e\+08", edges
    )


def test_modes() -> None:
    @jax.custom_vjp
    def square(x: Any) -> Any:
        return x * x

    square.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))
    x = jnp.array([1.0, 2.0])
    rule: Any = functools.partial(verify.rule, square, x, transforms=(), edges=None)
    report = rule()
    assert report.ok
    assert {c.name: c.verdict for c in report.checks}["forward"] == "absent"
    assert rule(modes=("reverse", "forward")).verdict == "refuted"
    assert rule(modes="reverse").facts["modes"] == ["reverse"]


@pytest.mark.long
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the kernels of XLA for CPU")
def test_a_nan_that_is_lost_in_large_arrays_only() -> None:
    x = np.tile(np.array([[1, 2, 3], [1, np.nan, 3]], np.float32), (2048, 1))
    softmax = jax.jit(corpus.softmax_of_at_most)
    assert np.isnan(softmax(x[:4095])[1::2]).all()
    assert not np.isnan(softmax(x)).any()
    for f in (corpus.softmax_of_at_most, lambda x: jnp.max(x, -1)):
        report = verify.rule(f, x[:1], modes="reverse", transforms=("vmap",))
        assert report.ok  # of its derivative nothing is wrong
        assert re.fullmatch(
            r"f is [\d.]+ in a batch of 4096, nan alone \(element \d, where input \d is nan\)",
            report.facts["nan and ±inf in a batch"],
        )
    report = verify.rule(jnp.sin, x[:1], modes="reverse", transforms=("vmap",), edges=None)
    assert report.facts["nan and ±inf in a batch"] == "as alone"


def test_a_function_that_cannot_be_batched() -> None:
    def refuse(x: Any) -> Any:
        raise NotImplementedError("one at a time")

    f = corpus.elementwise(corpus.otherwise_in_a_batch(jnp.sin, refuse), jnp.cos)
    report = verify.rule(f, jnp.ones(3), transforms=("vmap",), edges=None)
    assert report.reasons == ("f raises NotImplementedError in a batch of 4096: one at a time",)


def test_a_batch_of_large_arrays_is_small() -> None:
    from jaxact.verify._batch import DIFFERENT, ROWS, copies_of
    from jaxact.verify._problem import Problem

    assert DIFFERENT * copies_of(Problem(jnp.sin, (np.zeros((8, 100), np.float32),))) == ROWS
    assert copies_of(Problem(jnp.sin, (np.zeros(10**6, np.float32),))) == 1


# What an author is told.


def test_messages() -> None:
    x = jnp.linspace(-2.0, 2.0, 5)

    def with_backward(backward: Any, f: Any = jnp.sin) -> Any:
        g = jax.custom_vjp(lambda x: f(x))
        g.defvjp(lambda x: (f(x), x), lambda x, g: (backward(x, g),))
        return g

    def first(f: Any, x: Any = x) -> str:
        return verify.rule(f, x, edges=None, transforms=("jit",)).reasons[0]

    assert first(with_backward(lambda x, g: 0 * g)) == "the backward rule returns 0 everywhere"
    assert first(with_backward(lambda x, g: -g * jnp.cos(x))) == "the backward rule has the wrong sign"
    assert first(with_backward(lambda x, g: 2 * g * jnp.cos(x))) == "the backward rule is off by the factor 2"
    assert "not linear: for a cotangent of 0" in first(with_backward(lambda x, g: g * jnp.cos(x) + 1))
    assert "returns nan" in first(with_backward(lambda x, g: g * jnp.cos(x) + jnp.nan))
    a = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    assert "transposed" in first(with_backward(lambda x, g: a @ g, lambda x: a @ x), jnp.array([1.0, -2.0]))
    y = jnp.array([1.0, 0.0, 0.5])
    dropped = with_backward(lambda x, g: g * jax.nn.softmax(x) * (1 - jax.nn.softmax(x)), jax.nn.softmax)
    assert "a sum is missing" in first(dropped, y)

    def fooled(x: Any, g: Any) -> Any:
        return g * jnp.cos(x) * (2 if isinstance(x, jax.core.Tracer) else 1)

    assert "right when eager, wrong under jit" in first(with_backward(fooled))


def shown(report: verify.Report, **scope: Any) -> None:
    """Runs the witness: what comes is the number that it says."""
    *setup, last = report.witness.splitlines()
    expression, comment = last.split("  # ")
    before = jax.config.read("jax_enable_x64")
    try:
        exec("\n".join(setup), scope)
        got = float(np.asarray(eval(expression, scope)).item())
    finally:
        jax.config.update("jax_enable_x64", before)
    said, due = comment.split(", should be ")
    assert said != due
    assert f"{got:.{len(said)}g}".startswith(said[:-1]) or float(said) == got, (got, comment)


def test_the_witness_can_be_pasted() -> None:
    shown(verify.rule(jax.nn.sigmoid, jnp.array([17.0, 1.0])), f=jax.nn.sigmoid)
    plain = functools.partial(verify.rule, transforms=(), edges=None)

    def doubled(x: Any, *others: Any) -> Any:
        return {"y": jnp.sin(x) * 2} if others else jnp.sin(x).sum()

    def sabotaged(f: Any, position: Any) -> Any:
        g = jax.custom_vjp(f)
        g.defvjp(lambda *args: (f(*args), args), lambda args, g: (position(jax.vjp(f, *args)[1](g)[0]), *args[1:]))
        return g

    x, mask = jnp.array([-2.0, -0.5, 0.3, 1.0]), np.arange(4)
    wrong = sabotaged(lambda x: jnp.sin(x), lambda g: g.at[2].mul(1.001))  # in one place
    cases: Any = [
        (wrong, (x,)),
        (sabotaged(doubled, lambda g: 2 * g), (x,)),  # to a number
        (sabotaged(jnp.sin, lambda g: g * (1 + 1e-9)), (np.array([0.3, 1.0]),)),
    ]
    for f, args in cases:
        shown(plain(f, *args), f=f, args=args)
    f = jax.custom_vjp(lambda n, x: {"y": jnp.sin(x) * n})
    f.defvjp(lambda n, x: (f(n, x), (x, n)), lambda r, g: (None, 2 * g["y"] * jnp.cos(r[0]) * r[1]))
    shown(plain(f, mask, x), f=f, args=(mask, x))
    report = verify.rule(jnp.sin, x, transforms=(), edges={math.inf: 0.0})
    assert "jnp.array([jnp.inf], jnp.float32)" in report.witness


# The other checks.


def test_values() -> None:
    report = verify.values(jaxact.sigmoid, oracles.sigmoid, dtype=jnp.bfloat16, bound=0.51)
    assert report.ok
    assert report.facts["inputs"] == sum(report.facts["regions"].values()) == sum(report.facts["histogram"].values())
    assert report.facts["max ulp"] <= 0.51
    few = verify.values(jnp.sin, np.sin, dtype=jnp.float32, points=np.linspace(-1, 1, 5)).facts
    assert 0 < few["99.9 % ulp"] == few["max ulp"]
    wrong = verify.values(lambda x: jnp.where(x == 3, 0, jaxact.sigmoid(x)), oracles.sigmoid, dtype=jnp.float16)
    assert wrong.verdict == "refuted"
    assert wrong.facts["worst"]["input"] == 3.0
    points = np.random.default_rng(0).normal(size=1000) * 30
    assert verify.values(jaxact.softplus, oracles.softplus, dtype=np.float32, points=points, bound=3).ok
    exact = verify.values(
        jaxact.softplus, lambda x: mpmath.log1p(mpmath.exp(x)), dtype=np.float64, points=points[:50], bound=4
    )
    assert exact.ok
    assert verify.values(jaxact.sigmoid, oracles.sigmoid, dtype=np.float32, points=[]).verdict == "inconclusive"
    with pytest.raises(ValueError, match="points must be"):
        verify.values(jaxact.sigmoid, oracles.sigmoid, dtype=np.float32)
    with pytest.raises(TypeError, match="dtype must be a float type, got int32"):
        verify.values(jaxact.sigmoid, oracles.sigmoid, dtype=np.int32)


def test_the_ulp_of_values_at_the_ends_of_the_range() -> None:
    def at(got: list[float], want: list[float], dtype: Any = np.float32) -> list[float]:
        from jaxact.verify._values import ulp_errors

        return ulp_errors(np.array(got, dtype), np.array(want), dtype)[0].tolist()

    inf, nan, tiny = np.inf, np.nan, 2.0**-126
    assert at([1.0, 1 + 2.0**-23, 0.5], [1.0, 1.0, 0.5 - 2.0**-26]) == [0.0, 1.0, 0.5]
    assert at([0.0, tiny, 1.0], [tiny / 4, tiny / 2, tiny / 2]) == [0.0, 0.0, inf]
    assert at([inf, -inf, nan, nan, 1.0], [1e39, inf, nan, 1.0, nan]) == [0.0, inf, 0.0, inf, inf]
    # In float64 one over a spacing overflows below 2⁻⁹⁷¹.
    sizes = [2.0**-1022, 2.0**-973, 2.0**-972, 2.0**-971, 2.0**1023]
    assert at([a * (1 + 2.0**-52) for a in sizes], sizes, np.float64) == [1.0] * 5
    assert at([1.5 * a for a in sizes], sizes, np.float64) == [2.0**51] * 5
    # XLA keeps the subnormal numbers of float16.
    assert at([0.0, 2.0**-24, 2.0**-20], [2.0**-20, 2.0**-25, 2.0**-20], np.float16) == [16.0, 0.5, 0.0]


def test_contract() -> None:
    assert verify.contract(jnp.sin, jnp.ones((2, 3), jnp.bfloat16)).ok
    # In an interpreter of its own: JAX looks for who holds a leaked tracer among all objects, of all tests before.
    program = """
        import jax, jax.numpy as jnp
        from jaxact import verify
        leaked = []

        @jax.custom_jvp
        def leaky(x):
            return jnp.sin(x)

        @leaky.defjvp
        def _(primals, tangents):
            leaked.append(jnp.cos(primals[0]))
            return jnp.sin(primals[0]), tangents[0] * leaked[-1]

        report = verify.contract(leaky, jnp.ones(3))
        print(report.verdict, "Leaked" in report.reasons[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["refuted", "True"], done.stderr[-2000:]


@pytest.mark.parametrize("name", ["cotangent_of_wrong_shape", "cotangents_too_many", "cotangent_of_wrong_dtype"])
def test_a_broken_contract_is_found_without_arithmetic(name: str) -> None:
    (case,) = (case for case in corpus.WRONG if case.name == name)
    assert verify.rule(case.f, *case.args).verdict == "refuted"


def test_residuals() -> None:
    x = jnp.ones((4, 8))
    assert verify.residuals(jaxact.softmax, x, max_bytes=128).ok
    report = verify.residuals(lambda x: jnp.sin(jaxact.softmax(x)), x, max_bytes=128)
    assert report.verdict == "refuted"
    assert report.facts["bytes"] == 256
    (own,) = verify.residuals(jaxact.sigmoid, x).checks
    assert "an argument" in own.detail


def test_reports() -> None:
    report = verify.rule(jax.nn.sigmoid, jnp.array([17.0]))
    assert json.loads(report.to_json())["verdict"] == "refuted"
    assert report.to_markdown().startswith("### `sigmoid(float32[1])`: refuted")
    assert "| reverse, jit | refuted |" in report.to_markdown()


def test_bad_arguments() -> None:
    x = jnp.ones(3)
    with pytest.raises(TypeError, match="f must be a function, got 3"):
        verify.rule(3, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="args must contain a float array"):
        verify.rule(jnp.sin, 1)
    with pytest.raises(TypeError, match="f must return a float array"):
        verify.rule(jnp.argmax, x)
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "modes must be", {"modes": "backward"}),
        (ValueError, "modes must be", {"modes": ()}),
        (TypeError, 'modes must be "auto" or one or more of .*, got 3', {"modes": 3}),
        (ValueError, "transforms must be one or more of .*, got .'pmap'", {"transforms": ("pmap",)}),
        (TypeError, "transforms must be one or more of .*, got 3", {"transforms": 3}),
        (ValueError, "order must be at least 1, got 0", {"order": 0}),
        (ValueError, "seed must be at least 0, got -1", {"seed": -1}),
        (TypeError, "directions must be an int, got 1.5", {"directions": 1.5}),
        (TypeError, "reference must be a function or None, got 3", {"reference": 3}),
        (TypeError, "derivative must be a function or None, got 3", {"derivative": 3}),
        (ValueError, "bound must be positive", {"bound": -1}),
        (TypeError, "bound must be a number or None, got 'a'", {"bound": "a"}),
        (TypeError, "bound must be a number or None, got Array", {"bound": jnp.ones(3)}),
        (TypeError, "edges must be a dict from numbers to numbers, got {'a': 1}", {"edges": {"a": 1}}),
    ]
    for error, message, option in bad:
        with pytest.raises(error, match=message):
            verify.rule(jnp.sin, x, **option)
    with pytest.raises(ValueError, match="bound must be finite and not negative, got -1"):
        verify.values(jnp.sin, np.sin, dtype=jnp.bfloat16, bound=-1)
    with pytest.raises(ValueError, match=r'points must be an array or "all", got \'al\''):
        verify.values(jnp.sin, np.sin, dtype=jnp.bfloat16, points="al")
    with pytest.raises(TypeError, match="edges must be"):
        verify.rule(jnp.sin, x, edges=3)
    with pytest.raises(ValueError, match="derivative must return"):
        verify.rule(jnp.sum, x, derivative=lambda x: np.ones(2))


def test_python_values_are_constants() -> None:
    x = jnp.linspace(0.5, 2, 4)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def power(x: Any, n: int) -> Any:
        return x**n

    power.defvjp(lambda x, n: (x**n, x), lambda n, x, g: (n * x ** (n - 1) * g,))
    report = verify.rule(power, x, 3, edges=None)
    assert report, str(report)
    report = verify.rule(lambda x, squared: x * x if squared else x, x, True, edges=None, transforms=("remat",))
    assert report, str(report)


# What was once found out about it: by engineers who tried to deceive it, or to use it.


LINE = jnp.array([-2.0, -0.5, 0.3, 1.0])
plainly = functools.partial(verify.rule, transforms=(), edges=None)


def test_a_mistake_in_what_is_given_is_told_as_it_is() -> None:
    with pytest.raises(TypeError, match="reference must compute in mpmath, NumPy or JAX, got a float of sin"):
        plainly(jnp.sin, LINE, reference=math.sin)
    with pytest.raises(TypeError, match="Gradient only defined for scalar-output functions"):
        plainly(jnp.sin, LINE, derivative=jax.grad(jnp.sin))
    with pytest.raises(AttributeError, match="object has no attribute 'foo'"):
        plainly(jnp.sin, LINE, reference=lambda x: x.foo())


@pytest.mark.long
def test_a_given_slope_is_what_is_differentiated() -> None:
    def square(x: Any) -> Any:  # which autodiff gets wrong
        return x * jax.lax.stop_gradient(x)

    right, wrong = (
        corpus.elementwise(square, lambda x: 2 * x),
        corpus.elementwise(square, lambda x: x + jax.lax.stop_gradient(x)),
    )
    assert plainly(right, LINE, derivative=lambda x: 2 * x, order=2)
    assert plainly(wrong, LINE, derivative=lambda x: 2 * x, order=2).verdict == "refuted"
    # In NumPy it cannot be, and what f computes may not be.
    assert plainly(wrong, LINE, derivative=lambda x: 2 * np.asarray(x), order=2).verdict == "inconclusive"
    assert plainly(jnp.sin, LINE, derivative=lambda x: np.cos(np.asarray(x)), order=2)
    assert plainly(jnp.sin, LINE, derivative=jax.jacobian(jnp.sin), order=2)  # nor are Jacobians slopes


@pytest.mark.long
def test_one_entry_beside_the_diagonal_of_a_long_array() -> None:
    report = plainly(lambda x: jnp.concatenate([x[:1] + x[1:2], x[1:]]), jnp.linspace(0.2, 1.2, 2000))
    assert report, str(report)
    assert report.facts["looked at"] == "64 of 2000 outputs, 64 of 2000 inputs"


def test_a_slope_that_has_a_kink_is_known() -> None:
    def f(x: Any) -> Any:
        return jnp.square(jnp.maximum(x, 0))

    assert plainly(f, jnp.array([0.0, 1.0]))
    wrong = corpus.elementwise(f, lambda x: jnp.where(x == 0, 1.0, 2 * jnp.maximum(x, 0)))
    assert plainly(wrong, jnp.array([0.0, 1.0])).verdict == "refuted"
    assert plainly(jnp.abs, jnp.array([0.0, 1.0])).verdict == "inconclusive"


def test_nan_that_the_verifier_puts_in_itself() -> None:
    with jax.debug_nans(True), jax.transfer_guard("disallow"):
        assert verify.rule(jnp.sin, LINE, transforms=("vmap",))


@pytest.mark.long
def test_given_edges() -> None:
    narrow = LINE.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"edges must be numbers of bfloat16, got -20.3: the next to it is -20.25"):
        verify.rule(jaxact.sigmoid, narrow, edges={-20.3: 1e-9})
    report = verify.rule(lambda x, y: jnp.sin(x) * y, LINE, jnp.arange(4), edges={0.0: 1.0}, transforms=())
    assert report.reasons == ("f of an array of shape (1,) has another shape",)
    # What XLA flushes to 0; and no points are not a sweep.
    assert verify.rule(jaxact.softplus, LINE, edges={-95.0: math.exp(-95), math.inf: 1.0}, transforms=())
    report = verify.rule(jnp.sin, LINE, edges={}, transforms=())
    assert "edges" not in {c.name for c in report.checks}
    # A derivative that holds an array of the shape of the arguments.
    slopes = np.cos(np.asarray(LINE, np.float64))
    report = verify.rule(jnp.sin, LINE, derivative=lambda _: slopes, transforms=())
    assert {c.name: c.verdict for c in report.checks}["edges"] == "absent"


@pytest.mark.long
def test_what_is_evaluated_in_mpmath_besides_numbers() -> None:
    x, n = np.array([-2.0, -0.5, 0.3, 1.0]), np.arange(1, 5, dtype=np.int32)
    assert plainly(lambda x, n: jnp.sin(x) * ((n + 1).astype(x.dtype) / (n + 2).astype(x.dtype)), x, n)
    assert plainly(lambda x, n: jnp.sin(x) * (n.astype(jnp.uint8) * jnp.uint8(200)).astype(x.dtype), x, n)
    assert plainly(lambda x: jnp.where(x.sum() > 9, x.sum(), x[0]), x)  # one number, moved
    assert plainly(lambda x: x[:0].sum() + x, x)


def test_a_key_among_the_residuals() -> None:
    @jax.custom_vjp
    def scaled(x: Any, key: Any) -> Any:
        return 2 * x

    scaled.defvjp(lambda x, key: (2 * x, key), lambda key, g: (2 * g, None))
    assert verify.residuals(scaled, LINE, jax.random.key(0)).facts["bytes"] == jax.random.key(0).dtype.itemsize


def test_no_residuals_without_a_reverse_mode() -> None:
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        verify.residuals(lambda x: jax.lax.while_loop(lambda c: c.sum() < 30, lambda c: c * 2, x), LINE)


@pytest.mark.long
def test_what_is_wrong_is_said_first_and_not_guessed() -> None:
    wrong = corpus.elementwise(lambda x: x * jnp.sinc(x), lambda x: jnp.cos(jnp.pi * x) * x / x)
    report = verify.rule(wrong, jnp.array([-2.0, -0.5, 0.3, 1.0, 4.0]), transforms=())
    assert report.reasons[0].startswith("at x = -0, ")
    wrong = corpus.elementwise(jnp.square, lambda x: jnp.where(x == 1, 0, 2 * x))
    assert "cancelled" not in plainly(wrong, jnp.array([1.0, 2.0, 3.0])).reasons[0]


def test_a_forward_pass_with_another_tree() -> None:
    f: Any = jax.custom_vjp(lambda x: (jnp.sin(x), x))
    f.defvjp(lambda x: ([jnp.sin(x), x], x), lambda x, g: (g[0] * jnp.cos(x) + g[1],))
    assert "primal has the tree" in verify.contract(f, LINE).reasons[0]


@pytest.mark.parametrize("reference", [lambda x: 0.5, lambda x: np.sin(x)[:1], lambda x: (np.sin(x),)])
def test_a_reference_that_is_not_elementwise(reference: Any) -> None:
    with pytest.raises(TypeError, match="reference must be elementwise"):
        verify.values(jnp.sin, reference, dtype=jnp.float32, points=[1.0, 2.0])


def test_infinite_facts_in_json() -> None:
    report = verify.values(lambda x: x / 0, np.abs, dtype=jnp.float16, points=[1.0], progress=True)
    assert json.loads(report.to_json())["facts"]["max ulp"] == "inf"
    assert verify.values(jnp.abs, np.abs, dtype=jnp.float16, points=[], progress=True).verdict == "inconclusive"


def test_one_array_alone_in_a_batch() -> None:
    product = jax.custom_batching.custom_vmap(lambda x, w: x @ w)

    @product.def_vmap
    def _(size: int, batched: Any, x: Any, w: Any) -> Any:
        return (jnp.einsum("bi,bij->bj", x, w) if batched[1] else 2 * (x @ w)), True

    f = jax.custom_vjp(product)
    f.defvjp(lambda x, w: (product(x, w), (x, w)), lambda r, g: (g @ r[1].T, jnp.outer(r[0], g)))
    report = verify.rule(f, jnp.array([1.0, 2.0]), jnp.ones((2, 3)), transforms=("vmap",))
    assert report.reasons == ("f is wrong where array 0 alone is batched",)


@pytest.mark.long
def test_long_arrays_take_no_more_than_their_jacobian_would() -> None:
    n = 5000
    report = plainly(jnp.sin, jnp.linspace(0.1, 3.0, n))
    assert report
    assert report.facts["products checked"] <= 2 * (16 + 2**21 // n)  # of both modes; of one number each they were 2074
    tracemalloc.start()
    try:
        assert plainly(lambda x: jnp.sin(x).sum(), np.linspace(0.1, 3, n))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * n * n  # one row for each input, of which each was spoilt in turn


def test_nothing_is_kept_of_what_was_verified() -> None:
    class Held:
        pass

    held = Held()
    weak = weakref.ref(held)
    plainly(lambda x, held=held: jnp.sin(x), LINE)
    del held
    gc.collect()
    assert weak() is None


def test_types_of_fewer_bits_are_refused() -> None:
    with pytest.raises(TypeError, match="must have 16 bits or more, got float8_e4m3fn"):
        plainly(jnp.sin, LINE.astype(jnp.float8_e4m3fn))


@pytest.mark.long
def test_a_row_left_out_of_many() -> None:
    # Of so large a Jacobian 64 rows are looked at one by one.
    def f(x: Any) -> Any:
        return jax.nn.softmax(x, -1)

    def backward(y: Any, g: Any) -> Any:
        return y * (g - (g * y).sum(-1, keepdims=True))

    right, wrong = jax.custom_vjp(f), jax.custom_vjp(f)
    right.defvjp(lambda x: (f(x), f(x)), lambda y, g: (backward(y, g),))
    wrong.defvjp(lambda x: (f(x), f(x)), lambda y, g: (backward(y, g).at[7].set(0),))
    x = jax.random.normal(jax.random.key(0), (64, 50))
    assert plainly(right, x, seed=2)
    assert plainly(wrong, x, seed=2).verdict == "refuted"
