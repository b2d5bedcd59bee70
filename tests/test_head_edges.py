"""The fused head at its edges, what it costs, and public defects of other fused heads."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.interpreters import partial_eval as pe

import jaxact

head: Any = jaxact.linear_cross_entropy
INF, NAN, U = float("inf"), float("nan"), 2.0**-24
D, V = 5, 11

# Edges.

N = 7
RNG = np.random.default_rng(1)
X, W = (RNG.normal(size=size).astype(np.float32) for size in ((N, D), (D, V)))
Y, BIAS = RNG.integers(0, V, N), RNG.normal(size=V).astype(np.float32)
CLOSE: dict[str, Any] = {"rtol": 64 * U, "atol": 64 * U}  # sums of at most 11 numbers of size 1, added in another order


@functools.partial(jax.jit, static_argnames=("reduction", "ignore_index"))
def both(x: Any, w: Any, labels: Any, bias: Any, where: Any, token_weight: Any, **options: Any) -> Any:
    """Value, and gradients of x and w, in chunks of 3."""
    given = {"bias": bias, "where": where, "token_weight": token_weight, "chunk": 3} | options

    def total(x: Any, w: Any) -> Any:
        loss = head(x, w, labels, **given)
        return loss.sum(), loss

    (_, value), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, w)
    return value, *gradients


def run(
    x: Any, w: Any = W, labels: Any = Y, bias: Any = None, where: Any = None, token_weight: Any = None, **options: Any
) -> Any:
    """With every array given, so that few programs are compiled."""
    bias = np.zeros(w.shape[-1], np.float32) if bias is None else np.float32(bias)
    where = np.ones(labels.shape, bool) if where is None else where
    return both(x, w, labels, bias, where, np.ones(labels.shape) if token_weight is None else token_weight, **options)


# What happens to a chunk is the same in both, and what comes before and after has tests below that run with both.
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.exhaustive)])


@REDUCTIONS
def test_no_tokens_and_one_class(reduction: str) -> None:
    ignored: dict[str, Any] = {"labels": np.full(N, -100)}
    nothing: list[dict[str, Any]] = [ignored, {"where": np.zeros(N, bool)}, {"token_weight": np.zeros(N)}]
    for given in nothing:
        assert not any(np.asarray(a).any() for a in run(X, **given, reduction=reduction))
    value, x_bar, w_bar = run(X[:0], labels=Y[:0], reduction=reduction)
    assert (value.shape, x_bar.shape) == (() if reduction == "mean" else (0,), (0, D))
    _, aux = jaxact.linear_cross_entropy(X, W[:, :0], Y, return_aux=True)
    assert aux.predicted.tolist() == [0] * N  # no class is predicted, and none is a label
    assert not np.asarray(aux.correct).any()
    alone = run(X, W[:, :1], np.zeros(N, int), reduction=reduction)
    assert not any(np.asarray(a).any() for a in (value, w_bar, *alone))


@REDUCTIONS
def test_a_label_out_of_range_is_nan(reduction: str) -> None:
    # Its row; and what is summed over rows.
    for label in (V, -1, 2**31 - 1, -(2**31)):
        value, x_bar, w_bar = run(X, labels=np.where(np.arange(N) == 4, label, Y), reduction=reduction)
        assert np.isnan(x_bar).all(-1).tolist() == [reduction == "mean" or i == 4 for i in range(N)]
        assert np.isnan(w_bar).all()
        assert np.isnan(value).tolist() == (True if reduction == "mean" else [i == 4 for i in range(N)])
    # −100 is a label like any other where it is not ignored.
    assert jnp.isnan(head(X, W, np.full(N, -100), ignore_index=None))


@REDUCTIONS
def test_absent_classes_and_offsets(reduction: str) -> None:
    here = np.flatnonzero(~np.isin(np.arange(V), Y))[0]
    got = run(X, bias=np.where(np.arange(V) == here, -INF, BIAS), reduction=reduction)
    want = list(run(X, np.delete(W, here, 1), Y - (here < Y), np.delete(BIAS, here), reduction=reduction))
    want[2] = np.insert(want[2], here, 0, 1)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    # Sixteenths: logits up to 2¹⁶ are exact.
    x, w, offset = np.round(X * 4) / 4, np.round(W * 4) / 4, np.full(V, 6e4)
    for a, b in zip(run(x, w, bias=offset, reduction=reduction), run(x, w, reduction=reduction), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@REDUCTIONS
def test_an_ignored_token_leaves_no_trace(reduction: str) -> None:
    odd = np.arange(N) % 2 == 1
    bad = np.where(odd[:, None], X, np.array([NAN, INF, -INF, 0, 1], np.float32))
    ways: list[dict[str, Any]] = [{"labels": np.where(odd, Y, -100)}, {"where": odd}]
    for given in ways:
        for got, want in zip(run(bad, **given, reduction=reduction), run(X, **given, reduction=reduction), strict=True):
            np.testing.assert_array_equal(got, want)
    assert not any(np.asarray(a).any() for a in run(bad, labels=np.full(N, -100), reduction=reduction))


def test_an_impossible_label_is_infinite() -> None:
    value, x_bar, w_bar = run(X, bias=np.where(np.arange(V) == Y[0], -INF, 0), reduction="none")
    assert value[0] == INF
    assert np.isfinite(x_bar).all()
    assert np.isfinite(w_bar).all()


evaluate = jax.jit(lambda labels, where=True: head(X, np.tile(W, 20), labels, where=where))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32"])
def test_labels_of_every_dtype(dtype: str) -> None:
    labels = np.array([3, 100, 127, 7, 0, 1, 2])
    assert evaluate(labels.astype(dtype)) == evaluate(labels)
    if dtype == "int8":
        assert evaluate(np.where(labels == 127, -100, labels).astype(dtype)) == evaluate(labels, labels != 127)
        assert jnp.isnan(evaluate(np.full(N, -128, dtype)))


def test_ignore_index_that_the_labels_cannot_hold() -> None:
    # −100 is 156 in uint8, and that is a class of its own.
    labels = np.array([156, 200, 219, 0, 1, 2, 3])
    assert head(X, np.tile(W, 20), labels.astype("uint8")) == head(X, np.tile(W, 20), labels)


@pytest.mark.long
@REDUCTIONS
def test_vmap(reduction: str) -> None:
    xs, ws, ys = np.stack([X, X[::-1], 2 * X]), np.stack([W, W[:, ::-1], W / 2]), np.stack([Y, Y[::-1], 0 * Y])
    one = functools.partial(run, reduction=reduction)
    for axes in ((None, 0, None), (0, None, 0)) if reduction == "mean" else ((0, 0, 0),):
        args = [a if axis == 0 else a[0] for a, axis in zip((xs, ws, ys), axes, strict=True)]
        got = jax.vmap(one, axes)(*args)
        for i in range(3):
            want = one(*(a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)))
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a[i], b, **CLOSE)


def test_options_that_are_traced() -> None:
    options = {"temperature": 0.5, "label_smoothing": 0.1, "z_loss": 0.1, "logit_softcap": 3.0}
    want = head(X, W, Y, **options)
    np.testing.assert_allclose(jax.jit(lambda o: head(X, W, Y, **o))(options), want, **CLOSE)
    nothing = {"temperature": 1.0, "label_smoothing": 0.0, "z_loss": 0.0}
    np.testing.assert_allclose(jax.jit(lambda o: head(X, W, Y, **o))(nothing), head(X, W, Y), **CLOSE)
    ts = np.array([0.5, 1, 2], np.float32)
    each = [head(X, W, Y, temperature=t) for t in ts]
    np.testing.assert_allclose(jax.vmap(lambda t: head(X, W, Y, temperature=t))(ts), each, **CLOSE)


def test_a_weight_of_0_leaves_out_an_infinite_loss() -> None:
    bias = np.where(np.arange(V) == Y[0], -INF, 0).astype(np.float32)
    weight = (Y[0] != Y).astype(np.float32)
    for reduction in ("sum", "none"):
        value, *gradients = run(X, bias=bias, token_weight=weight, reduction=reduction)
        assert np.isfinite(value).all()
        assert all(np.isfinite(g).all() for g in gradients)

        @jax.jit
        def of_weight(x: Any, weight: Any, reduction: str = reduction) -> Any:
            def total(x: Any, weight: Any) -> Any:
                return head(x, W, Y, bias=bias, token_weight=weight, reduction=reduction).sum()

            return jax.grad(total, 1)(x, weight), jax.jvp(total, (x, weight), (x, 0 * weight))[1]

        by_weight, pushed = of_weight(X, weight)
        np.testing.assert_allclose(pushed, np.vdot(gradients[0], X), **CLOSE)
        assert np.isfinite(by_weight).all()


def test_a_weight_of_0_does_not_hide_a_nan() -> None:
    # It is in the gradient of its token, and of w; `where` is for rows that may hold anything.
    x = X.copy()
    x[0] = np.nan
    weight = (np.arange(len(Y)) != 0).astype(np.float32)
    for reduction in ("sum", "none"):
        value, of_x, *_ = run(x, token_weight=weight, reduction=reduction)
        assert np.isnan(value).any()
        assert np.isnan(of_x[0]).all()


def test_no_features() -> None:
    x, w = jnp.zeros((3, 0)), jnp.zeros((0, V))
    value, gradients = jax.value_and_grad(head, (0, 1))(x, w, Y[:3])
    np.testing.assert_allclose(value, math.log(V), rtol=4 * U)
    assert [g.shape for g in gradients] == [(3, 0), (0, V)]


def test_options_that_are_arrays_of_other_dtypes(x64: None) -> None:
    options = {"temperature": jnp.array(2), "logit_softcap": jnp.array(5)}
    for reduction in ("mean", "none"):
        f = functools.partial(head, reduction=reduction, **options)

        def both(x: Any, z: Any, f: Any = f) -> Any:
            value, pull = jax.vjp(lambda x, z: f(x, W, Y, z_loss=z, label_smoothing=z), x, z)
            return value, *pull(value)

        assert [a.dtype for a in jax.eval_shape(both, X, np.array(0.1))] == [jnp.float32, jnp.float32, jnp.float64]


# What it costs.


def products(jaxpr: Any) -> int:
    """The matrix products in a program, a loop's body counted once."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "dot_general"
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda a: hasattr(a, "eqns")):
            inner = getattr(value, "jaxpr", value)
            count += products(inner) if hasattr(inner, "eqns") else 0
    return count


