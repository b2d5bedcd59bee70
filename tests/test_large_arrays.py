"""What holds of a few rows holds of many: XLA for CPU has other kernels for large arrays, and so have we."""

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import softmax_oracle

import jaxact
from jaxact import losses

INF, NAN = float("inf"), float("nan")

# Each a function of logits and labels with one value a row.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": lambda x, y: jaxact.softmax(x)[:, 0],
    "softmax, temperature": lambda x, y: jaxact.softmax(x, temperature=2.0)[:, 0],
    "log_softmax": lambda x, y: jaxact.log_softmax(x)[:, 0],
    "log_softmax, temperature": lambda x, y: jaxact.log_softmax(x, temperature=2.0)[:, 0],
    "logsumexp": lambda x, y: jaxact.logsumexp(x, -1),
    "logsumexp, weighted": lambda x, y: jaxact.logsumexp(x, -1, b=jnp.ones_like(x)),
    "integer labels": losses.softmax_cross_entropy_with_integer_labels,
    "integer labels, options": lambda x, y: losses.softmax_cross_entropy_with_integer_labels(
        x, y, label_smoothing=0.1, z_loss=0.1, logit_softcap=5.0
    ),
    "probabilities": lambda x, y: losses.softmax_cross_entropy(x, jax.nn.one_hot(y, x.shape[1], dtype=x.dtype)),
    "binary": lambda x, y: losses.sigmoid_binary_cross_entropy(x, jnp.zeros_like(x)).sum(-1),
    "focal": lambda x, y: losses.sigmoid_focal_loss(x, jnp.zeros_like(x)).sum(-1),
    "head": lambda x, y: jaxact.linear_cross_entropy(x, jnp.eye(x.shape[1], dtype=x.dtype), y, reduction="none"),
}
ELEMENTWISE = ("binary", "focal")


@functools.partial(jax.jit, static_argnums=0)
def value_and_slope(name: str, x: Any, y: Any) -> Any:
    value, pull = jax.vjp(lambda x: FUNCTIONS[name](x, y), x)
    return value, pull(jnp.ones_like(value))[0]


# What has its kernels by rows is compiled otherwise for few classes, for many rows, for many classes, and for blocks of
# them; in 16 bits each number is widened first, and then the kernels are the same. What is elementwise has one kernel.
SHAPES = [(300, 5), (100, 100), (4096, 20), (150, 1000), (128, 2048)]


@pytest.mark.parametrize(("shape", "dtype"), [*itertools.product(SHAPES, ["float32", "bfloat16"])])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_nan_reaches_its_row_and_no_other(name: str, shape: tuple[int, int], dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=shape), rng.integers(0, shape[1], shape[0])
    bad = np.arange(shape[0]) % 7 == 0
    x[bad, rng.integers(0, shape[1], bad.sum())] = NAN
    if name != "integer labels, options":  # of which a cap is constant there
        x[::14, 1] = np.where(np.isnan(x[::14, 1]), NAN, INF)  # beside it the other classes are impossible
    value, slope = value_and_slope(name, x.astype(dtype), y)
    np.testing.assert_array_equal(np.isnan(np.asarray(value, np.float32)), bad)
    slope = np.isnan(np.asarray(slope, np.float32))
    # What has a class to itself has its derivative to itself as well.
    np.testing.assert_array_equal(slope, np.isnan(x) if name in ELEMENTWISE else np.broadcast_to(bad[:, None], shape))


# All triples of these: from what XLA loses or saturates to where the exponential of one over- or underflows.
SPECIAL = [-INF, INF, NAN, 0.0, -0.0, 1.0, -1.0, 30.0, 63.0, 64.0, 88.7, -87.0, -104.0, 1000.0, -1000.0, 3e38]
TRIPLES = np.array(list(itertools.product(SPECIAL, repeat=3)), np.float32)


# Few classes are taken one by one. With others that do not exist they are not few.
@pytest.mark.long
@pytest.mark.parametrize("padding", [0, 17])
@pytest.mark.parametrize("name", [*list(FUNCTIONS)[:5], "integer labels", "probabilities"])
def test_a_nan_beside_infinities(name: str, padding: int) -> None:
    x = np.pad(TRIPLES, ((0, 0), (0, padding)), constant_values=-INF)
    value, slope = value_and_slope(name, x, np.arange(len(x)) % 3)
    bad = np.isnan(x).any(1)
    np.testing.assert_array_equal(np.isnan(value), bad)
    slope = np.isnan(slope)
    assert not slope[~bad].any()
    assert (slope | (x == -INF))[bad].all()  # a class that does not exist may have no derivative


