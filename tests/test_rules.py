"""jaxact's own derivative rules, verified.

Here each has a bound of its own, and a default run has time for one. `python -m jaxact verify`, which `.ci/run --all`
runs, verifies all of them, and the losses' too, with the bound that users have.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxact
from jaxact import verify

# As the textbook has them. What they lose in float64 they do not lose in mpmath, where the verifier evaluates them.
TEXTBOOK: dict[str, Any] = {
    "sigmoid": lambda x: 1 / (1 + jnp.exp(-x)),
    "log_sigmoid": lambda x: -jnp.log(1 + jnp.exp(-x)),
    "softplus": lambda x: jnp.log(1 + jnp.exp(x)),
    "logit": lambda p: jnp.log(p / (1 - p)),
    "softmax": lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x), -1, keepdims=True),
    "log_softmax": lambda x: x - jnp.log(jnp.sum(jnp.exp(x), -1, keepdims=True)),
    "logsumexp": lambda x: jnp.log(jnp.sum(jnp.exp(x), -1)),
}
# Into both tails; and two points at which rounding in 16 bits leaves a second derivative visible.
LINE = np.append(np.linspace(-30, 30, 9), [-2, 0.5])
POINTS = {"logit": np.linspace(0.015, 0.975, 9)} | dict.fromkeys(["sigmoid", "log_sigmoid", "softplus"], LINE)
# At the scales 1, 10 and 30, and with one class that dominates; absent classes must not cost accuracy.
SCALED = np.random.default_rng(0).normal(size=(4, 4)) * [[1], [10], [30], [1]] + np.outer([0, 0, 0, 1], [0, 0, 50, 0])
ROWS = np.concatenate([SCALED, [[30, 0, -5, -1e4], [0.5, 0, -80, -1e4]]])
MILD = np.array([[8.0, 0, -5], [1, 2, 3], [0.5, 0, -80]])
DTYPES = ("float64", "float32", "bfloat16", "float16")
# In units of u·Σ|J||g|. exp has 2 u, so a probability has 6: its exponential 2, the sum's 2, the reciprocal and the
# product 2. A derivative of log_softmax has one probability, two roundings, and a sum's in the pushforward; one of
# softmax has two probabilities and two roundings. Elementwise functions have exp, and a few roundings: 2.4 ulp.
FIRST = {"softmax": 16.0, "log_softmax": 10.0, "logsumexp": 12.0}
# Products of three probabilities, and of two, in sums; of elementwise functions, a slope of 2.4 ulp and a tanh of it.
SECOND = {"softmax": 32.0, "log_softmax": 32.0, "logsumexp": 24.0}
NARROW = 4.0  # in 16-bit types: the rounding of the saved result, of the product, and half as much of others


def function(name: str) -> Any:
    return functools.partial(jaxact.logsumexp, axis=-1) if name == "logsumexp" else getattr(jaxact, name)


def rounded(x: np.ndarray, dtype: str) -> Any:
    return x if dtype == "float64" else jnp.asarray(x, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) == ("softmax", "float32") else [pytest.mark.exhaustive])
        for name in TEXTBOOK
        for dtype in DTYPES
    ],
)
def test_first_derivatives_are_verified(name: str, dtype: str) -> None:
    bound = FIRST.get(name, 5.0) if dtype in ("float64", "float32") else NARROW
    x = rounded(POINTS.get(name, ROWS), dtype)
    report = verify.rule(function(name), x, reference=TEXTBOOK[name], bound=bound)
    assert report.verdict == "verified", str(report)
    assert report.facts["modes"] == ["reverse", "forward"]
    assert report.facts.get("nan and ±inf in a batch", "as alone") == "as alone"


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_derivatives_are_verified(dtype: str) -> None:
    # As of logsumexp; and the sum loses no more than a fifth to its negative term.
    a, b = rounded(np.array([0.5, -1.0, 2.0, 1.0]), dtype), rounded(np.array([1.0, 0.0, 2.0, -0.5]), dtype)
    verify.rule(
        lambda a, b: jaxact.logsumexp(a, b=b),
        a,
        b,
        reference=lambda a, b: jnp.log(jnp.sum(b * jnp.exp(a))),
        bound=12.0 if dtype in ("float64", "float32") else NARROW,
        transforms=("jit",),
    ).raise_if_not_ok()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "dtype", "inner"),
    [(name, dtype, inner) for name in TEXTBOOK for dtype in DTYPES for inner in ("reverse", "forward")],
)
def test_second_derivatives_are_verified(name: str, dtype: str, inner: str) -> None:
    """In both modes, of the derivative by the `inner` mode along a random vector v."""
    # Beside the diagonal softmax's is −pᵢpⱼ(uᵢ + uⱼ) with u = v − ⟨v, p⟩, which cancels where uᵢ ≈ −uⱼ: in the third of
    # ROWS by a factor of 120 for one such v. test_softmax_derivatives.py measures it by its terms. Logsumexp's is the
    # derivative of softmax along v·g: where XLA contracts that product with what is subtracted from it, digits are lost
    # in a row that leaves less than 1e-10 to the other classes.
    x = rounded(POINTS.get(name, ROWS if name == "log_softmax" else MILD), dtype)
    bound = SECOND.get(name, 8.0)
    report = verify.rule(
        function(name), x, reference=TEXTBOOK[name], modes=inner, order=2, bound=bound, transforms=("jit",), edges=None
    )
    assert report.verdict == "verified", str(report)


@pytest.mark.long
def test_rules_on_eight_devices(on_eight_devices: Callable[..., str]) -> None:
    program = """
        import jax, numpy as np, jaxact
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from jaxact import verify
        assert len(jax.devices()) == 8
        x = np.float32(np.random.default_rng(0).normal(size=(2, 8)) * 5)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(kind,) * 2)
            with jax.set_mesh(mesh):
                put = jax.device_put(x, NamedSharding(mesh, P("rows", "classes")))
                for f in (jaxact.sigmoid, jaxact.softmax):
                    verify.rule(f, put, edges=None, transforms=("jit",), directions=1).raise_if_not_ok()
        print("verified")
    """
    assert on_eight_devices(program).strip() == "verified"