def test_products_per_chunk() -> None:
    def loss(x: Any, w: Any, bias: Any, reduction: str = "mean") -> Any:
        return head(x, w, Y, bias=bias, reduction=reduction, chunk=N).sum()

    def with_aux(x: Any, w: Any, bias: Any) -> Any:
        return head(x, w, Y, bias=bias, chunk=N, return_aux=True)

    def of_aux(*args: Any) -> Any:
        loss, aux = with_aux(*args)
        return loss + aux.log_sum_exp.sum()

    none = functools.partial(loss, reduction="none")
    for f, want in (
        (loss, 1), (none, 1), (jax.grad(loss, (0, 1, 2)), 3), (jax.value_and_grad(loss, 0), 2), (jax.grad(loss, 1), 2),
        (jax.grad(loss, 2), 1), (jax.grad(none, (0, 1)), 4), (jax.grad(none, 0), 3), (jax.grad(none, 2), 2),
        (with_aux, 1), (jax.value_and_grad(with_aux, (0, 1), has_aux=True), 3), (jax.grad(of_aux, (0, 1)), 6),
    ):  # fmt: skip
        closed = jax.make_jaxpr(f)(X, W, BIAS)
        # What nothing uses is left out, as under jit.
        assert products(pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[0]) == want


@REDUCTIONS
def test_memory_is_that_of_a_chunk(reduction: str) -> None:
    n, d, v = 1024, 4, 512
    x, w, labels = np.ones((n, d), np.float32), np.ones((d, v), np.float32), np.zeros(n, int)

    def loss(x: Any, w: Any) -> Any:
        return head(x, w, labels, reduction=reduction, chunk=16).sum()

    def pushed(x: Any, w: Any) -> Any:
        return jax.jvp(jax.grad(loss, (0, 1)), (x, w), (x, w))

    modes: list[Any] = [loss, jax.value_and_grad(loss, (0, 1)), lambda x, w: jax.jvp(loss, (x, w), (x, w))]
    for f in [*modes, pushed]:
        compiled: Any = jax.jit(f).lower(x, w).compile()
        text = compiled.as_text()
        for shape in ("1024,512", "64,16,512", "16,64,512"):
            assert f"f32[{shape}]" not in text
        # Logits are 2 MiB, those of a chunk 32 kiB; of them, of x and of w there are a few at a time.
        assert compiled.memory_analysis().temp_size_in_bytes < n * v * 4 / 4