@pytest.mark.long
@pytest.mark.parametrize("classes", [20, 100])
@pytest.mark.parametrize("name", ["log_softmax", "logsumexp", "integer labels", "probabilities"])
def test_a_value_beside_its_gradient(name: str, classes: int) -> None:
    # On CPU its exponentials are then others, which the gradient is made of too. Alone it has tests of its own.
    rng = np.random.default_rng(0)
    kinds = [np.pad(TRIPLES, ((0, 0), (0, classes - 3)), constant_values=-INF)]
    kinds += [softmax_oracle.logits(scale, 500, classes) for scale in (1, 30, "dominated")]
    x = np.concatenate(kinds).astype(np.float32)
    x[-100:] -= x[-100:].max(1, keepdims=True)  # where logsumexp is nearly 0
    y = np.where(np.arange(len(x)) < len(TRIPLES), np.arange(len(x)) % 3, rng.integers(0, classes, len(x)))
    beside, _ = value_and_slope(name, x, y)
    alone = np.asarray(jax.jit(FUNCTIONS[name])(x, y))
    # Of log_softmax each has at most 12 ulp, of the others 5; a logarithm near 0 that was m + log1p(others), 3 u of m.
    limit = 24 if name == "log_softmax" else 10
    size = np.max(np.where(np.isfinite(x), abs(x), 0), 1) if name == "logsumexp" else 0
    finite = np.isfinite(alone)
    np.testing.assert_array_equal(np.asarray(beside)[~finite], alone[~finite])
    apart = np.where(finite, beside, 0) - np.where(finite, alone, 0).astype(np.float64)
    allowed = limit * 2.0**-23 * np.where(finite, abs(alone), 0) + 6 * 2.0**-24 * size + 2.0**-126
    assert (abs(apart) <= allowed).all()


