"""What the fused head tells of each token beside its loss: the entropy and the prediction."""

from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jaxact

INF = float("inf")


def auxiliary(logits: Any, labels: Any) -> Any:
    """Of these very logits, row by row; they are the bias."""

    def of_row(row: Any, label: Any) -> Any:
        x, w = jnp.zeros((1, 1), row.dtype), jnp.zeros((1, row.size), row.dtype)
        return jaxact.linear_cross_entropy(x, w, label[None], bias=row, return_aux=True)[1]

    return jax.tree.map(jnp.ravel, jax.vmap(of_row)(logits, labels))


def exact_entropy(row: list[float]) -> tuple[Any, list[Any], list[Any]]:
    """The entropy, its gradient, and the sizes of the terms of that."""
    d = [max(row) - mpmath.mpf(a) for a in row]
    total = mpmath.fsum(mpmath.exp(-a) for a in d)
    p = [mpmath.exp(-a) / total for a in d]
    mean = mpmath.fsum(a * b for a, b in zip(p, d, strict=True))
    terms = list(zip(p, d, strict=True))
    return mpmath.log(total) + mean, [a * (b - mean) for a, b in terms], [a * (b + mean) for a, b in terms]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_entropy_of_confident_and_of_tied_rows(dtype: str) -> None:
    # Of a sum in which one class has 1, the others `gap` below it leave no digits from 17 on (37 in float64). On either
    # side of 0.86 one class has more than half, and the formula is another.
    gaps = (1e-6, 0.5, 0.8, 0.9, 1, 5, 17, 20, 40, 80, 2000)
    rows = [[0.0, -gap, -gap - 3, -2 * gap] for gap in gaps]
    rows += [[1.0, 1.0, -9.0, 1.0], [-7.0, 3.0, 3.0, -7.0], [0.0] * 4, [-30.0, 50.0, -30.0, 30.0]]
    with jax.enable_x64(dtype == "float64"), mpmath.workdps(60):  # e⁻⁸⁰ beside 1 takes 35 digits
        logits = np.array(rows, dtype)
        unit, lost = float(np.finfo(dtype).eps) / 2, 2 * float(np.finfo(dtype).tiny)

        @jax.jit
        def run(logits: Any, labels: Any) -> Any:
            of_each, pull = jax.vjp(lambda z: auxiliary(z, labels).entropy, logits)
            return of_each, *pull(jnp.ones_like(of_each))

        worst = [0.0, 0.0]
        for label in range(4):  # the likeliest class, and others
            of_each, slopes = (np.asarray(a, np.float64) for a in run(logits, np.full(len(logits), label)))
            for row, got, slope in zip(logits.tolist(), of_each, slopes, strict=True):
                want, gradient, sizes = exact_entropy(row)
                worst[0] = max(worst[0], float((abs(got - want) - lost) / (unit * want + lost)))
                for a, b, size in zip(slope, gradient, sizes, strict=True):
                    worst[1] = max(worst[1], float((abs(a - b) - lost) / (unit * size + lost)))
    # An exponential has 2 u, a sum of four 2, and a product and a quotient 1 each: of the mean distance the numerator
    # has 5 and the denominator 4. A slope has that, and as much in its probability, and two operations.
    assert worst[0] <= 9, worst  # measured 3.4
    assert worst[1] <= 16, worst  # measured 5.2


def test_the_prediction_is_the_first_of_the_largest() -> None:
    logits = np.array(
        [[0, 5, 5, 1], [7, 7, 7, 7], [-1, -2, -1, -3], [1, INF, 2, INF], [-INF, -INF, 0, -INF]], np.float32
    )
    want = logits.argmax(-1)
    assert want.tolist() == [1, 0, 0, 1, 2]
    for f in (auxiliary, jax.jit(auxiliary)):
        aux = f(logits, want)
        assert aux.predicted.tolist() == want.tolist()
        assert aux.correct.all()


@pytest.mark.long
def test_many_tokens_beside_the_chunks() -> None:
    # In XLA of JAX 0.10, what is made of sums and two slices' transpose may write nowhere: then this process ends.
    rng, (n, features, classes) = np.random.default_rng(0), (9000, 8, 20)
    x, w = (rng.normal(size=size).astype(np.float32) for size in ((n, features), (features, classes)))
    labels = rng.integers(0, classes, n)

    def total(x: Any, chunk: int) -> Any:
        loss, aux = jaxact.linear_cross_entropy(x, w, labels, chunk=chunk, return_aux=True)
        return n * loss + aux.entropy.sum()

    got, want = jax.jit(lambda x: [jax.grad(total)(x, chunk) for chunk in (4100, n)])(x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # sums of 20 products of size 1, in another order


@pytest.mark.parametrize("logits", [[20.0, 0.0], [12.0, 0.0, -3.0], [0.3, -0.4, 0.1]])
def test_second_derivatives_of_the_entropy_where_one_class_has_nearly_all(logits: list[float]) -> None:
    def entropy(row: Any) -> Any:
        return auxiliary(row[None], np.zeros(1, int)).entropy[0]

    row = np.array(logits, np.float32)
    with mpmath.workdps(60):
        h = mpmath.mpf(10) ** -20  # its square is left of a central difference
        moved = [
            [[mpmath.mpf(float(a)) + s * (i == j) for i, a in enumerate(row)] for s in (h, -h)] for j in range(len(row))
        ]
        slopes = [[exact_entropy(at)[1] for at in both] for both in moved]
        want = np.array([[float((u - d) / (2 * h)) for u, d in zip(up, down, strict=True)] for up, down in slopes])
    for hessian in (jax.hessian(entropy), jax.jacrev(jax.jacrev(entropy))):
        # Probabilities and distances that have 8 u, in sums of products of up to three of them, some of which cancel.
        np.testing.assert_allclose(jax.jit(hessian)(row), want, rtol=64 * 2.0**-24)