@pytest.mark.exhaustive
@REDUCTIONS
def test_derivatives_take_twice_the_memory_of_reverse_mode(reduction: str) -> None:
    n, d, v = 512, 128, 4096
    x, w, labels = jnp.ones((n, d)), jnp.ones((d, v)), jnp.zeros(n, int)

    def loss(x: Any, w: Any) -> Any:
        return head(x, w, labels, reduction=reduction, chunk=64).sum()

    def memory(f: Any, *args: Any) -> int:
        compiled: Any = jax.jit(f).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    gradient = jax.grad(loss, (0, 1))

    def pushed(f: Any) -> Any:
        return lambda x, w, *tangents: jax.jvp(f, (x, w), tangents)[1]

    def pulled(x: Any, w: Any, *tangents: Any) -> Any:
        return jax.grad(lambda *primals: pushed(loss)(*primals, *tangents), (0, 1))(x, w)

    unit = memory(gradient, x, w)
    assert memory(pushed(loss), x, w, x, w) < 2 * unit
    assert memory(pushed(gradient), x, w, x, w) < 2 * unit
    # JAX 0.10 keeps one more array of a chunk's logits.
    assert memory(pulled, x, w, x, w) < 2.25 * unit


def test_w_bar_of_bfloat16_is_accumulated_in_float32() -> None:
    # CCE issue 14. Two classes of equal logits: each token adds ½, and in bfloat16 128 + ½ is 128.
    x, w, labels = np.ones((4096, 1), "bfloat16"), np.zeros((1, 2), "bfloat16"), np.zeros(4096, int)
    for chunk in (1, 4096):
        for reduction in ("sum", "none"):
            f = functools.partial(head, reduction=reduction, chunk=chunk)
            w_bar = jax.jit(jax.grad(lambda w, x, f=f: f(x, w, labels).sum()))(w, x)
            assert w_bar.tolist() == [[-2048, 2048]]


