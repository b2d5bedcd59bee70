"""The losses against float64 and mpmath: values, derivatives, options, policies and errors."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracles
import pytest
from jax._src.ad_checkpoint import saved_residuals

from jaxact import losses, verify

INF, NAN, LARGEST = float("inf"), float("nan"), float(np.finfo(np.float32).max)
integer_loss, dense_loss = losses.softmax_cross_entropy_with_integer_labels, losses.softmax_cross_entropy
binary_loss, focal_loss = losses.sigmoid_binary_cross_entropy, losses.sigmoid_focal_loss
# The unit roundoff u; and what may be lost to underflow: XLA flushes subnormal float32 to 0, float16 has them.
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-53}
LOST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-25, "float64": 2.0**-1022}
U = UNIT["float32"]
KINDS = pytest.mark.parametrize("kind", ["integer", "one-hot", "binary", "focal"])
SCALES = pytest.mark.parametrize("scale", [1, 10, 30, "confident"])
# The integer loss has 4 ulp: log1p has one, its argument two, a last sum one. The binary one has an exponential of one
# and a polynomial of 1. log_softmax has 12 (test_softmax.py), and the sum over the labels 2. The focal loss is a
# product of two factors that are known to more digits, and has two roundings more; its gradient has a few factors.
# Measured 2.5, 2.4, 2.0 and 1.7; of the gradients 5.1, 2.3, 6.3 and 4.0 u.
ULPS = {"integer": 4, "one-hot": 14, "binary": 3, "focal": 3}


def data(scale: float | str, dtype: str) -> tuple[Any, Any]:
    """Logits (300, 7) and labels. In confident rows the label leads by 12, 20 or 60."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 7)), rng.integers(0, 7, 300)
    if scale == "confident":
        x[np.arange(300), y] = x.max(-1) + rng.choice([12, 20, 60], 300)
        return jnp.asarray(x, dtype), y
    return jnp.asarray(x * scale, dtype), y


def of_class(kind: str) -> Any:
    """The loss of logits (…, 7) and labels (…). For the binary ones the label's class is the positive one."""
    dense: dict[str, Any] = {"one-hot": dense_loss, "binary": binary_loss, "focal": focal_loss}
    return integer_loss if kind == "integer" else lambda x, y: dense[kind](x, jax.nn.one_hot(y, 7))


@functools.cache
def in_both_modes(kind: str) -> Any:
    """Value, pushforward of v, and gradient, compiled."""

    def run(x: Any, y: Any, v: Any) -> Any:
        value, pushed = jax.jvp(lambda x: of_class(kind)(x, y), (x,), (v,))
        return value, pushed, jax.grad(lambda x: of_class(kind)(x, y).sum())(x)

    return jax.jit(run)


@functools.cache
def mapped(kind: str) -> Any:
    return jax.vmap(of_class(kind))


def spacing(a: Any, dtype: str) -> Any:
    return 2.0 ** np.floor(np.log2(np.maximum(abs(a), LOST[dtype]))) * 2 * UNIT[dtype]


@KINDS
@SCALES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_and_gradients(kind: str, scale: float | str, dtype: str) -> None:
    x, y = data(scale, dtype)
    if kind in ("integer", "one-hot"):
        value, gradient, off, moved = oracles.label_cross_entropy(np.asarray(x), y)
        # The soft labels' has the distances from the maximum, the other none.
        off, moved = (a * (kind == "one-hot") for a in (off, moved))
    else:
        value, gradient = oracles.focal_loss(np.asarray(x), np.eye(7)[y] == 1, 2 * (kind == "focal"))
        off, moved = np.zeros(()), np.zeros(())
    v = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), dtype)
    got, pushed, slope = in_both_modes(kind)(x, y, v)
    for loss in (got, of_class(kind)(x, y), mapped(kind)(x, y)) if dtype == "float32" else (got,):
        assert loss.dtype == jnp.float32
        # What 16-bit logits hold is exact, so that these are float32's errors for every dtype.
        error = abs(np.asarray(loss, np.float64) - value)
        assert (error <= ULPS[kind] * spacing(value, "float32") + U * off + LOST["float32"]).all(), np.max(error)
    assert slope.dtype == x.dtype
    # One ulp is up to 2 u.
    error, rounding = abs(np.asarray(slope, np.float64) - gradient), 0.5 * spacing(gradient, dtype)
    allowed = 2 * ULPS[kind] * U * abs(gradient) + U * moved + 2 * LOST[dtype]
    assert (error <= allowed + rounding * (dtype != "float32")).all(), np.max(error)
    # The pushforward is never rounded to 16 bits; its sum has as many roundings as terms.
    terms, allowed = gradient * np.float64(v), (allowed + 8 * U * abs(gradient)) * abs(np.float64(v))
    if got.ndim == 1:
        terms, allowed = terms.sum(-1), allowed.sum(-1)
    assert (abs(np.asarray(pushed, np.float64) - terms) <= allowed + LOST["float32"]).all()


