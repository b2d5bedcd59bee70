"""Second derivatives in every pair of arguments, labels and options among them, against autodiff of the textbook's.

And those beside entries, rows and terms that do not count, of which nothing may be left.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxact
from jaxact import losses

W = np.random.default_rng(0).normal(size=(3, 5))
X = np.random.default_rng(1).normal(size=(2, 3))
PLACES = jnp.array([2, 0])


def logsumexp(x: Any) -> Any:
    return jnp.log(jnp.sum(jnp.exp(x), -1))


def binary(x: Any, y: Any, pos_weight: Any) -> Any:
    return jnp.sum(pos_weight * y * jnp.log1p(jnp.exp(-x)) + (1 - y) * jnp.log1p(jnp.exp(x)))


def focal(x: Any, y: Any, alpha: Any, gamma: Any) -> Any:
    p = 1 / (1 + jnp.exp(-x))
    entropy = -y * jnp.log(p) - (1 - y) * jnp.log(1 - p)
    return jnp.sum((alpha * y + (1 - alpha) * (1 - y)) * ((1 - y) * p + y * (1 - p)) ** gamma * entropy)


def of_labels(z: Any, y: Any, smoothing: Any, z_loss: Any, weights: Any) -> Any:
    log_p, lse = z - logsumexp(z)[..., None], logsumexp(z)
    at_label = weights[y] * jnp.take_along_axis(log_p, y[..., None], -1)[..., 0]
    spread = smoothing / z.shape[-1] * jnp.sum(weights * log_p, -1)
    return -(1 - smoothing) * at_label - spread + z_loss * lse**2


def our_focal(*arguments: Any) -> Any:
    return losses.sigmoid_focal_loss(*arguments).sum()


def adjusted(z: Any, cap: Any, temperature: Any) -> Any:
    return cap * jnp.tanh(z / cap) / temperature


def head(x: Any, w: Any, cap: Any, temperature: Any, token_weight: Any, *options: Any) -> Any:
    return token_weight * of_labels(adjusted(x @ w, cap, temperature), PLACES, *options)


def our_head(x: Any, w: Any, cap: Any, temperature: Any, weight: Any, smoothing: Any, z_loss: Any, each: Any) -> Any:
    return jaxact.linear_cross_entropy(
        x, w, PLACES, logit_softcap=cap, temperature=temperature, token_weight=weight, label_smoothing=smoothing,
        z_loss=z_loss, class_weight=each, reduction="none",
    )  # fmt: skip


def with_entropy(x: Any, w: Any) -> Any:
    _, aux = jaxact.linear_cross_entropy(x, w, PLACES, return_aux=True)
    return jnp.sum(aux.log_sum_exp**2 * aux.entropy)


def entropy(x: Any, w: Any) -> Any:
    log_p = x @ w - logsumexp(x @ w)[:, None]
    return jnp.sum(logsumexp(x @ w) ** 2 * -jnp.sum(jnp.exp(log_p) * log_p, -1))


SOFT, HARD = [0.2, 0.5, 0.3], [1.0, 0.0, 1.0]
OPTIONS = (0.1, 0.3, [1.0, 2.0, 0.5, 1.0, 0.7])
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = {
    "binary": (
        lambda x, y, w: losses.sigmoid_binary_cross_entropy(x, y, pos_weight=w).sum(),
        binary,
        ([1.0, 2.0, 0.0], HARD, [0.5, 1.0, 2.0]),
    ),
    **{
        f"focal, {name}": (our_focal, focal, (x, y, 0.25, gamma))
        for name, x, y, gamma in (
            ("soft", [1.0, 0.0, -1.0], SOFT, 1.5),
            ("hard", [0.0, 0.0, -1.0], HARD, 2.0),
            ("of no power", [0.0, -2.0, 0.5], HARD, 0.0),
        )
    },
    "logsumexp": (
        lambda a, b: jaxact.logsumexp(a, b=b),
        lambda a, b: jnp.log(jnp.sum(b * jnp.exp(a))),
        ([1.0, 1.0, -1.0], [1.0, 0.0, 2.0]),
    ),
    "softmax": (
        lambda x, t: jaxact.softmax(x, temperature=t)[0],
        lambda x, t: jnp.exp(x[0] / t - logsumexp(x / t)),
        ([2.0, 2.0, -1.0], 1.7),
    ),
    "soft labels": (
        losses.softmax_cross_entropy,
        lambda x, q: -jnp.vdot(q, x - logsumexp(x)),
        ([2.0, 2.0, -1.0], [0.0, 1.0, 0.0]),
    ),
    # The losses of tokens are combined by a product, whose second derivative has that of each and the first of both.
    "head": (
        lambda *a: jnp.prod(our_head(*a)),
        lambda *a: jnp.prod(head(*a)),
        (X, W, 5.0, 1.3, [1.0, 2.0], *OPTIONS),
    ),
    "head, extras": (with_entropy, entropy, (X, W)),
}


def few(cases: Any, *slow: str) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.exhaustive] if name in slow else []) for name in cases]


@functools.cache
def derivatives(*ways: tuple[Callable[..., Any], Any, Any]) -> Any:
    """By each way, a function and two modes: its first and second derivatives in all arguments.

    They are one program, for all cases of the same functions: most of the time is that of its compilation.
    """

    def by(f: Callable[..., Any], inner: Any, outer: Any, *arguments: Any) -> Any:
        every = tuple(range(len(arguments)))

        def twice(*arguments: Any) -> Any:
            return (inner(f, every)(*arguments),) * 2

        return jax.tree.leaves(outer(twice, every, has_aux=True)(*arguments))

    return jax.jit(lambda *arguments: [by(*way, *arguments) for way in ways])


@pytest.mark.long
@pytest.mark.parametrize("name", few(CASES, "head"))
def test_second_derivatives_in_every_pair_of_arguments(name: str, x64: None) -> None:
    ours, textbook, given = CASES[name]
    run = derivatives((ours, jax.grad, jax.jacfwd), (textbook, jax.grad, jax.jacfwd))
    for got, want in zip(*run(*(np.asarray(a, float) for a in given)), strict=True):
        # The textbook's formulas lose some digits of 16; a term that is missing is some hundredths at least.
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-10, atol=1e-11)


INF, NAN = float("inf"), float("nan")
integer_loss = losses.softmax_cross_entropy_with_integer_labels


def of_rows_that_count(z: Any, cap: Any, temperature: Any, smoothing: Any, z_loss: Any, weights: Any) -> Any:
    return jnp.sum(of_labels(adjusted(z[:1], cap, temperature), PLACES[:1], smoothing, z_loss, weights) ** 2)


def our_rows_that_count(z: Any, cap: Any, temperature: Any, smoothing: Any, z_loss: Any, weights: Any) -> Any:
    loss = integer_loss(
        z, jnp.array([2, -1]), ignore_index=-1, logit_softcap=cap, temperature=temperature, label_smoothing=smoothing,
        z_loss=z_loss, class_weight=weights,
    )  # fmt: skip
    return jnp.sum(loss**2)


def of_unmasked(x: Any) -> Any:
    log_p = x[:2] - logsumexp(x[:2])
    return -jnp.sum(jnp.exp(log_p) * log_p)


def our_masked(x: Any) -> Any:
    mask = jnp.array([True, True, False])
    return -jnp.sum(jnp.where(mask, jaxact.softmax(x, where=mask) * jaxact.log_softmax(x, where=mask), 0))


def our_weightless(reduction: Any) -> Callable[..., Any]:
    return lambda x, w, token_weight: jnp.sum(
        jaxact.linear_cross_entropy(x, w, PLACES, token_weight=token_weight, reduction=reduction) ** 2
    )


def our_weighted(a: Any) -> Any:
    return 3 * jaxact.logsumexp(a, b=jnp.array([0.0, 1.0, 2.0]))  # 3 times a large number is infinite


def of_weighted(a: Any) -> Any:
    return 3 * logsumexp(a[1:] + jnp.log(jnp.array([1.0, 2.0])))


BESIDE: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]
BESIDE = {f"ignored rows of {a}": (our_rows_that_count, of_rows_that_count, (
    [[1.0, 1.0, -2.0], [a, 0.0, a]], 5.0, 1.3, 0.1, 0.3, [1.0, 2.0, 0.5])) for a in (NAN, 1e3)}  # fmt: skip
IGNORED = tuple(BESIDE)
BESIDE |= {f"a weight of 0 at {a}": (our_weighted, of_weighted, ([a, 0.0, 1.0],)) for a in (1e3, INF, NAN, -INF)}
BESIDE |= {
    "a class that does not exist": (
        lambda z, e, w: integer_loss(z, 0, label_smoothing=e, class_weight=w),
        lambda z, e, w: of_labels(z[None, :2], jnp.array([0]), e, 0, w[:2])[0],
        ([1.0, 2.0, -INF], 0.1, [1.0, 2.0, 3.0]),
    ),
    "the entropy of what is not masked": (our_masked, of_unmasked, ([1.0, 2.0, 3.0],)),
    **{
        f"a token of no weight, {reduction}": (
            our_weightless(reduction),
            lambda x, w, weight, total=total: total(weight * of_labels(x @ w, PLACES, 0, 0, jnp.ones(5))),
            (X, W, [0.0, 2.0]),
        )
        for reduction, total in (("sum", lambda a: jnp.sum(a) ** 2), ("none", lambda a: jnp.sum(a**2)))
    },
}


@pytest.mark.long
@pytest.mark.parametrize("name", few(BESIDE, *IGNORED, "a token of no weight, none"))
def test_what_does_not_count_is_in_no_derivative(name: str, x64: None) -> None:
    ours, textbook, given = BESIDE[name]
    want, *ours_in_both = derivatives(
        (textbook, jax.jacrev, jax.jacrev), (ours, jax.jacfwd, jax.jacfwd), (ours, jax.jacrev, jax.jacrev)
    )(*(np.asarray(a, float) for a in given))
    for got in ours_in_both:
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-10, atol=1e-11)  # as above
