"""Every function, its gradient, its pushforward and its Hessian lower for every platform, without having one."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import jaxact
from jaxact import losses

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def head(x: Array, reduction: Literal["mean", "none"]) -> Array:
    """Of rows of four features, which are the projection too."""
    rows = x.reshape(-1, 4)
    labels = jnp.arange(rows.shape[0]).reshape(x.shape[:-1])
    return jaxact.linear_cross_entropy(x, rows.T @ rows, labels, reduction=reduction, chunk=2)


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "sigmoid": jaxact.sigmoid,
    "log_sigmoid": jaxact.log_sigmoid,
    "softplus": jaxact.softplus,
    "logit": lambda x: jaxact.logit(x / 8 + jnp.asarray(0.5, x.dtype)),
    "softmax": jaxact.softmax,
    "masked_softmax": lambda x: jaxact.softmax(x, where=jnp.arange(x.shape[-1]) != 1),
    "warm_softmax": lambda x: jaxact.softmax(x, temperature=2.0),
    "log_softmax": jaxact.log_softmax,
    "logsumexp": lambda x: jaxact.logsumexp(x, axis=-1),
    "weighted_logsumexp": lambda x: jaxact.logsumexp(x, axis=-1, b=x * x + jnp.asarray(1, x.dtype)),
    "integer_loss": lambda x: losses.softmax_cross_entropy_with_integer_labels(x, jnp.full(x.shape[:-1], 2)),
    "dense_loss": lambda x: losses.softmax_cross_entropy(x, jnp.array([0.5, 0.25, 0, 0.25], x.dtype)),
    "binary_loss": lambda x: losses.sigmoid_binary_cross_entropy(x, jnp.array([0, 1, 0, 1])),
    "head": lambda x: head(x, "mean"),
    "head_none": lambda x: head(x, "none"),
    "focal_loss": lambda x: losses.sigmoid_focal_loss(x, jnp.array([0, 1, 0, 1]), gamma=2.0),
}


def derivatives(f: Callable[[Array], Array]) -> Callable[[Array], Any]:
    """Value, gradient, pushforward and Hessian, all at one point."""

    def scalar(x: Array) -> Array:
        y = f(x)
        return jnp.sum(y * np.cos(np.arange(y.size)).reshape(y.shape).astype(y.dtype))

    def at(x: Array) -> Any:
        return f(x), jax.grad(scalar)(x), jax.jvp(f, (x,), (jnp.ones_like(x),))[1], jax.hessian(scalar)(x)

    return at


@pytest.mark.parametrize(
    ("batched", "dtype"),
    [
        pytest.param(False, "float32", id="jit-float32"),
        pytest.param(True, "bfloat16", id="vmap-bfloat16", marks=pytest.mark.exhaustive),
        pytest.param(False, "bfloat16", id="jit-bfloat16", marks=pytest.mark.exhaustive),
        pytest.param(True, "float32", id="vmap-float32", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_lowers_for_every_platform_and_runs_here(
    name: str, batched: bool, dtype: str, request: pytest.FixtureRequest
) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), dtype)
    f = derivatives(FUNCTIONS[name])
    f = jax.jit(jax.vmap(f) if batched else f)
    exported = jax.export.export(f, platforms=PLATFORMS)(x)
    assert exported.platforms == PLATFORMS
    # What is lowered is what `jit` runs, in the tests of each function; that it is the same when it has been exported
    # is a matter of JAX, so that some will do.
    if name not in ("sigmoid", "softmax", "integer_loss") and not request.config.getoption("--exhaustive"):
        return
    # The exported program keeps a branch for each platform, and XLA fuses a branch by itself. So the sums, of a few
    # numbers of size 1, may round differently in float32, and the result's own rounding may then fall to either side.
    rtol = 2 * float(jnp.finfo(dtype).eps)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(
            np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=rtol, atol=8 * 2.0**-24
        ),
        exported.call(x),
        f(x),
    )


@pytest.mark.long
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "weighted_logsumexp", "integer_loss", "dense"])
def test_symbolic_shapes(name: str) -> None:
    f = FUNCTIONS[name] if name != "dense" else lambda x: losses.softmax_cross_entropy(x, x * x)

    @jax.jit
    def both(x: Array) -> Any:
        y, pullback = jax.vjp(f, x)
        return y, pullback(jnp.ones_like(y))[0]

    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for shape in "n, 4", "3, k":
        exported = jax.export.export(both)(jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32))
        for got, want in zip(exported.call(x), both(x), strict=True):
            np.testing.assert_allclose(got, want, rtol=2**-22, atol=8 * 2.0**-24)  # as above


def test_symbolic_shapes_of_the_head() -> None:
    # The number of chunks must be known, or be the number of tokens.
    x, w, labels = np.ones((3, 4), np.float32), np.eye(4, 7, dtype=np.float32), np.array([0, 1, 6], np.int32)
    exports: list[Any] = []
    for chunk in 1, 2:
        gradient = jax.value_and_grad(functools.partial(jaxact.linear_cross_entropy, chunk=chunk))
        f = jax.jit(lambda x, w, y, of=gradient: jax.jvp(lambda x: of(x, w, y), (x,), (x + 1,)))
        n, v = jax.export.symbolic_shape("n, v")
        given = ((n, 4), np.float32), ((4, v), np.float32), ((n,), np.int32)
        exports.append(functools.partial(jax.export.export(f), *(jax.ShapeDtypeStruct(*a) for a in given)))
    for got, want in zip(*map(jax.tree.leaves, (exports[0]().call(x, w, labels), f(x, w, labels))), strict=True):
        np.testing.assert_allclose(got, want, rtol=2**-22, atol=8 * 2.0**-24)  # as above
    with pytest.raises(ValueError, match=r"chunk must be 1 where shapes are symbolic, got 2 with \(n, 4\)"):
        exports[1]()