# Every 101st number from 2⁻¹⁰ to 8: beyond, the rounding of x allows for more than there is.
MAGNITUDE = np.arange(0x3A800000, 0x41000000, 101, dtype=np.int32).view(np.float32)
EITHER_SIGN = np.concatenate([MAGNITUDE, -MAGNITUDE])


@functools.lru_cache(2)  # the next cases ask for the same two
def exact_focal_loss(positive: bool, gamma: float) -> tuple[Any, Any]:
    return oracles.focal_loss(EITHER_SIGN, np.full(EITHER_SIGN.shape, positive), gamma)


# 4 is documented up to 5; beyond, the rounding of log(1 + e), multiplied by the power, is more. Of every third number
# the largest are 1.2, 2.0, 1.2, 1.9, 1.6, 2.2, 2.5, 2.2 and 3.5.
@pytest.mark.parametrize(
    ("gamma", "alpha", "limit"),
    [
        (1, None, 3),
        pytest.param(1, 0.3, 3, marks=pytest.mark.long),
        pytest.param(2, None, 3, marks=pytest.mark.long),
        (2, 0.3, 3),
        (3, None, 3),
        pytest.param(3, 0.3, 3, marks=pytest.mark.long),
        (0.5, None, 3),
        (1.5, 0.3, 3),
        (5, 0.3, 4),
    ],
)
def test_focal_loss_beyond_what_the_rounding_of_x_changes(gamma: float, alpha: float | None, limit: float) -> None:
    alpha = alpha and float(np.float32(alpha))
    for positive, share in ((True, alpha or 1), (False, 1 - (alpha or 0))):
        x, (value, slope) = EITHER_SIGN, exact_focal_loss(positive, gamma)
        error = abs(np.asarray(focal_loss(x, positive, alpha, gamma), np.float64) - share * value)
        beyond = (error - share * abs(slope * x) * U) / spacing(share * value, "float32")
        assert beyond.max() <= limit, (x[beyond.argmax()], beyond.max())


total_and_slope = jax.jit(jax.value_and_grad(lambda x, y: integer_loss(x, y).sum()))