# Defects of others.


def test_tokamax_vocabulary_that_no_block_divides() -> None:
    # Padding with logits of 0 would outweigh logits of −50.
    for v in (1, 131):
        w = np.full((1, v), -50, np.float32)
        x, labels = np.ones((3, 1), np.float32), np.array([0, v // 2, v - 1])
        # The shift is exact; of the logarithm an ulp, and one of the sum.
        loss, aux = jax.jit(functools.partial(head, chunk=2, return_aux=True))(x, w, labels)
        np.testing.assert_allclose(loss, math.log(v), rtol=4 * U)
        assert aux.log_sum_exp.tolist() == pytest.approx([math.log(v) - 50] * 3)


def test_tokamax_mean_over_many_tokens_of_bfloat16() -> None:
    n = 5000
    x, w = np.ones((n, 1), "bfloat16"), np.zeros((1, 3), "bfloat16")
    value = head(x, w, np.zeros(n, int), chunk=64)
    assert value.dtype == "float32"
    # Sums of 5000 equal numbers, each of them rounded.
    np.testing.assert_allclose(value, math.log(3), rtol=n * U)


def test_marin_8217_forward_and_backward_see_the_same_logits() -> None:
    # In bfloat16, logits 100.25 and 100 are equal.
    x, w = np.ones((1, 2), "bfloat16"), np.array([[100, 100], [0.25, 0]], "bfloat16")
    value, w_bar = jax.value_and_grad(lambda w: head(x, w, np.array([1])))(w)
    p = 1 / (1 + math.exp(-0.25))
    np.testing.assert_allclose(value, -math.log(1 - p), rtol=8 * U)
    np.testing.assert_allclose(np.float64(w_bar), [[p, -p]] * 2, rtol=2 * 2.0**-8)  # z̄ is rounded, and w̄


@REDUCTIONS
def test_many_tokens_of_float16(reduction: str) -> None:
    # p/N = 2⁻²² is subnormal in float16, and x·2⁻²² with it.
    n, v = 2**16, 64
    x, w, labels = np.ones((n, 1), "float16"), np.zeros((1, v), "float16"), np.zeros(n, int)
    w_bar = jax.jit(jax.grad(lambda w, x, y: head(x, w, y, reduction=reduction, chunk=4096).mean()))(w, x, labels)
    np.testing.assert_allclose(
        np.asarray(w_bar, np.float64)[0], 1 / v - np.eye(v)[0], rtol=2.0**-10
    )  # z̄ is rounded, and w̄


def test_liger_968_gradients_of_none() -> None:
    g = np.array([1, -2, 0, 0.5, 3, -0.25, 4], np.float32)
    x_bar, w_bar = jax.jit(jax.grad(lambda x, w: head(x, w, Y, reduction="none", chunk=3) @ g, (0, 1)))(X, W)
    given: dict[str, Any] = {"x": np.float64(X), "w": np.float64(W), "labels": Y, "reduction": "none"}
    for name, got in (("x", x_bar), ("w", w_bar)):
        want = oracles.complex_step(lambda **a: oracles.linear_cross_entropy(**a) @ g, given, name)
        np.testing.assert_allclose(got, want, **CLOSE)


def test_torch_70348_mean_where_all_are_ignored() -> None:
    ignored = np.full(N, -100)
    assert head(X, W, ignored) == 0
    w_bar, (_, aux) = jax.jit(lambda w: (jax.grad(head, 1)(X, w, ignored), head(X, w, ignored, return_aux=True)))(W)
    assert not np.asarray(w_bar).any()
    assert not aux.valid


def test_nemo_3803_the_mean_is_not_one_of_the_means_of_chunks() -> None:
    labels = np.append(np.full(4, -100), Y[4:])
    want = oracles.linear_cross_entropy(np.float64(X), np.float64(W), labels)
    values = jax.jit(lambda x, w: [head(x, w, labels, chunk=chunk) for chunk in (1, 2, 3, 5, 7)])(X, W)
    np.testing.assert_allclose(values, [want] * 5, **CLOSE)


def test_levanter_gradient_of_the_softcap() -> None:
    given: dict[str, Any] = {"x": np.float64(X) * 4, "w": np.float64(W), "labels": Y, "logit_softcap": 2.0}
    want = oracles.complex_step(oracles.linear_cross_entropy, given, "w")
    got = jax.jit(jax.grad(lambda w: head(X * 4, w, Y, logit_softcap=2.0)))(W)
    np.testing.assert_allclose(got, want, **CLOSE)


def test_t5x_cotangent_of_the_log_sum_exp() -> None:
    def by_hand(x: Any, w: Any) -> Any:
        loss, aux = head(x, w, Y, return_aux=True, chunk=3)
        return loss + 0.5 * jnp.mean(aux.log_sum_exp**2)

    def option(x: Any, w: Any) -> Any:
        return head(x, w, Y, z_loss=0.5)

    got, want = jax.jit(lambda x, w: [jax.grad(f, (0, 1))(x, w) for f in (by_hand, option)])(X, W)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
