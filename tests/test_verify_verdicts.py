"""What the verifier must not convict, what it must not let pass, and where it must say that it does not know.

A minute of corners, which `.ci/run --all` visits with one version of JAX.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import custom_vmap

import jaxact
from jaxact import losses, verify

pytestmark = pytest.mark.exhaustive

X = jnp.linspace(-2.0, 2.0, 5)


def with_rule(f: Any, forward: Any, backward: Any, **options: Any) -> Any:
    g = jax.custom_vjp(lambda *args: f(*args))
    g.defvjp(forward, backward, **options)
    return g


def sine(slope: Any = lambda x, g: g * jnp.cos(x)) -> Any:
    return with_rule(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, g: (slope(x, g),))


def brief(f: Any, *args: Any, **options: Any) -> verify.Report:
    return verify.rule(f, *args, **{"edges": None, "transforms": (), **options})


# Where it does not know.


def series(x: Any) -> Any:
    """sin x to an ulp or two of float32 for |x| < ¾, with a derivative that is off by 3e-6."""
    return x * (1 - x * x / 6 * (1 - x * x / 20 * (1 - x * x / 42)))


@pytest.mark.parametrize("f", [series, with_rule(series, lambda x: (series(x), x), lambda x, g: (g * jnp.cos(x),))])
def test_differences_of_a_numpy_reference_are_not_overruled(f: Any) -> None:
    x = jnp.array([0.25, 0.5, 0.75])
    report = brief(f, x, reference=np.sin)
    assert report.verdict == "inconclusive", str(report)
    assert "reference in NumPy, sin" in report.facts["oracle"]
    assert brief(f, x, reference=jnp.sin).verdict == ("refuted" if f is series else "verified")


def product_of_positive(x: Any, y: Any) -> Any:
    """xy for y ≥ 0, nan below; at 0 by a program that has another derivative."""
    return jnp.where(y == 0, 0 * x + 0.3 * y, jnp.where(y < 0, jnp.nan, x * y))


def test_at_the_end_of_a_domain_the_side_within_counts() -> None:
    x, y = jnp.array([0.5, 1.0, 2.0]), jnp.zeros(3)

    def ruled(slope: Any) -> Any:
        return with_rule(
            product_of_positive,
            lambda x, y: (product_of_positive(x, y), (x, y)),
            lambda xy, g: (g * xy[1], g * slope(*xy)),
        )

    assert brief(ruled(lambda x, y: x), x, y).verdict == "verified"
    assert brief(ruled(lambda x, y: jnp.where(y == 0, 0.3, x)), x, y).verdict == "refuted"
    # Of all arguments at once a random direction leads out of the domain.
    hard = jnp.array([0.0, 1.0, 0.0])
    assert brief(lambda x, y: losses.sigmoid_binary_cross_entropy(x, y).mean(), x, hard).verdict == "verified"


def test_random_numbers_of_another_dtype_are_another_function() -> None:
    key = jax.random.key(0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32) * jnp.logspace(-3, 1, 64)
    programs: list[Any] = [
        (lambda x: jax.nn.softmax(x + jax.random.gumbel(key, x.shape)), jnp.linspace(-1.0, 1.0, 8)),
        (lambda x: jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0), x),
    ]
    for f, at in programs:
        report = brief(f, at)
        assert report.verdict == "inconclusive", str(report)
        assert "in float64 f computes something else" in report.reasons[0]
        assert "give it what is drawn, and not the key" in report.reasons[1]


def test_a_rule_that_takes_a_key() -> None:
    @jax.custom_vjp
    def dropout(x: Any, key: Any) -> Any:
        return jnp.where(keep(x, key), 2 * x, 0)

    def keep(x: Any, key: Any) -> Any:
        return jax.random.bernoulli(key, jnp.float32(0.5), x.shape)  # the same draws in float64

    dropout.defvjp(lambda x, key: (dropout(x, key), keep(x, key)), lambda kept, g: (jnp.where(kept, 2 * g, 0), None))
    x, key = jnp.linspace(-1.0, 2.0, 7), jax.random.key(0)
    of_slopes = functools.partial(brief, dropout, x, key, edges=None)
    assert of_slopes(derivative=lambda x, key: np.where(keep(x, key), 2.0, 0.0)).verdict == "verified"
    report = of_slopes(derivative=lambda x, key: np.where(jax.random.bernoulli(key, 0.5, x.shape), 2.0, 0.0))
    assert report.verdict == "refuted"
    assert "if the random numbers that f draws are others in float64" in report.reasons[1]


def test_whole_numbers_do_not_round() -> None:
    # How far the oracle may be off is measured by rounding otherwise; a label that moves is no label.
    x, labels = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32), jnp.arange(6) % 5
    report = brief(losses.softmax_cross_entropy_with_integer_labels, x, labels)
    assert report.ok, str(report)
    # Of 16 bits it is not told, but they can be inside; the derivative here has no more.
    assert brief(lambda x: (x.astype("bfloat16") * 2 + 1).astype(x.dtype), jnp.ones(2)).verdict == "refuted"


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (jax.nn.relu, [0.0, 1.0]),
        (lambda x: jnp.maximum(x, 0), [0.0, 1.0]),  # ½, says autodiff, and so do central differences
        (lambda x: jnp.clip(x, -1, 1), [1.0, 0.3]),
        (jnp.max, [1.0, 2.0, 2.0]),
        (lambda x: jnp.abs(x) + x, [0.0, 2.0]),
    ],
)
def test_a_kink_is_inconclusive(f: Any, x: list[float]) -> None:
    assert brief(f, jnp.array(x)).verdict == "inconclusive"
    # A step beside it there is none.
    report = brief(f, jnp.array(x) * jnp.array([1.25, 1.5, 1.0][: len(x)]) + 0.125)
    assert report, str(report)


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (jnp.sqrt, [0.0, 1.0]),
        (jnp.log, [0.0, 1.0]),
        (lambda x: 1 / x, [0.0, 1.0]),
        (jaxact.sigmoid, [float("nan"), 1.0]),
        (lambda x: jnp.sqrt(jnp.sum(x * x, -1)), [[0.0, 0.0], [1.0, 2.0]]),
    ],
)
def test_an_infinite_derivative_is_inconclusive(f: Any, x: Any) -> None:
    report = verify.rule(f, jnp.array(x), transforms=())
    assert report.verdict == "inconclusive", str(report)


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (lambda x: x / jnp.sqrt(x * x + jnp.finfo(x.dtype).eps), [1e-4]),
        (lambda x: jnp.tanh(x) * jax.random.normal(jax.random.key(0), x.shape, x.dtype), [1.0, 2.0, 3.0]),
    ],
)
def test_a_function_that_is_another_in_float64_is_inconclusive(f: Any, x: list[float]) -> None:
    report = verify.rule(f, jnp.array(x), transforms=())
    assert report.verdict == "inconclusive", str(report)
    assert "in float64 f computes something else" in report.reasons[0]


def test_edges_are_for_an_elementwise_function() -> None:
    report = brief(jaxact.softmax, X, edges={0.0: 99.0})
    assert report.verdict == "inconclusive"
    assert report.reasons == ("edges are for an elementwise function, and f is not elementwise at args",)


# What is right, though it looks otherwise.


@pytest.mark.parametrize("bound", [None, 8.0])
def test_a_false_zero_in_float16_where_small_numbers_are_not_flushed(bound: float | None) -> None:
    @jax.custom_vjp
    def sigmoid(x: Any) -> Any:
        return 1 / (1 + jnp.exp(-x))

    sigmoid.defvjp(lambda x: (sigmoid(x),) * 2, lambda y, g: (g * y * (1 - y),))
    x = jnp.array([0.0, 8.0], jnp.float16)
    options: dict[str, Any] = {} if bound is None else {"bound": bound}
    report = verify.rule(sigmoid, x, transforms=(), **options)
    assert report.verdict == "refuted"
    assert "has cancelled" in report.reasons[0]
    assert verify.rule(jaxact.sigmoid, x, transforms=(), **options).verdict == "verified"


def test_a_function_that_oscillates_from_one_number_to_the_next() -> None:
    def f(x: Any) -> Any:
        return jnp.sin(x) * jnp.cos(2 * x + 1)

    for seed in range(3):
        report = verify.rule(f, X, transforms=(), seed=seed)
        assert report.verdict == "verified", str(report)

    # What lies in between is still looked at.
    def slope(x: Any) -> Any:
        return jnp.where(x == 30, 0, jnp.cos(x) * jnp.cos(2 * x + 1) - 2 * jnp.sin(x) * jnp.sin(2 * x + 1))

    wrong = with_rule(f, lambda x: (f(x), x), lambda x, g: (g * slope(x),))
    assert verify.rule(wrong, X, transforms=()).reasons[0].startswith("at x = 30, ")


def test_rows_that_no_sampled_column_reaches() -> None:
    # Their derivatives are known all the same, from the rows that are sampled.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 128)), jnp.float32)
    report = verify.rule(jaxact.softmax, x, transforms=())
    assert report.verdict == "verified", str(report)


def test_one_number_does_not_make_a_function_elementwise() -> None:
    product = verify.rule(lambda x: jaxact.sigmoid(x) * jnp.mean(jaxact.sigmoid(x)), X[3:4], transforms=())
    total = verify.rule(lambda x: jnp.sum(jaxact.sigmoid(x)), 3.0, transforms=())
    for report in (product, total):
        assert report, str(report)
        assert "absent" in [c.verdict for c in report.checks if c.name == "edges"], str(report)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: Any) -> Any:
        return jnp.sin(x)


def test_what_cannot_be_hashed_and_typed_keys() -> None:
    for report in (
        verify.rule(Unhashable(), X, edges=None),
        verify.rule(lambda x, s: jnp.sin(x[s["from"] :]), X, {"from": 2}, transforms=("jit",)),
        verify.rule(lambda x, s: jnp.sin(x) * len(s), X, {1, 2}, transforms=("jit",), edges=None),
        verify.rule(lambda k, x: jnp.sin(x), jax.random.key(0), X, transforms=("jit",)),
        brief(jnp.sin, X, reference=Unhashable()),
    ):
        assert report, str(report)


def test_a_rule_that_was_mended_is_judged_anew_behind_a_wrapper() -> None:
    f = sine(lambda x, g: 2 * g * jnp.cos(x))

    def wrapper(x: Any) -> Any:
        return f(x)

    assert brief(wrapper, X, transforms=("jit",)).verdict == "refuted"
    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    assert brief(wrapper, X, transforms=("jit",)).verdict == "verified"


def test_constants_at_order_2() -> None:
    power = jax.custom_vjp(lambda x, n: jnp.sin(x) * n, nondiff_argnums=(1,))
    power.defvjp(lambda x, n: (jnp.sin(x) * n, x), lambda n, x, g: (g * n * jnp.cos(x),))
    for report in (brief(power, X, 3, order=2), brief(lambda x, s: jnp.sin(x) if s else x, X, True, order=2)):
        assert report, str(report)
        (found,) = (c for c in report.checks if c.name == "order 2")
        assert "worst element off by" in found.detail


def test_a_program_with_complex_numbers_inside() -> None:
    report = brief(lambda x: jnp.abs(x + 1j), jnp.array([0.0, 1.0]))
    assert report, str(report)


def test_a_program_that_has_another_value_at_one_point() -> None:
    # Autodiff of logaddexp without its rule has a slope of 0 at a tie, and ½ around it.
    @jaxact.forward_mode
    @jax.custom_vjp
    def softplus(x: Any) -> Any:
        return jnp.logaddexp(x, 0)

    softplus.defvjp(lambda x: (softplus(x), x), lambda x, g: (g * jaxact.sigmoid(x),))
    report = brief(softplus, jnp.linspace(-20, 20, 9), order=2, derivative=lambda x: 1 / (1 + jnp.exp(-x)))
    assert report, str(report)


# What is wrong, though in one place alone.


@pytest.mark.parametrize("how", ["rule", "function"])
def test_a_value_that_is_wrong_in_the_sweep_alone(how: str) -> None:
    def swish(x: Any) -> Any:
        return x * jaxact.sigmoid(x)

    def wrong(x: Any) -> Any:
        return jnp.where(x > 50, 0, swish(x))

    def backward(x: Any, g: Any) -> Any:
        return (g * jaxact.sigmoid(x) * (1 + x * jaxact.sigmoid(-x)),)

    f = with_rule(swish if how == "rule" else wrong, lambda x: (wrong(x), x), backward)
    report = verify.rule(f, X, reference=None if how == "rule" else jax.nn.silu, transforms=())
    assert report.verdict == "refuted"
    whose = "the reverse rule's own primal is 0" if how == "rule" else "the reference is 50"
    assert report.reasons[0].startswith("at x = 50"), report.reasons
    assert whose in report.reasons[0]


def test_a_rule_that_is_wrong_for_a_batch_of_cotangents_alone() -> None:
    @custom_vmap
    def times_sine(a: Any, b: Any) -> Any:
        return a * jnp.sin(b)

    @times_sine.def_vmap
    def _(size: int, batched: Any, a: Any, b: Any) -> Any:
        return (a if all(batched) else 2 * a) * jnp.sin(b), True

    f = with_rule(
        lambda a, b: a * jnp.sin(b),
        lambda a, b: (a * jnp.sin(b), (a, b)),
        lambda kept, g: (times_sine(g, kept[1]), g * kept[0] * jnp.cos(kept[1])),
    )
    report = brief(f, X, X + 1, transforms=("vmap",))
    assert report.reasons == ("reverse mode is wrong for a batch of vectors alone",)


def test_a_batch_that_is_wrong_where_each_row_alone_is_right() -> None:
    @custom_vmap
    def twice(x: Any) -> Any:
        return 2 * x

    twice.def_vmap(lambda size, batched, x: (2 * x + (size > 100), batched[0]))
    report = verify.rule(with_rule(twice, lambda x: (twice(x), None), lambda _, g: (2 * g,)), X, transforms=("vmap",))
    assert "a batch of 4096" in report.reasons[0]
    assert "alone, which is right (element" in report.reasons[0]


def test_a_rule_that_is_wrong_where_one_argument_is_constant() -> None:
    product = with_rule(
        lambda a, b: a * b,
        lambda a, b: (a.value * b.value, (a.value, b.value, 1.0 if a.perturbed and b.perturbed else 2.0)),
        lambda kept, g: (kept[1] * g * kept[2], kept[0] * g * kept[2]),
        symbolic_zeros=True,
    )
    report = brief(product, X, X + 1)
    assert "with one argument differentiated and the others not, reverse mode is wrong" in report.reasons[0]


def test_a_rule_that_is_wrong_for_small_cotangents_alone() -> None:
    assert brief(sine(lambda x, g: jnp.where(abs(g) < 1e-6, 0, g) * jnp.cos(x)), X).verdict == "refuted"


def test_a_rule_that_is_wrong_where_x64_is_on_alone(x64: None) -> None:
    def backward(x: Any, g: Any) -> Any:
        return g * jnp.cos(x) * (2 if jnp.arange(1.0).dtype == jnp.float64 else 1)

    assert brief(sine(backward), jnp.float32(X)).verdict == "refuted"


def test_the_diagnosis_of_a_symmetric_jacobian() -> None:
    def slightly_off(y: Any, g: Any) -> Any:
        return (1.000003 * (y * g - y * jnp.sum(y * g)),)

    report = brief(with_rule(jaxact.softmax, lambda x: (jaxact.softmax(x),) * 2, slightly_off), jnp.arange(4.0))
    assert report.verdict == "refuted"
    assert "transposed" not in report.reasons[0]


def test_a_contract_without_forward_mode() -> None:
    report = verify.contract(sine(), X)
    assert {c.name: c.verdict for c in report.checks} == {"reverse": "verified", "forward": "absent"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": "2"}, TypeError, "order must be an int, got '2'"),
        ({"order": 1.5}, TypeError, "order must be an int, got 1.5"),
        ({"reference": lambda x: jnp.ones(2)}, ValueError, r"reference must return .* \[\(5,\)\], got \[\(2,\)\]"),
        ({"reference": lambda x: np.ones(2)}, ValueError, r"reference must return .* \[\(5,\)\], got \[\(2,\)\]"),
    ],
)
def test_errors_name_the_argument(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        verify.rule(jnp.sin, X, **options)


def test_complex_arguments_and_results_are_refused() -> None:
    for f, args in ((lambda x: (jnp.sin(x), 1j * x), (X,)), (lambda z, x: abs(z) * x, (X + 1j, X))):
        with pytest.raises(TypeError, match="arguments and results of f must be real, got complex64"):
            verify.rule(f, *args)


def test_one_transformation_as_a_string() -> None:
    names = [c.name for c in verify.rule(jnp.sin, X, transforms="jit", edges=None).checks]
    assert "reverse, jit" in names
    assert "reverse, remat" not in names


# Where there is no derivative, or what is given is not finite.


def with_slope(f: Any, slope: Any) -> Any:
    return with_rule(f, lambda x: (f(x), x), lambda x, g: (g * slope(x),))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kink_in_the_sweep(dtype: str) -> None:
    """No slope there is known, but none is nan, or beyond those beside it."""
    x = jnp.linspace(-3, 3, 12).astype(dtype)
    nan, seven = lambda x: x / jnp.abs(x), lambda x: jnp.where(x == 0, 7, jnp.sign(x))
    for slope, due in (nan, "where f is 0"), (seven, "gives 7 where the slopes beside it are -1 and 1"):
        report = verify.rule(with_slope(jnp.abs, slope), x, transforms=())
        assert report.verdict == "refuted"
        assert "at x = -0, reverse mode gives" in report.reasons[0]
        assert due in report.reasons[0]
        assert "jnp.array([-0.0]" in report.witness
    hinge, one = lambda x: jnp.maximum(0, 1 - x), lambda x: jnp.where(x == 1, jnp.nan, jnp.where(x < 1, -1, 0))
    report = verify.rule(with_slope(hinge, lambda x: one(x).astype(x.dtype)), x, transforms=())
    assert "at x = 1, reverse mode gives nan" in report.reasons[0]
    # Any number between them will do, and so does no number where there is no slope: of a root at 0 it is infinite.
    for f in (jax.nn.relu, jnp.sqrt):
        report = verify.rule(f, jnp.abs(x), transforms=())
        assert report.ok, str(report)
        assert "not known at" in str(report)


def test_infinite_arguments() -> None:
    """They are exact, so that others may still be rounded; and what is infinite has no derivative that is known."""
    x: Any = np.float32(np.random.default_rng(0).normal(size=(2, 4)))
    x[0, 1] = -np.inf
    report = verify.rule(jaxact.softmax, x)
    assert report.ok, str(report)
    x[0, 1] = np.inf
    report = verify.rule(
        lambda x: losses.softmax_cross_entropy_with_integer_labels(x, np.zeros(2, np.int32)), x, transforms=()
    )
    assert report.verdict == "inconclusive", str(report)
    assert "f is not finite there" in report.reasons[0]
    x[0, 1] = np.nan
    report = verify.rule(lambda x: jnp.exp(jnp.where(x > -9, x, -9)), x, transforms=())
    assert report.verdict != "refuted", str(report)


def test_a_forward_pass_that_is_wrong_under_a_transformation_alone() -> None:
    @custom_vmap
    def normalised(x: Any) -> Any:
        return jax.nn.softmax(x)

    @normalised.def_vmap
    def _(size: int, batched: Any, x: Any) -> Any:
        return jax.nn.softmax(x, axis=0), True

    def with_forward(value: Any, f: Any, backward: Any) -> Any:
        g = jax.custom_vjp(f)
        g.defvjp(lambda x: (value(x), x), backward)
        return g

    def of_softmax(x: Any, g: Any) -> Any:
        return jax.vjp(jax.nn.softmax, x)[1](g)

    rules = {
        "in a batch": with_forward(normalised, lambda x: jax.nn.softmax(x), of_softmax),
        "under jit": with_forward(
            lambda x: jnp.sin(x) * (1.1 if isinstance(x, jax.core.Tracer) else 1),
            jnp.sin,
            lambda x, g: (g * jnp.cos(x),),
        ),
    }
    for where, f in rules.items():
        report = verify.rule(f, jnp.array([1.0, 2.0, 3.0]))
        assert report.verdict == "refuted", str(report)
        assert any(f"the reverse rule's own primal {where} is " in reason for reason in report.reasons)
        assert verify.rule(f, jnp.array([1.0, 2.0, 3.0]), transforms=())  # nor is it looked at


@pytest.mark.parametrize("most", [1.0, 1e4, 1e8])
def test_a_rule_that_clips_its_cotangent(most: float) -> None:
    f = jax.custom_vjp(lambda x: x)
    f.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -most, most),))
    report = brief(f, jnp.array([1.0, 2.0, 3.0]))
    assert report.verdict == "refuted", str(report)
    if most > 1e4:
        assert "the backward rule is not linear: for 1.07e+09 times a cotangent" in report.reasons[0]