@pytest.mark.long
@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(1457, "float32"), (4093, "float32"), (4096, "float32"), (8192, "float32"), (36864, "bfloat16")],
)
def test_long_rows(classes: int, dtype: str, scale: float) -> None:
    # Rows are folded where their length has a divisor, and 4093 has none; here the label is at the ends of folds.
    fold = classes // 4
    y = np.array([0, 1, fold - 1, fold, classes // 2, 3 * fold - 1, 3 * fold, classes - 2, classes - 1])
    # At scale 30 some losses are over 87, where the sum over the label's exponential overflows.
    x = scale * np.random.default_rng(0).normal(size=(9, classes)).astype(np.float32)
    x[np.arange(9), y] += np.array([0, 25, 40, 25, 300 if scale == 30 else 60, 0, -30, 15, 0], np.float32)
    logits = jnp.asarray(x, dtype)
    value, gradient, off, moved = oracles.label_cross_entropy(np.asarray(logits, np.float64), y)
    got, slope = total_and_slope(logits, y)
    each = np.asarray(integer_loss(logits, y), np.float64)
    np.testing.assert_allclose(float(got), each.sum(), rtol=8 * U)  # a sum of nine
    # The exponentials' 2 ulp, half an ulp a level of a sum of 4096 positive numbers in a tree, 3 for the division by
    # the label's exponential and 1 of the logarithm. Longer rows have up to three levels more: of so many roundings not
    # all go one way.
    assert (abs(each - value) <= U * off + 12 * spacing(value, "float32")).all()
    # The total's 12 ulp are up to 24 u, and 8 u more: the exponential's 2, the loss's 4, the quotient's and factor's 1.
    # In bfloat16, of 8 bits, it is then rounded.
    relative = 32 * U + (2**-8 if dtype == "bfloat16" else 0)
    wrong = abs(np.asarray(slope, np.float64) - gradient)
    assert (wrong <= U * moved + relative * abs(gradient) + LOST["float32"]).all()


@jax.jit
def of_label_0(x: Any) -> Any:
    """Of [x, 0] and of x alone: value, gradient and Hessian of each loss."""
    row, one_hot = jnp.stack([x, 0 * x]), jnp.array([1, 0], x.dtype)

    def derivatives(f: Any, at: Any) -> Any:
        second, first = jax.jacfwd(lambda x: (jax.grad(f)(x),) * 2, has_aux=True)(at)
        return f(at), first, second

    return [
        derivatives(f, at)
        for f, at in (
            (lambda x: integer_loss(x, 0), row),
            (lambda x: dense_loss(x, one_hot), row),
            (lambda x: binary_loss(x, 1), x),
            (lambda x: focal_loss(x, 1), x),
        )
    ]


@pytest.mark.long
@pytest.mark.parametrize("gap", [-30.0, 0.0, 0.3, 12.0, 20.0, 60.0, 200.0])
def test_three_derivatives_against_mpmath(gap: float, x64: None) -> None:
    for dtype in ("float64", "float32") if gap < 80 else ("float64",):
        x = jnp.asarray(gap, dtype)
        with mpmath.workdps(250):
            at = mpmath.mpf(float(x))
            loss, q = mpmath.log(1 + mpmath.exp(-at)), 1 / (1 + mpmath.exp(at))

            def focal(x: Any) -> Any:
                return mpmath.log(1 + mpmath.exp(-x)) / (1 + mpmath.exp(x)) ** 2

            two: Any = [loss, [-q, q], np.array([[1, -1], [-1, 1]]) * float(q * (1 - q))]
            wanted: Any = [two, two, [loss, -q, q * (1 - q)], [mpmath.diff(focal, at, order) for order in range(3)]]
        for ours, exact in zip(of_label_0(x), wanted, strict=True):
            for got, number in zip(ours, exact, strict=True):
                assert got.dtype == dtype
                # Two probabilities of 6 u; of the focal loss three terms of one sign, at 0.3 of two, of 20 u each.
                # And what is below the smallest number is lost.
                want = np.array(number, float)
                np.testing.assert_allclose(np.asarray(got), want, rtol=64 * UNIT[dtype], atol=2 * LOST[dtype])


HOT, DIAGONAL = np.array([[1, 0, 0], [0, 1, 0], [0.25, 0.25, 0.5]], np.float32), np.arange(3, dtype=np.int32)
RULES: dict[str, tuple[Any, Any]] = {  # and the textbook's formulas
    "integer": (
        lambda x: integer_loss(x, DIAGONAL),
        lambda x: jnp.log(jnp.sum(jnp.exp(x), -1)) - jnp.sum(np.eye(3, dtype=np.float32) * x, -1),
    ),
    "dense": (
        lambda x: dense_loss(x, HOT),
        lambda x: jnp.sum(HOT * (jnp.log(jnp.sum(jnp.exp(x), -1, keepdims=True)) - x), -1),
    ),
    "binary": (
        lambda x: binary_loss(x, HOT),
        lambda x: HOT * jnp.log(1 + jnp.exp(-x)) + (1 - HOT) * jnp.log(1 + jnp.exp(x)),
    ),
    "focal": (
        lambda x: focal_loss(x, 1, 0.25, 1.5),
        lambda x: 0.25 * (1 + jnp.exp(x)) ** -1.5 * jnp.log(1 + jnp.exp(-x)),
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RULES)
def test_rules_are_verified(name: str, dtype: str) -> None:
    x = jnp.asarray([[14.0, 0, -5], [1, 2, 3], [0.5, 0, -20]], dtype)
    verify.rule(RULES[name][0], x, reference=RULES[name][1], transforms=(), edges=None).raise_if_not_ok()


# Policies.

# Logits, label, loss, gradient.
SPECIAL: list[tuple[list[float], int, float, list[float]]] = [
    ([INF, 0, 1], 0, 0, [0, 0, 0]),
    ([INF, 0, 1], 1, INF, [1, -1, 0]),
    ([INF, INF, 1], 1, np.log(2), [0.5, -0.5, 0]),
    ([0, -INF, 0], 1, INF, [0.5, 0, 0.5]),
    ([-INF, -INF, -INF], 1, 0, [0, 0, 0]),
    ([NAN, 0, 1], 1, NAN, [NAN, NAN, NAN]),
    ([2.5, 2.5, -INF], 0, np.log(2), [-0.5, 0.5, 0]),
    ([LARGEST, -LARGEST, 0], 0, 0, [0, 0, 0]),
    ([LARGEST, -LARGEST, 0], 1, INF, [1, -1, 0]),
    ([3e38, -3e38, 0], 2, float(np.float32(3e38)), [1, 0, -1]),
    ([-LARGEST, -INF, -INF], 0, 0, [0, 0, 0]),
]


def test_special_rows_stay_alone() -> None:
    x, y = jnp.array([row for row, *_ in SPECIAL]), jnp.array([label for _, label, *_ in SPECIAL])
    integer = jax.value_and_grad(lambda x: (lambda loss: (loss.sum(), loss))(integer_loss(x, y)), has_aux=True)
    (_, value), gradient = integer(x)
    np.testing.assert_allclose(np.asarray(value), [want for *_, want, _ in SPECIAL], rtol=2 * U)
    np.testing.assert_allclose(np.asarray(gradient), [want for *_, want in SPECIAL], rtol=2 * U)
    np.testing.assert_allclose(np.asarray(dense_loss(x, jax.nn.one_hot(y, 3))), np.asarray(value), rtol=2 * U)
    masked = integer_loss(jnp.full((2, 3), NAN), jnp.array([0, 1]), where=jnp.zeros((2, 3), bool))
    assert masked.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1000, 5000])
def test_special_rows_change_no_other_of_many(rows: int, dtype: str) -> None:
    # More than 2048 numbers: on CPU ordinary rows then have a sum of their own, which these must not enter. From 4096
    # rows on there is one formula for the sums of all.
    special = [row for row, *_ in SPECIAL if dtype == "float32" or LARGEST not in np.abs(row)]
    x = jnp.asarray(special + np.random.default_rng(0).normal(size=(rows, 3)).tolist(), dtype)

    def with_each(x: Any, q: Any) -> Any:
        loss = dense_loss(x, q)
        return loss.sum(), loss

    run = jax.jit(jax.value_and_grad(with_each, has_aux=True))
    one_by_one = jax.jit(jax.vmap(run, (0, None)))  # of which each takes the general sum
    for q in (jnp.eye(3, dtype=dtype)[1], jnp.array([0.25, 0.0, 0.75], dtype)):
        (_, value), gradient = run(x, q)
        value = np.asarray(value)
        (_, alone), slope = one_by_one(x, q)
        # Two ways of which each has at most 4 ulp, of up to 2 u.
        np.testing.assert_allclose(value, np.asarray(alone), rtol=16 * U)
        u = UNIT[dtype]
        np.testing.assert_allclose(np.float32(gradient), np.float32(slope), rtol=16 * u, atol=4 * u)
        (_, ordinary), _ = run(x[len(special) :], q)
        np.testing.assert_allclose(value[len(special) :], np.asarray(ordinary), rtol=16 * U)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(5000, 10), (4096, 100), (16, 40), (64, 8192)])