# Each a function of logits and of what is the same for all rows.
SHARED: dict[str, Callable[..., Any]] = {
    "softmax": lambda x, a: jaxact.softmax(x) * a,
    "softmax, temperature": lambda x, a: jaxact.softmax(x, temperature=2.0) * a,
    "log_softmax": lambda x, a: jaxact.log_softmax(x) * a,
    "logsumexp": lambda x, a: jaxact.logsumexp(x, axis=-1, b=a),
    "probabilities": lambda x, a: losses.softmax_cross_entropy(x, a, label_smoothing=0.1),
    "class weights": lambda x, a: losses.softmax_cross_entropy_with_integer_labels(
        x, jnp.zeros(len(x), int), label_smoothing=0.1, class_weight=a
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_row_changes_no_other(name: str) -> None:
    # XLA of JAX 0.10 has a kernel for 13 to 31 classes that writes a product over its first operand, and finds it there
    # when it comes to other rows, if that operand is the same for all of them.
    rng = np.random.default_rng(0)
    x, shared = rng.normal(size=(4096, 20)).astype(np.float32), rng.dirichlet(np.ones(20)).astype(np.float32)
    moved = rng.random(4096) < 0.3
    other = x + moved[:, None] * rng.normal(size=x.shape).astype(np.float32)
    # Apart: with two results it is another kernel.
    for f in (SHARED[name], jax.grad(lambda x, a: SHARED[name](x, a).sum())):
        run = jax.jit(f)
        got, want = (np.asarray(run(rows, shared))[~moved] for rows in (other, x))
        np.testing.assert_array_equal(got, want)


@pytest.mark.long
@pytest.mark.parametrize(("rows", "padding"), [(500, 0), (500, 17), (4095, 17), (4096, 0), (4096, 17)])
def test_special_values_in_many_rows(rows: int, padding: int) -> None:
    x = np.pad(TRIPLES[:rows], ((0, 0), (0, padding)), constant_values=-INF)  # as above
    for name, limit in (("softmax", 6), ("log_softmax", 12)):  # as in test_softmax.py
        got = getattr(jaxact, name)(x)
        assert oracles.ulp_error(got, getattr(oracles, name)(x.astype(np.float64)), np.float32).max() <= limit, name
    # m + log1p(others): each of the three roundings is relative to the larger of m and the result. Subnormal numbers
    # are flushed.
    got, want = np.asarray(jaxact.logsumexp(x, axis=1), np.float64), oracles.logsumexp(x.astype(np.float64))
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    size = np.maximum(abs(want), abs(np.max(x, 1)))[finite]
    assert (abs(got[finite] - want[finite]) <= 3 * 2.0**-24 * size + 2.0**-126).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [20, 200])
def test_ties_with_the_maximum_and_what_is_next_to_it(count: int, dtype: str, x64: None) -> None:
    # Maxima of every size, each beside its equals, the number before it, that less the least normal number, and others.
    info = np.finfo(dtype)
    tops = np.array(
        [s * f * 2.0**k for k in range(info.minexp, info.maxexp) for s in (1, -1) for f in (1, 1.03)], dtype
    )
    tops = np.resize(np.append(tops, np.arange(50, 100, 0.37).astype(dtype)), 4608)
    before = np.minimum(np.nextafter(tops, -info.max), tops - info.tiny)  # subnormal numbers are flushed
    rng = np.random.default_rng(0)
    kinds = np.stack([tops, before, np.minimum(before, before - 3 * info.tiny), tops - 17, tops - 400], -1)
    x = np.take_along_axis(kinds, rng.integers(0, 5, (len(tops), count)), -1)
    x[::2] = before[::2, None]
    x[:, 3] = tops
    wide = x.astype(np.longdouble)
    d = wide - tops[:, None]
    others = np.exp(np.delete(d, 3, 1)).sum(1)
    want = d - np.log1p(others)[:, None]

    def with_sum(x: Any) -> Any:
        value = jaxact.log_softmax(x)
        return value.sum(), value

    (_, beside), _ = jax.jit(jax.value_and_grad(with_sum, has_aux=True))(x)
    for got in jaxact.log_softmax(x), beside:
        assert oracles.worst_ulp(got, want, dtype) <= 12  # as in test_softmax.py


@pytest.mark.parametrize("ties", [1, 2])
def test_more_classes_than_float32_can_count(ties: int) -> None:
    # The impossible class has no label: the loss is then formed anew, from the number of classes at the maximum.
    x = np.zeros((1, 2**24 + 3), np.float32)
    x[0, :ties], x[0, -1] = 30, -INF
    label = np.zeros_like(x)
    label[0, 0] = 1
    want = math.log1p((ties - 1) + (x.size - 1 - ties) * math.exp(-30))
    # The sum of 2²⁴ numbers, in lanes and then across them, rounds a thousand times, by half a unit at most.
    np.testing.assert_allclose(losses.softmax_cross_entropy(x, label), [want], rtol=500 * 2.0**-24)


# On either side of where the sums need a shift: sums below 1 and above e⁶³; logarithms within 1 of 0; maxima about 256.
@pytest.mark.long
@pytest.mark.parametrize("offset", [0, -6.5, -7.4, -8, -9, -50, 40, 55.5, 56, 57, 70, 252.5, 300, -259.5, -1e4, 1e6])
@pytest.mark.parametrize("shape", [(150, 1000), (100, 100), (4096, 50), (300, 10)])
def test_sums_in_and_out_of_range(shape: tuple[int, int], offset: float) -> None:
    x = np.float32(softmax_oracle.logits(1, *shape) + offset)
    p = softmax_oracle.exact_value("softmax", x)
    assert oracles.worst_ulp(jaxact.softmax(x), p) <= 6  # as in test_softmax.py
    value, pull = jax.vjp(lambda x: jaxact.logsumexp(x, axis=1), x)
    assert oracles.worst_ulp(pull(jnp.ones_like(value))[0], p) <= 6
    want = oracles.logsumexp(x.astype(np.float64))
    size = np.maximum(abs(want), abs(x.max(1)))
    assert (abs(np.asarray(value, np.float64) - want) <= 3 * 2.0**-24 * size).all()  # as above


# The sum needs no shift where the maximum is from 0 to 63, and is found with one where some row needs it.
@pytest.mark.parametrize("offsets", [[0, 30, 57], [-5, 0], [-30, 0], [300, 85, 0, -300]], ids=str)
def test_log_softmax_in_and_out_of_range(offsets: list[float]) -> None:
    x = softmax_oracle.logits(1, 1100, 1000) + np.resize(np.array(offsets, float), 1100)[:, None]
    for scale in (1, 8):  # of which the second makes most rows dominated
        rows = np.float32(x * scale)
        want = softmax_oracle.exact_value("log_softmax", rows)
        assert oracles.worst_ulp(jaxact.log_softmax(rows), want) <= 12  # as in test_softmax.py
        rounded = rows.astype(jnp.bfloat16)
        want = softmax_oracle.exact_value("log_softmax", np.float64(rounded))
        assert oracles.worst_ulp(jaxact.log_softmax(rounded), want, jnp.bfloat16) <= 0.51  # rounded once


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the memory of kernels on CPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_softmax_of_16_bits_needs_one_array_of_float32(dtype: str) -> None:
    x = jnp.zeros((500, 300), dtype)
    memory = jax.jit(jaxact.softmax).lower(x).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 4 * (x.size + 2 * len(x))  # and two numbers for each row


# XLA of JAX 0.12 keeps the values of an iota inside a kernel of its library and may give them to a later kernel of
# another shape. When it was such an iota that said where the label is, up to half of the losses of 2048 classes were
# wrong after other numbers of classes: in 30 of 160 programs, but which is a matter of addresses. So the test is that
# there is none. In JAX 0.10 there is, and 160 programs showed no error.
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a kernel of XLA for CPU")
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA removes the barrier, and has not the defect")
@pytest.mark.parametrize("shape", [(2048, 300), (2048, 1024), (512, 2048), (64, 8192)])
def test_no_kernel_of_the_library_counts_places(shape: tuple[int, int]) -> None:
    x, y = jax.ShapeDtypeStruct(shape, jnp.float32), jnp.zeros(shape[0], int)
    loss = losses.softmax_cross_entropy_with_integer_labels
    text = jax.jit(jax.value_and_grad(lambda x: loss(x, y).sum())).lower(x).compile().as_text() or ""
    kernels = re.findall(r"kind=kCustom, calls=(%[\w.]+)", text)
    assert kernels
    for kernel in kernels:
        body = text[text.index(f"\n{kernel} (") :]
        assert " iota(" not in body[: body.index("\n}")]


@pytest.mark.parametrize("shape", [(64, 33), (64, 1000), (1024, 1000), (2048, 1024)])  # about as many kernels
@pytest.mark.parametrize("name", ["log_softmax", "integer labels", "probabilities"])
def test_what_the_others_sum_up_to_is_not_flushed(name: str, shape: tuple[int, int]) -> None:
    # Each of them has less than the least normal number, of 1, and all together more.
    rng = np.random.default_rng(0)
    largest = rng.uniform(100, 250, (shape[0], 1))
    x = (largest - rng.uniform(89, 91, shape)).astype(np.float32)
    x[:, :1] = largest
    want = np.log1p(np.exp(np.float64(x[:, 1:]) - x[:, :1]).sum(-1)) * (-1 if name == "log_softmax" else 1)
    assert (abs(want) > 2.0**-126).all()
    alone = jax.jit(lambda x, y: FUNCTIONS[name](x, y))
    y = np.zeros(shape[0], int)
    for value in (alone(x, y), value_and_slope(name, x, y)[0]):
        np.testing.assert_allclose(value, want, rtol=12 * 2.0**-23)  # the docstring's bound


def rows_of_a_kind(kind: str, rows: int, classes: int) -> Any:
    if kind == "all":
        each = [rows_of_a_kind(k, rows // 4, classes) for k in ("even", "dominated", "impossible", "both")]
        return np.random.default_rng(2).permutation(np.concatenate(each))
    x = softmax_oracle.logits("dominated" if kind in ("dominated", "both") else 2, rows, classes).astype(np.float32)
    if kind in ("impossible", "both"):
        absent = np.random.default_rng(1).random(x.shape) < 0.1
        x[absent & (x < x.max(1, keepdims=True))] = -INF
    return x


# A row in which a class has more than half, or is impossible, has sums of its own, which are left out of arrays in
# which there is none. What is written down differs up to 2¹⁵ numbers, up to 2²⁰, and beyond.
@pytest.mark.parametrize("kind", ["even", "dominated", "impossible", "both", "all"])
@pytest.mark.parametrize("shape", [(100, 100), (300, 1000), (1100, 1000)])
def test_a_derivative_of_log_softmax_in_rows_of_each_kind(shape: tuple[int, int], kind: str) -> None:
    x, rng = rows_of_a_kind(kind, *shape), np.random.default_rng(3)
    v = rng.normal(size=x.shape).astype(np.float32)
    here = np.isfinite(x)
    v[~here] = 1e6  # the logarithm of an impossible class is constant
    value, pull = jax.jit(lambda x, v: (jaxact.log_softmax(x), jax.vjp(jaxact.log_softmax, x)[1](v)[0]))(x, v)
    push = jax.jit(lambda x, v: jax.jvp(jaxact.log_softmax, (x,), (v,))[1])(x, v)
    np.testing.assert_array_equal(np.asarray(value)[~here], -INF)
    v[~here] = 0
    for got, mode, limit in ((pull, "vjp", 10), (push, "jvp", 20)):  # as in test_softmax_derivatives.py
        want, size = softmax_oracle.exact_product("log_softmax", mode, x, v)
        np.testing.assert_array_equal(np.asarray(got)[~here], 0)
        assert (abs(np.asarray(got, np.float64) - want)[here] <= limit * 2.0**-24 * size[here] + 2.0**-126).all()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the memory of kernels on CPU")
def test_log_softmax_and_its_gradient_need_no_third_array() -> None:
    x = jnp.zeros((1100, 1000))

    def value_and_pullback(x: Any, g: Any) -> Any:
        value, pull = jax.vjp(jaxact.log_softmax, x)
        return value, pull(g)

    memory = jax.jit(value_and_pullback).lower(x, x).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 64 * len(x)  # numbers for each row, and nothing of the size of the logits
