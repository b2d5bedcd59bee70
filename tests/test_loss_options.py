"""Every option of the losses, alone and together, against a dense formula; axes and agreement with optax; errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import oracles
import pytest

from jaxact import linear_cross_entropy, losses

INF, NAN, U = float("inf"), float("nan"), 2.0**-24
integer_loss, dense_loss = losses.softmax_cross_entropy_with_integer_labels, losses.softmax_cross_entropy
binary_loss, focal_loss = losses.sigmoid_binary_cross_entropy, losses.sigmoid_focal_loss

# Options, in float64 against a dense formula that is differentiated by a complex step.

X = np.random.default_rng(2).normal(size=(4, 5)) * 3
Y, SOFT = np.array([0, 3, 1, 4]), np.random.default_rng(3).dirichlet(np.ones(5), 4)
CLASSES = np.array([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], bool)
WEIGHTS, COTANGENT = np.array([0.5, 2.0, 1.5, 0.25, 3.0]), np.arange(1.0, 5)
OPTIONS = {"temperature": 0.7, "label_smoothing": 0.1, "z_loss": 0.2, "logit_softcap": 4.0, "class_weight": WEIGHTS}


@pytest.mark.parametrize("name", [*OPTIONS, "all"])
@pytest.mark.parametrize("labels", ["integer", "soft"])
def test_options(labels: str, name: str, x64: None) -> None:
    options = OPTIONS if name == "all" else {name: OPTIONS[name]}
    where = CLASSES if name in ("all", "label_smoothing") else None
    arguments: dict[str, Any] = {"x": X, "labels": np.eye(5)[Y] if labels == "integer" else SOFT} | options
    # Without those in temperature and cap where classes are masked: these have a test of their own below.
    moving = [a for a in arguments if not (a == "labels" and labels == "integer")]
    moving = [a for a in moving if where is None or a not in ("temperature", "logit_softcap")]

    def f(given: dict[str, Any]) -> Any:
        given = arguments | given
        x, dense = given.pop("x"), given.pop("labels")
        if labels == "integer":
            loss = integer_loss(x, Y, where=where, **given)
        else:
            loss = dense_loss(x, dense, where=where, **given)
        return loss @ COTANGENT, loss

    exact = functools.partial(oracles.cross_entropy, where=True if where is None else where)
    (_, got), gradient = jax.jit(jax.value_and_grad(f, has_aux=True))({a: arguments[a] for a in moving})
    # float64: about 100 roundings of numbers up to 100 times the result.
    np.testing.assert_allclose(np.asarray(got), exact(**arguments), rtol=1e-12)
    for a in moving:
        want = oracles.complex_step(lambda **given: exact(**given) @ COTANGENT, arguments, a)
        np.testing.assert_allclose(np.asarray(gradient[a]), want, rtol=1e-12, atol=1e-13, err_msg=a)


# In float32, of so many classes that a gradient shares the exponentials of its loss: some thousand numbers, and more.
@pytest.mark.long
@pytest.mark.parametrize("shape", [(100, 40), (400, 100)])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"label_smoothing": 1.0},
        {"temperature": 2.0, "z_loss": 0.2},
        {"logit_softcap": 4.0},
        {"logit_softcap": 4.0, "temperature": 0.5, "label_smoothing": 0.25, "z_loss": 0.2},
    ],
)
def test_options_of_many_classes(options: dict[str, Any], shape: tuple[int, int]) -> None:
    rows, classes = shape
    rng = np.random.default_rng(7)
    x = rng.normal(size=shape) * rng.choice([1, 5, 20], (rows, 1)) + rng.normal(size=(rows, 1))
    x = x.astype(np.float32).astype(np.float64)
    y, exists = rng.integers(1, classes, rows), np.ones(shape, bool)
    # A class that does not exist; rows with none, with a nan, and such as do not count.
    exists[0, 0] = exists[1] = False
    x[2, 0], x[3:6] = NAN, NAN
    given, counts = np.where(exists, x, -INF).astype(np.float32), (np.arange(rows) < 3) | (np.arange(rows) > 5)

    @jax.jit
    def run(x: Any) -> Any:
        loss, pull = jax.vjp(lambda x: integer_loss(x, y, where=counts, **options), x)
        return loss, pull(jnp.ones_like(loss))[0]

    loss, gradient = (np.asarray(a, np.float64) for a in run(given))
    np.testing.assert_array_equal(loss[1:6], [0, NAN, 0, 0, 0])
    np.testing.assert_array_equal(gradient[1:6], np.broadcast_to(loss[1:6, None], (5, classes)))
    assert gradient[0, 0] == 0
    ordinary = np.isfinite(x).all(1) & exists[:, -1]
    x, hot, exists = x[ordinary], np.eye(classes)[y[ordinary]], exists[ordinary]
    # A cap rounds its logits by 3 ulp of tanh and one of the product, which a temperature of ½ doubles.
    cap = options.get("logit_softcap", INF)
    rtol = 16 * U + (2 * 4 * 2 * cap * U if cap < INF else 0)
    np.testing.assert_allclose(loss[ordinary], oracles.cross_entropy(x, hot, exists, **options), rtol=rtol)
    # The terms of its gradient, of which none cancels; their sum may.
    t, smoothing, z_loss = (
        options.get(name, n) for name, n in (("temperature", 1), ("label_smoothing", 0), ("z_loss", 0))
    )
    capped = x if cap == INF else cap * np.tanh(x / cap)
    slope = exists / np.cosh(x / cap) ** 2 / t
    e = np.where(exists, np.exp(capped / t), 0)
    lse = np.log(e.sum(1, keepdims=True))
    p = e / np.exp(lse)
    but_label = np.where(hot == 1, -(p * (1 - hot)).sum(1, keepdims=True), p)
    terms = np.stack([(1 - smoothing) * but_label, smoothing * p, -smoothing / exists.sum(1, keepdims=True) + 0 * p])
    of_z_loss = 2 * z_loss * p
    size = abs(terms).sum(0) + of_z_loss * (1 + abs(lse))  # of log Σ e^z the error is that of the largest of its terms
    want = (terms.sum(0) + of_z_loss * lse) * slope
    # A temperature rounds the distance from the maximum. What is not a normal number may be 0.
    rounded = rtol + U * (capped.max(1, keepdims=True) - capped) / t * ("temperature" in options)
    assert (abs(gradient[ordinary] - want) <= rounded * size * slope + 2.0**-126).all()


@pytest.mark.long
@pytest.mark.parametrize("axis", [1, (2, 0), None])
def test_axis_and_agreement_with_optax(axis: Any) -> None:
    x = np.random.default_rng(4).normal(size=(3, 4, 2)).astype(np.float32)
    axes = (0, 1, 2) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    order = tuple(a for a in range(3) if a not in axes) + axes  # a label is the index in the order given
    moved = x.transpose(order)
    flat = moved.reshape(*moved.shape[: 3 - len(axes)], -1)
    y = np.random.default_rng(5).integers(0, flat.shape[-1], flat.shape[:-1])
    hot = np.eye(flat.shape[-1], dtype=np.float32)[y]
    dense = hot.reshape(moved.shape).transpose(np.argsort(order))

    @jax.jit
    def of_both(x: Any, y: Any, dense: Any, where: Any) -> Any:
        ours = [integer_loss(x, y, axis, where), dense_loss(x, dense, axis, where)]
        theirs = [optax.losses.softmax_cross_entropy(x, dense, axis, where)]
        if axis is not None:  # which only the dense one takes
            theirs.append(optax.losses.softmax_cross_entropy_with_integer_labels(x, y, axis, where))
        return ours, theirs

    for where in (None, (dense > 0) | (x > -0.5)):
        shown = True if where is None else where.transpose(order).reshape(flat.shape)
        want = oracles.cross_entropy(np.float64(flat), hot, shown)
        # 14 ulp as above, and the differences of ordinary logits.
        ours, theirs = of_both(x, y, dense, where)
        for got in ours:
            np.testing.assert_allclose(np.asarray(got), want, rtol=32 * U)
        # Of log Σ e^z − z_y the error is relative to its terms, which are below 4.
        for got in theirs:
            np.testing.assert_allclose(np.asarray(got), want, rtol=32 * U, atol=32 * U)


def test_binary_losses_agree_with_optax() -> None:
    x, y = np.float32(X), np.float32(SOFT)
    binary, focal = jax.jit(optax.losses.sigmoid_binary_cross_entropy), jax.jit(optax.losses.sigmoid_focal_loss)
    pairs = [(binary_loss(x, y), binary(x, y))]
    for options in ({}, {"alpha": 0.25}, {"alpha": 0.25, "gamma": 1.5}, {"gamma": 0.0}, {"gamma": 3}):
        pairs.append((focal_loss(x, y, **options), focal(x, y, **options)))
    for got, want in pairs:
        # optax subtracts p_t ≤ 0.999 from 1, and takes the third power of the difference.
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=3 * 1000 * U)


def test_options_of_the_binary_loss(x64: None) -> None:
    mask, y, rtol = X > -2, 0.8 * SOFT + 0.1, 16 * 2.0**-53  # terms of one sign, and sums of four
    want = np.where(mask, WEIGHTS * y * np.logaddexp(0, -X) + (1 - y) * np.logaddexp(0, X), 0)
    got = binary_loss(np.where(mask, X, NAN), SOFT, pos_weight=WEIGHTS, label_smoothing=0.2, where=mask)
    np.testing.assert_allclose(np.asarray(got), want, rtol=rtol)
    by_label, by_weight = jax.grad(lambda y, w: binary_loss(X, y, pos_weight=w).sum(), (0, 1))(SOFT, WEIGHTS)
    np.testing.assert_allclose(by_label, WEIGHTS * np.logaddexp(0, -X) - np.logaddexp(0, X), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(by_weight, (SOFT * np.logaddexp(0, -X)).sum(0), rtol=rtol)


# Errors.

ROWS, LABELS = jnp.zeros((2, 3)), jnp.zeros(2, int)
BAD: list[tuple[Any, str, dict[str, Any], type[Exception]]] = [
    (integer_loss, "logits", {"logits": ROWS + 0j}, TypeError),
    (integer_loss, "logits", {"logits": [[0.0, 0.0]]}, TypeError),
    (integer_loss, "labels", {"labels": [0, 1]}, TypeError),
    (integer_loss, "labels", {"labels": jnp.zeros(2)}, TypeError),
    (integer_loss, "labels", {"labels": jnp.zeros(2, bool)}, TypeError),
    (integer_loss, "labels", {"labels": jnp.zeros(3, int)}, ValueError),
    (integer_loss, "axis", {"axis": 2}, ValueError),
    (integer_loss, "axis", {"axis": (0, -2)}, ValueError),
    (integer_loss, "axis", {"axis": 0.5}, TypeError),
    (integer_loss, "where", {"where": jnp.ones((2, 3))}, TypeError),
    (integer_loss, "where", {"where": jnp.ones((3, 3), bool)}, ValueError),
    (integer_loss, "axis_name", {"axis_name": np.zeros(2)}, TypeError),
    (integer_loss, "ignore_index", {"ignore_index": 0.5}, TypeError),
    (integer_loss, "label_smoothing", {"label_smoothing": 2}, ValueError),
    (integer_loss, "temperature", {"temperature": 0}, ValueError),
    (integer_loss, "temperature", {"temperature": "warm"}, TypeError),
    (integer_loss, "temperature", {"temperature": "2"}, TypeError),
    (integer_loss, "z_loss", {"z_loss": -1e-4}, ValueError),
    (integer_loss, "logit_softcap", {"logit_softcap": jnp.ones(2)}, ValueError),
    (integer_loss, "class_weight", {"class_weight": jnp.ones(2)}, ValueError),
    (dense_loss, "labels", {"labels": jnp.zeros((2, 2))}, ValueError),
    (dense_loss, "labels", {"labels": jnp.zeros((2, 3), complex)}, TypeError),
    (dense_loss, "class_weight", {"labels": ROWS, "class_weight": jnp.ones((2, 3))}, ValueError),
    (binary_loss, "labels", {"labels": jnp.zeros(2)}, ValueError),
    (binary_loss, "pos_weight", {"labels": ROWS, "pos_weight": jnp.ones(2)}, ValueError),
    (focal_loss, "alpha", {"labels": ROWS, "alpha": jnp.ones(2)}, ValueError),
    (focal_loss, "gamma", {"labels": ROWS, "gamma": -1}, ValueError),
]


@pytest.mark.parametrize(("f", "name", "arguments", "error"), BAD)
def test_errors_name_the_argument(f: Any, name: str, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name}\b"):
        f(**{"logits": ROWS, "labels": LABELS} | arguments)


# Derivatives in options, and options together with infinities.


@pytest.mark.long
def test_derivatives_in_options_where_rows_do_not_count(x64: None) -> None:
    x, y = np.concatenate([X, np.full((1, 5), NAN)]), np.append(Y, -100)
    live = y >= 0

    losses = [
        functools.partial(integer_loss, X, Y),
        functools.partial(dense_loss, X, SOFT),
        functools.partial(integer_loss, x, y, ignore_index=-100),
        functools.partial(integer_loss, x, y % 5, where=live),
        functools.partial(dense_loss, x, np.append(SOFT, SOFT[:1], 0), where=live),
    ]

    @jax.jit  # one program for all of them
    def run(options: dict[str, Any]) -> list[Any]:
        return [jax.grad(lambda options, loss=loss: loss(**options).sum())(options) for loss in losses]

    want, soft, ignored, masked, masked_soft = run(OPTIONS)
    for got, of_others in ((ignored, want), (masked, want), (masked_soft, soft)):
        for name in OPTIONS:
            # A row more of zeros: other roundings of sums of some 20 terms.
            np.testing.assert_allclose(got[name], of_others[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", ["temperature", "logit_softcap"])
@pytest.mark.parametrize("labels", ["integer", "soft"])
def test_derivatives_in_temperature_and_softcap_where_classes_are_masked(labels: str, name: str, x64: None) -> None:
    q = np.eye(5)[Y] if labels == "integer" else SOFT
    want = oracles.complex_step(
        lambda **a: oracles.cross_entropy(X, q, CLASSES, **a).sum(), {name: OPTIONS[name]}, name
    )
    cases: list[Any] = [(X, CLASSES), (np.where(CLASSES, X, NAN), CLASSES)]
    if labels == "integer":  # the others would make the loss of what does not exist infinite
        cases.append((np.where(CLASSES, X, -INF), None))

    def total(a: Any, x: Any, where: Any) -> Any:
        loss = functools.partial(integer_loss, x, Y) if labels == "integer" else functools.partial(dense_loss, x, q)
        return loss(where=where, **{name: a}).sum()

    got = jax.jit(lambda a: jnp.stack([jax.grad(total)(a, *case) for case in cases]))(OPTIONS[name])
    np.testing.assert_allclose(got, [want] * len(cases), rtol=1e-12)  # as above


def test_ignore_index_that_the_labels_cannot_hold() -> None:
    # −100 is 156 in uint8, and that is a class of its own.
    x, y = jnp.zeros((1, 200)), jnp.array([156], jnp.uint8)
    np.testing.assert_allclose(np.asarray(integer_loss(x, y, ignore_index=-100)), np.log(200), rtol=8 * U)


def test_what_has_no_weight_does_not_matter_even_at_infinity() -> None:
    x, one_hot = jnp.array([0.0, -INF]), jnp.array([0.0, 1.0])
    options: list[dict[str, Any]] = [{"label_smoothing": 1.0}, {"class_weight": jnp.array([1.0, 0.0])}]
    for given in options:
        assert integer_loss(x, 1, **given) == 0
        assert dense_loss(x, one_hot, **given) == 0


def test_infinite_logits_with_smoothing_and_z_loss() -> None:
    # Smoothing gives a class a share whose −log p is infinite.
    x = np.array([[INF, 1, 0]] * 2, np.float32)
    losses: list[Any] = [(integer_loss, np.arange(2)), (dense_loss, np.eye(2, 3, dtype=np.float32))]
    for loss, labels in losses:

        @jax.jit
        def run(x: Any, labels: Any, option: float, loss: Any = loss) -> Any:
            value, pull = jax.vjp(lambda x: loss(x, labels, z_loss=option), x)
            return loss(x, labels, label_smoothing=option), value, *pull(jnp.ones(2))

        smoothed, value, gradient = run(x, labels, 0.1)
        assert smoothed.tolist() == value.tolist() == [INF, INF]
        assert not np.isnan(gradient).any()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1, "temperature": 2.0}])
def test_a_row_without_classes_has_no_loss(options: dict[str, Any]) -> None:
    @jax.jit
    def run(x: Any, one_hot: Any, options: dict[str, Any]) -> Any:
        both = (lambda x: integer_loss(x, 1, **options), lambda x: dense_loss(x, one_hot, **options))
        return [(loss(x), jax.grad(loss)(x)) for loss in both]

    for value, gradient in run(np.full(3, -INF, np.float32), np.eye(3, dtype=np.float32)[1], options):
        assert value == 0
        assert gradient.tolist() == [0, 0, 0]


second_of_focal = jax.jit(jax.vmap(jax.hessian(focal_loss), (0, None, None, None)))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 2.5])
def test_second_derivatives_of_the_focal_loss_are_numbers(gamma: float) -> None:
    x = np.array([30, 45, 60, 80, 90, 200, 1e4], np.float32)
    for y in (0.0, 1.0):
        assert np.isfinite(second_of_focal(x, y, None, gamma)).all()
        assert np.isfinite(second_of_focal(-x, y, None, gamma)).all()


def test_derivative_of_the_focal_loss_in_gamma() -> None:
    # log(q) q^γ BCE with q = σ(−m): log q is −log(1 + e^m). Two products, and two logarithms of an ulp or two.
    for x in (3.0, 20.0, -20.0, 200.0):
        for gamma in (0.0, 2.0):
            softplus, loss = np.logaddexp(0, x), np.logaddexp(0, -x)
            got = jax.grad(lambda g, x=x: focal_loss(x, 1, gamma=g))(gamma)
            want = -softplus * np.exp(-gamma * softplus) * loss
            np.testing.assert_allclose(float(got), want, rtol=(32 + 2 * gamma * abs(x)) * U, atol=2.0**-126)


@jax.jit
def second_in_label(x: Any, y: Any, gamma: Any) -> Any:
    return [mode(jax.grad(focal_loss, 1), 1)(x, y, None, gamma) for mode in (jax.jacfwd, jax.jacrev)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("x", "y", "gamma"), [(-44, 0, 2), (-66, 0, 1), (50, 1, 2), (-44, 0, 1.5), (20, 1, 5), (-3, 0, 2)]
)
def test_second_derivatives_of_the_focal_loss_in_a_hard_label(x: float, y: float, gamma: float) -> None:
    # Of q^γ the derivatives are of q^{γ−1} and q^{γ−2}; a quotient by q² would be one by 0.
    def exact(y: Any) -> Any:
        p = 1 / (1 + mpmath.exp(-mpmath.mpf(x)))
        loss = -y * mpmath.log(p) - (1 - y) * mpmath.log(1 - p)
        return ((1 - y) * p + y * (1 - p)) ** mpmath.mpf(gamma) * loss

    with mpmath.workdps(60):
        want = float(mpmath.diff(exact, mpmath.mpf(y), 2, h=mpmath.mpf(10) ** -45))
    for got in second_in_label(float(x), float(y), float(gamma)):
        # A power of x in u, as of the loss, and some products.
        np.testing.assert_allclose(float(got), want, rtol=(32 + 2 * gamma * abs(x)) * U)


@pytest.mark.parametrize("x", [1e-6, -1e-6, 1e-4, 0.3, -3.0, 40.0])
def test_derivatives_in_binary_labels_do_not_cancel(x: float) -> None:
    x = float(np.float32(x))
    for weight in (0.0, 1.0, 1.5):
        got = jax.grad(binary_loss, 1)(x, 1.0, pos_weight=weight)
        with mpmath.workdps(40):
            want = float(weight * mpmath.log1p(mpmath.exp(-mpmath.mpf(x))) - mpmath.log1p(mpmath.exp(mpmath.mpf(x))))
        # (w − 1) log(1 + e^−|x|), with a few roundings, and −x or −wx: of no weight beside 1, x is all.
        size = abs(weight - 1) * np.log1p(np.exp(-abs(x))) + abs(x) * (weight if x < 0 else 1)
        assert abs(float(got) - want) <= 8 * U * size
    with mpmath.workdps(40):
        p = 1 / (1 + mpmath.exp(-mpmath.mpf(x)))
        want = float((1 - p) * (2 * (1 - 2 * p) * -mpmath.log(p) - (1 - p) * x))
    # Near 0 the two terms have one sign; in the tails a power of x in u.
    np.testing.assert_allclose(float(jax.grad(focal_loss, 1)(x, 1.0)), want, rtol=(32 + 4 * abs(x)) * U)


@pytest.mark.parametrize("x", [INF, -INF])
@pytest.mark.parametrize("label", [0, 1])
def test_an_infinite_logit_leaves_the_focal_loss_constant_in_gamma(x: float, label: int) -> None:
    # q is 0, as the loss is, or 1, whose powers are 1.
    for gamma in (0.0, 2.0):
        assert jax.grad(lambda g: focal_loss(x, label, gamma=g))(gamma) == 0


@pytest.mark.parametrize(("x", "label", "alpha"), [(INF, 0, 1.0), (-INF, 1, 0.0)])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_an_infinite_focal_loss_of_which_alpha_leaves_nothing(x: float, label: int, alpha: float, gamma: float) -> None:
    f = jax.value_and_grad(lambda x, y: focal_loss(x, y, alpha=alpha, gamma=gamma), (0, 1))
    value, (slope, by_label) = f(jnp.float32(x), jnp.float32(label))
    assert (value, slope) == (0, 0)
    assert by_label == (2 * alpha - 1) * INF  # the share grows by as much, times the loss


def test_an_infinite_logit_and_a_weight_of_0() -> None:
    by_label = jax.grad(lambda y, x: binary_loss(x, y, pos_weight=0.0))
    assert [by_label(0.5, -INF), by_label(0.5, INF)] == [0, -INF]  # −softplus(x)


def test_a_list_as_mask_is_refused() -> None:
    no_mask: Any = [[True, True, False]] * 2
    for f, labels in ((integer_loss, LABELS), (dense_loss, ROWS), (binary_loss, ROWS)):
        with pytest.raises(TypeError, match=r"^where"):
            f(ROWS, labels, where=no_mask)


def test_a_mask_of_classes_given_as_one_of_rows_is_told_how() -> None:
    for f, labels in ((integer_loss, LABELS), (dense_loss, ROWS)):
        with pytest.raises(ValueError, match=r"^where .* \(2,\) of the rows .*`where\[None\]`"):
            f(ROWS, labels, where=jnp.ones(3, bool))


@pytest.mark.parametrize("ratio", [5.0, 8.0, 20.0, 40.0])
def test_the_slope_of_a_saturated_softcap(ratio: float) -> None:
    # 1 − tanh² is 0 from 9 on. The slope of the loss is sech² there, since the other class has all.
    slope = jax.grad(lambda x: integer_loss(x, 1, logit_softcap=30.0))(jnp.array([30 * ratio, 0.0]))[0]
    # x/30 is exact; e^x, a sum and a quotient have a few roundings, which the square doubles.
    np.testing.assert_allclose(slope, 1 / np.cosh(ratio) ** 2, rtol=16 * U)


@pytest.mark.parametrize("ratio", [1e-4, 1e-2, 0.3, 0.6, 3.0])
def test_the_derivative_in_the_softcap(ratio: float) -> None:
    # p (tanh u − u sech² u), of which (2/3)u³ is left where u is small.
    x = np.float32(30 * ratio)
    got = jax.grad(lambda c: integer_loss(jnp.array([x, 0.0]), 1, logit_softcap=c))(30.0)
    with mpmath.workdps(40):
        u = mpmath.mpf(float(x)) / 30
        p = 1 / (1 + mpmath.exp(-30 * mpmath.tanh(u)))
        want = float(p * (mpmath.tanh(u) - u * mpmath.sech(u) ** 2))
    # Some ten roundings; from ½ on the difference makes up to five times as many of those before it.
    np.testing.assert_allclose(float(got), want, rtol=(10 if ratio < 0.5 else 50) * U)


@jax.jit
def second_of_softcap(x: Any, cap: Any) -> Any:
    """In x and the cap, by each pair of modes."""

    def loss(x: Any, cap: Any) -> Any:
        return integer_loss(jnp.stack([x, jnp.zeros_like(x)]), 1, logit_softcap=cap)

    modes = (jax.jacfwd, jax.jacrev)
    return [jnp.ravel(jnp.array(outer(inner(loss, (0, 1)), (0, 1))(x, cap))) for outer in modes for inner in modes]


@pytest.mark.long
@pytest.mark.parametrize("ratio", [-44.0, 0.3, 5.0, 8.0, 12.0, 30.0])
def test_second_derivatives_of_the_softcap(ratio: float) -> None:
    # log(1 + e^{c tanh(x/c)}) in x and the cap c. Where e is large its square is, and tanh is 1 to the last bit.
    cap = 4.0
    x = np.float32(cap * ratio)

    def exact(x: Any, cap: Any) -> Any:
        return mpmath.log1p(mpmath.exp(cap * mpmath.tanh(x / cap)))

    with mpmath.workdps(120):
        want = [float(mpmath.diff(exact, (mpmath.mpf(float(x)), cap), n)) for n in ((2, 0), (1, 1), (1, 1), (0, 2))]
    for got in second_of_softcap(x, cap):
        # As the first derivative in the cap, of terms of either sign; measured 14. What is not normal may be 0.
        np.testing.assert_allclose(got, want, rtol=50 * U, atol=2.0**-126)


@pytest.mark.long
@pytest.mark.parametrize("rows", [3, 256, 4096])
def test_a_cap_leaves_a_likely_label_its_loss(rows: int) -> None:
    # Alone and in a row, tanh may be rounded to two neighbours, 2e-6 apart once multiplied by the cap; but the label's
    # logit is the maximum. Beside such rows, one that makes all of them be summed about theirs.
    tops = np.linspace(58, 66, rows - 1, dtype=np.float32)
    x = np.zeros((rows, 4), np.float32)
    x[:-1, 3], x[-1] = tops, -200
    z = 30 * np.tanh(np.float64(tops) / 30)
    others = 3 * np.exp(-z)
    y = np.full(rows, 3)
    total = jax.jit(jax.value_and_grad(lambda x, y, cap: integer_loss(x, y, logit_softcap=cap).sum()))
    loss, gradient = total(x, y, 30.0)
    rest = others / (1 + others)
    # An ulp of tanh, and XLA has up to three, is 30 u of the exponential; the product with the cap has 16.
    rtol = 128 * U
    np.testing.assert_allclose(loss - np.float32(np.log(4)), 0, atol=4 * U)
    np.testing.assert_allclose(np.asarray(gradient)[:-1, 3], -rest / np.cosh(np.float64(tops) / 30) ** 2, rtol=rtol)
    of_each = np.asarray(integer_loss(x, y, logit_softcap=30.0))
    np.testing.assert_allclose(of_each[:-1], np.log1p(others), rtol=rtol)


OF_THREE = pytest.mark.parametrize(
    "loss", [integer_loss, lambda x, y, **options: dense_loss(x, jax.nn.one_hot(y, 3), **options)]
)


@pytest.mark.long
@OF_THREE
def test_a_temperature_with_a_large_offset(loss: Any) -> None:
    # The quotients, 3333 and some, would be rounded by 1e-4.
    x, t = np.array([1e4, 1e4 + 1, 1e4 + 3]), 3.0
    z = (x - x[2]) / t
    p = np.exp(z) / np.exp(z).sum()
    lse = x[2] / t - np.log(p[2])

    def f(x: Any, t: Any, z_loss: float) -> Any:
        return loss(x, 1, temperature=t, z_loss=z_loss)

    @jax.jit
    def run(x: Any, t: Any) -> Any:
        return [jax.value_and_grad(f, (0, 1))(x, t, z_loss) for z_loss in (0.0, 1e-3)]

    (value, (by_x, by_t)), with_z = run(np.float32(x), t)
    # A dozen roundings of numbers up to twice the result.
    rtol = 24 * U
    np.testing.assert_allclose(float(value), -np.log(p[1]), rtol=rtol)
    np.testing.assert_allclose(by_x, (p - [0, 1, 0]) / t, rtol=rtol)
    np.testing.assert_allclose(float(by_t), (z[1] - p @ z) / t, rtol=rtol)
    # With the square of log Σ e^z, which has the offset.
    value, (by_x, by_t) = with_z
    np.testing.assert_allclose(float(value), -np.log(p[1]) + 1e-3 * lse**2, rtol=rtol)
    np.testing.assert_allclose(by_x, (p - [0, 1, 0] + 2e-3 * lse * p) / t, rtol=rtol)
    np.testing.assert_allclose(float(by_t), (z[1] - p @ z - 2e-3 * lse * (x[2] / t + p @ z)) / t, rtol=rtol)
    # Rows that do not count, and such as have no class.
    rows, live = np.array([[0, 1, 3], [NAN, INF, 0], [-INF] * 3], np.float32), np.array([True, False, True])

    @jax.jit
    @jax.grad
    def of_rows(t: Any, rows: Any, live: Any) -> Any:
        return loss(rows, np.ones(3, int), where=live, temperature=t, z_loss=0.1).sum()

    assert of_rows(2.0, rows, live) == jax.jit(jax.grad(lambda t, x: f(x, t, 0.1)))(2.0, rows[0])


@OF_THREE
def test_smoothing_where_the_label_has_no_weight(loss: Any) -> None:
    # What is left is the share of the likely class, −log p = log1p(e⁻²⁰).
    x, w = np.array([0, -20, -INF], np.float32), np.array([1, 0, 1], np.float32)
    run = jax.jit(jax.value_and_grad(lambda w, x, smoothing: loss(x, 1, label_smoothing=smoothing, class_weight=w)))
    value, by_weight = run(w, x, 0.25)
    # log p by two logarithms, of which the differences from 0 and from 20 have an ulp or two; and two products.
    np.testing.assert_allclose(float(value), 0.125 * np.log1p(np.exp(-20.0)), rtol=8 * U)
    want = [0.125 * np.log1p(np.exp(-20.0)), 0.875 * (20 + np.log1p(np.exp(-20.0))), 0]
    np.testing.assert_allclose(by_weight, want, rtol=8 * U)


@OF_THREE
def test_a_gradient_where_one_class_has_all_of_the_weight_and_of_the_probability(loss: Any) -> None:
    # The loss is 0.9 + 0.1/2 times that of the class; its cotangents are equal and opposite, p₁ = σ(−20) the size.
    f = functools.partial(loss, class_weight=np.array([1, 0, 0], np.float32), label_smoothing=0.1)
    x, p = np.array([20, 0, -INF], np.float32), 1 / (1 + np.exp(20.0))
    want = 0.95 * np.array([-p, p, 0])
    # An exponential, its sum and some six products.
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: f(x, 0)))(x), want, rtol=16 * U)
    second = np.array([[1, -1, 0], [-1, 1, 0], [0, 0, 0]]) * 0.95 * p * (1 - p)
    np.testing.assert_allclose(jax.jit(jax.hessian(lambda x: f(x, 0)))(x), second, rtol=16 * U)


@OF_THREE
@pytest.mark.parametrize("option", ["label_smoothing", "z_loss", "class_weight"])
def test_derivatives_in_an_option_beside_an_infinite_loss_are_numbers(loss: Any, option: str) -> None:
    # In either mode: in forward mode 0, its derivative, would be multiplied by infinity.
    at = np.ones(3, np.float32) if option == "class_weight" else np.float32(0.2)

    def f(a: Any) -> Any:
        return loss(np.array([-INF, 0, 1], np.float32), 0, **{option: a})

    slope = jax.grad(f)(at)
    assert np.isfinite(slope).all()
    pushed = jax.jvp(f, (at,), (np.ones_like(at),))[1]
    np.testing.assert_allclose(pushed, slope.sum(), rtol=8 * U)  # the same products, of which some are 0


@OF_THREE
def test_smoothing_with_one_class_costs_nothing(loss: Any) -> None:
    run = jax.jit(lambda x: loss(x, 0, label_smoothing=0.1))
    for top in np.random.default_rng(0).normal(size=20) * 30:  # of about half, 2ᵏeʳ is not 1 after a division by it
        assert run(np.array([top, -INF, -INF], np.float32)) == 0


@OF_THREE
def test_options_beside_an_infinite_logit(loss: Any) -> None:
    @jax.jit
    def run(x: Any, t: float, cap: float, smoothing: float, zero: float) -> Any:
        of_cap = jax.value_and_grad(lambda cap, x: loss(x, 0, logit_softcap=cap))
        return (
            jax.grad(lambda t: loss(x, 0, temperature=t))(t),
            (of_cap(cap, x), of_cap(cap, x.at[0].set(1e9))),
            jax.grad(lambda smoothing: loss(x, 1, label_smoothing=smoothing))(smoothing),
            [loss(x, 0, z_loss=zero), loss(x, 0, label_smoothing=zero)],
        )

    by_t, (capped, far), by_smoothing, of_zero = run(np.array([INF, 0, 1], np.float32), 2.0, 3.0, 0.1, 0.0)
    assert by_t == by_smoothing == 0
    np.testing.assert_allclose(capped, far, rtol=8 * U)
    assert of_zero == [0, 0]  # as for a 0 that is not traced


def test_options_of_other_dtypes_leave_that_of_the_loss(x64: None) -> None:
    x, q = jnp.asarray(X, jnp.float32), jnp.asarray(SOFT, jnp.float32)
    options = {name: jnp.asarray(np.array(value)) for name, value in OPTIONS.items()} | {"temperature": jnp.array(2)}
    for f in (lambda x, o: integer_loss(x, Y, **o), lambda x, o: dense_loss(x, q, **o)):

        def run(x: Any, z: Any, f: Any = f) -> Any:
            value, pull = jax.vjp(lambda x, z: f(x, options | {"z_loss": z}), x, z)
            return value, *pull(value)

        assert [a.dtype for a in jax.eval_shape(run, x, options["z_loss"])] == [jnp.float32, jnp.float32, jnp.float64]


@pytest.mark.long
@pytest.mark.parametrize("option", ["temperature", "logit_softcap"])
def test_derivatives_where_a_logit_over_an_option_overflows(option: str) -> None:
    """The least number, by which many mask, over 0.5 is −∞, as is any logit below −1.7e38."""
    q, e0 = jnp.array([1.0, 0.0, 0.0]), jnp.array([1.0, 0.0, 0.0])

    def integer(x: Any, a: Any) -> Any:
        return integer_loss(x, 0, **{option: a})

    def dense(x: Any, a: Any) -> Any:
        return dense_loss(x, q, **{option: a})

    def entropy(x: Any, a: Any) -> Any:
        ones, zeros = jnp.ones((1, 1)), jnp.zeros((1, 3))
        return linear_cross_entropy(ones, zeros, jnp.array([0]), bias=x, return_aux=True, **{option: a})[1].entropy[0]

    @jax.jit
    def derivatives(x: Any) -> Any:
        a = jnp.array(0.5)
        every = [(jax.grad(f, (0, 1))(x, a), jax.jvp(f, (x, a), (e0, 1.0))[1]) for f in (integer, dense, entropy)]
        second = [jax.jvp(jax.grad(f, (0, 1)), (x, a), (e0, 1.0))[1] for f in (integer, dense, entropy)]
        return every, second

    # So unlikely a class is none. (A capped one is, and 1e30 is beyond any cap.)
    want = derivatives(jnp.array([0.0, -1e30, 1.0]))
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(want))
    for least in (-1e38, -float(jnp.finfo("float32").max)):
        for a, b in zip(jax.tree.leaves(derivatives(jnp.array([0.0, least, 1.0]))), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.long
@pytest.mark.parametrize(("x", "y"), [(INF, 1.0), (-INF, 0.0)])
def test_second_derivatives_of_a_focal_loss_of_0(x: float, y: float) -> None:
    for gamma in (0.0, 2.0):
        slope = jax.grad(functools.partial(focal_loss, gamma=gamma))
        assert jax.grad(slope)(x, y) == jax.jvp(lambda x, of=slope: of(x, y), (x,), (1.0,))[1] == 0


def test_the_derivative_in_a_label_that_is_smoothed_beside_an_infinite_logit() -> None:
    assert jax.grad(lambda y: binary_loss(INF, y, label_smoothing=0.1))(0.3) == -INF