@pytest.mark.parametrize("scale", [1, 10, 30, 100])
def test_the_integer_loss_at_any_logit_scale(shape: tuple[int, int], scale: float) -> None:
    # In half of the rows the label leads; in one every class is beyond the range of the exponential. What is 87 below
    # the largest may be flushed, of each class.
    lost = shape[1] * LOST["float32"]
    rng = np.random.default_rng(0)
    x = (scale * rng.normal(size=shape)).astype(np.float32)
    x[0] += 300
    y = np.where(rng.random(shape[0]) < 0.5, x.argmax(1), rng.integers(0, shape[1], shape[0]))
    value, gradient, _, _ = oracles.label_cross_entropy(x, y)
    got, pull = jax.vjp(lambda x: integer_loss(x, y), x)
    assert (abs(np.asarray(got) - value) <= 6 * spacing(value, "float32") + lost).all()  # documented. Measured 5.0
    (slope,) = pull(jnp.ones_like(got))
    assert (abs(np.asarray(slope) - gradient) <= 16 * U * abs(gradient) + lost).all()  # documented. Measured 12


# Alone, in many rows, and in folds.
@pytest.mark.long
@pytest.mark.parametrize("shape", [(1, 4), (5000, 40), (3, 8192)])
def test_the_least_number_is_a_logit_like_others(shape: tuple[int, int]) -> None:
    # Many use it to mask. A label there has a large loss, and not an infinite one; and of a row of nothing else, log n.
    x = np.zeros(shape, np.float32)
    x[:, 1] = -LARGEST
    cases: Any = ((x, 0, math.log(shape[1] - 1)), (x, 1, LARGEST), (x * 0 - LARGEST, 1, math.log(shape[1])))
    for rows, y, loss in cases:
        label = np.full(len(rows), y)
        want = np.float32(rows == rows.max()) / (rows[0] == rows.max()).sum() - np.eye(shape[1])[label]
        got, slope = total_and_slope(rows, label)
        # 14 roundings of a sum, of up to 5000 losses too, the logarithm's and the quotient's; of 1 at most.
        np.testing.assert_allclose(np.asarray(integer_loss(rows, label)), loss, rtol=16 * U)
        assert loss == LARGEST or math.isclose(got, len(rows) * loss, rel_tol=32 * U)
        np.testing.assert_allclose(np.asarray(slope), want, atol=16 * U)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("x", "y"), [([400, 0.3], 0), ([200, 0.3, 0.7], 0), ([600, 200.3, 0.7], 0), ([300.1, -100.3], 1)]
)
def test_the_integer_loss_of_large_logits_in_float64(x: Any, y: int) -> None:
    """There is room for them, and the small ones are not rounded."""
    value, slope = jax.value_and_grad(lambda x: integer_loss(x, y))(jnp.array(x))
    with mpmath.workdps(400):
        e = [mpmath.exp(mpmath.mpf(a) - mpmath.mpf(x[y])) for a in x]
        others = [0 if i == y else a for i, a in enumerate(e)]
        want = float(mpmath.log1p(sum(others)))
        due = np.array([float((a if i != y else -sum(others)) / sum(e)) for i, a in enumerate(e)])
    assert abs(value - want) <= 6 * spacing(want, "float64")  # documented, as the next. Measured 0.5
    assert (abs(np.asarray(slope) - due) <= 16 * 2.0**-53 * abs(due)).all()  # measured 1.1


@jax.jit
def of_label_1(x: Any, y: Any, q: Any) -> Any:
    """Value and gradient of either loss."""
    pairs = (jax.vjp(lambda x: integer_loss(x, y), x), jax.vjp(lambda x: dense_loss(x, q), x))
    return [(value, pull(jnp.ones_like(value))[0]) for value, pull in pairs]


@pytest.mark.parametrize("large", [INF, LARGEST])
@pytest.mark.parametrize("rows", [1000, 5000])
def test_a_label_beside_an_infinite_logit_among_many_rows(rows: int, large: float) -> None:
    # The only row for which the quick sum is not enough; it would be a finite one.
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    x[7] = large, 0, 1
    special = np.arange(rows) == 7
    for value, slope in of_label_1(x, np.ones(rows, int), np.eye(3, dtype=np.float32)[1]):
        np.testing.assert_array_equal(np.isinf(value), special)
        assert np.asarray(slope)[7].tolist() == [1, -1, 0]  # the limit
    want, _, off, _ = oracles.label_cross_entropy(x[~special], np.ones(rows - 1, int))
    assert (abs(np.asarray(value)[~special] - want) <= (8 * want + off) * U).all()  # 4 ulp, and the rounding of x − m


def test_shapes_and_labels_of_every_dtype() -> None:
    x = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    of_each = jax.jit(lambda x, labels: [integer_loss(x, y) for y in labels])  # one program
    for y, dtypes in ((np.array([1, 7]), ("int4", "uint4")), (np.array([100, 7]), ("int8", "uint8", "uint32"))):
        want = integer_loss(x, y)
        for got in of_each(x, [jnp.array(y, dtype) for dtype in dtypes]):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert jnp.isnan(integer_loss(x, jnp.array([-1, -128], jnp.int8))).all()
    with jax.enable_x64(True):
        assert jnp.isnan(integer_loss(x, jnp.array([2**32, 2**32 + 5]))).all()
    assert integer_loss(jnp.zeros((0, 3)), jnp.zeros(0, int)).shape == (0,)
    assert integer_loss(jnp.zeros((2, 1)), jnp.zeros(2, int)).tolist() == [0, 0]
    assert [integer_loss(5.0, 0, None), dense_loss(5, 1, None), integer_loss(5, 0, ())] == [0, 0, 0]
    assert binary_loss(0, True) == focal_loss(0, 1, gamma=0) == np.float32(np.log(2))


def test_rows_that_do_not_count_and_weights_of_0() -> None:
    x, y, live = jnp.array([[NAN, INF, 1.0], [0.0, 0.0, -INF]]), jnp.array([1, 1]), jnp.array([False, True])
    for f in (lambda x: integer_loss(x, y, where=live), lambda x: dense_loss(x, jax.nn.one_hot(y, 3), where=live)):
        np.testing.assert_allclose(np.asarray(f(x)), [0, np.log(2)], rtol=2 * U)
        assert jax.jit(jax.grad(lambda x, f=f: f(x).sum()))(x).tolist() == [[0, 0, 0], [0.5, -0.5, 0]]
    assert integer_loss(jnp.array([0.0, -INF]), 1, class_weight=jnp.array([1.0, 0.0])) == 0
    elementwise: tuple[Any, ...] = (binary_loss, focal_loss)
    for f in elementwise:
        value, gradient = jax.jit(jax.vmap(jax.value_and_grad(f)))(jnp.zeros(5), jnp.array([-0.1, 1.1, NAN, 0.0, 1.0]))
        assert jnp.isnan(value).tolist() == jnp.isnan(gradient).tolist() == [True, True, True, False, False]


@KINDS
def test_reverse_mode_keeps_logits_and_labels(kind: str) -> None:
    x, hot, y = jnp.ones((8, 7)), jnp.ones((8, 7)), jnp.arange(8) % 7
    loss: dict[str, Any] = {"one-hot": dense_loss, "binary": binary_loss, "focal": focal_loss}
    saved: Any = saved_residuals(lambda x: integer_loss(x, y) if kind == "integer" else loss[kind](x, hot), x)
    kept = [aval.size for aval, _ in saved]
    assert kept.count(56) == 1 + (kind != "integer")
    assert set(kept) <= {56, 8, 1}


def test_dtypes_of_the_dense_loss_are_those_of_its_logits(x64: None) -> None:
    for logits, of_loss in (("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")):
        for labels in ("float64", "float32", "float16"):
            x, q = jax.ShapeDtypeStruct((100, 2), logits), jax.ShapeDtypeStruct((100, 2), labels)
            both = jax.value_and_grad(lambda x, q: dense_loss(x, q).sum(), (0, 1))
            loss, gradients = jax.eval_shape(both, x, q)
            assert [loss.dtype, *(g.dtype for g in gradients)] == [of_loss, logits, labels]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_of_integer_labels_keeps_four_numbers_a_row(dtype: str) -> None:
    x, y = jnp.ones((8, 256), dtype), jnp.arange(8)
    # Of 32 bits each, with the label, and whether a class has it.
    assert verify.residuals(lambda x: integer_loss(x, y), x).facts["bytes"] <= x.nbytes + (4 * 4 + 1) * 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dense_loss_keeps_16_bits_of_16(dtype: str) -> None:
    x, q = jnp.ones((8, 256), dtype), jnp.ones((8, 256), dtype)
    # Beside them three numbers for each row, in float32.
    assert verify.residuals(dense_loss, x, q).facts["bytes"] <= 2 * x.nbytes + 3 * 4 * 8
    # The log-probabilities are found anew.
    assert verify.residuals(lambda q: dense_loss(x, q), q).facts["bytes"] <= x.nbytes + 3 * 4 * 8
    # With options the adjusted logits too, in float32.
    capped = verify.residuals(lambda x: dense_loss(x, q, logit_softcap=5.0, temperature=2.0), x)
    assert capped.facts["bytes"] <= 2 * x.nbytes + 4 * x.size + 3 * 4 * 8


@pytest.mark.long
@pytest.mark.parametrize("classes", [*(pytest.param(n, marks=pytest.mark.exhaustive) for n in (31, 32, 8192)), 40])
def test_the_label_among_many_classes(classes: int) -> None:
    # From 32 on its entry of the gradient is written after the others, and from 8192 on rows are folded.
    x = np.random.default_rng(0).normal(size=(9, classes)).astype(np.float32) * 3
    y = np.array([0, classes - 1, 1, 2, 3, 4, classes, 5, 7])
    x[1] += 80  # e^x is more than may be summed as it is
    x[2, 5], x[3, 2], x[4] = INF, INF, -INF
    x[5, 0] = NAN
    x[7, ::2], x[8, 7] = -INF, 40
    labels = np.eye(classes + 1, classes, dtype=np.float32)[y]  # a row of zeros for the one that does not exist
    live = np.array([True] * 6 + [False] + [True] * 2)

    def derivatives(loss: Any, x: Any, y: Any) -> Any:
        def total(x: Any) -> Any:
            return (jnp.where(live, loss(x, y), 0) * jnp.arange(1.0, 10.0)).sum()

        slope, second = jax.jvp(jax.grad(total), (x,), (v,))
        return loss(x, y), slope, second, jax.jvp(lambda x: loss(x, y), (x,), (v,))[1]

    compiled = jax.jit(derivatives, static_argnums=0)
    v = np.cos(np.nan_to_num(x, posinf=1, neginf=1))
    want = compiled(dense_loss, x, labels)
    for got in (derivatives(integer_loss, x, y), compiled(integer_loss, x, y), compiled(jax.vmap(integer_loss), x, y)):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            a, b = np.asarray(a)[live], np.asarray(b)[live]
            # Either way some ten roundings, and as much again where a distance from the maximum, up to 64, is rounded
            # before its exponential. The loss and its gradient are sums of one sign, so that nothing is added to them;
            # in sums of products with a tangent of either sign, up to 1, the rows' weights, up to 9, count.
            np.testing.assert_allclose(a, b, rtol=64 * U, atol=LOST["float32"] if i < 2 else 9 * 32 * U)
        value, slope, *_ = got
        assert np.isnan(value[6])
        np.testing.assert_array_equal(np.isnan(slope).all(-1), (np.arange(9) == 5) | (np.arange(9) == 6))
    # A label whose class does not exist has no derivative, and the others have theirs.
    alone = np.asarray(jax.jit(jax.grad(integer_loss))(x[7], 0))
    assert alone[0] == 0
    np.testing.assert_allclose(alone[1:].sum(), 1, rtol=32 * U)


def test_no_rows_of_many_classes() -> None:
    x, y = jnp.zeros((0, 8192)), jnp.zeros(0, int)  # so many that a row is folded
    value, gradient = jax.value_and_grad(lambda x: losses.softmax_cross_entropy_with_integer_labels(x, y).sum())(x)
    assert value == 0
    assert gradient.shape == x.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_label_that_is_a_sum_of_probabilities_may_be_rounded_to_more_than_1(dtype: str) -> None:
    unit = float(jnp.finfo(dtype).eps)
    x, labels = jnp.array([2.0, -3.0, 2.0, -3.0]), jnp.array([1 + unit, 1 + 4 * unit, -unit / 8, 1], dtype)
    for loss in (binary_loss, functools.partial(focal_loss, gamma=2.0)):
        np.testing.assert_array_equal(np.asarray(loss(x, labels)), np.asarray(loss(x, jnp.clip(labels, 0, 1))))
        slopes = jax.grad(lambda y, loss=loss: loss(x, y).sum())
        np.testing.assert_array_equal(np.asarray(slopes(labels)), np.asarray(slopes(jnp.clip(labels, 0, 1))))
        assert np.isnan(loss(x, labels + 8 * unit)[:2]).all()
