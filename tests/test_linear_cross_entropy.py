"""The fused head against a dense float64 one: options, edges, modes and errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxact
from jaxact import verify

head: Any = jaxact.linear_cross_entropy
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
D, V = 5, 11

# Every option alone, and all of them together.


def arguments(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, Any]:
    """Random ones, that every float type holds exactly."""

    def numbers(*size: int) -> np.ndarray:
        return np.round(rng.normal(size=size) * 16) / 16

    labels = np.where(rng.random(shape) < 0.2, -100, rng.integers(0, V, shape))
    return {
        "x": numbers(*shape, D), "w": numbers(D, V), "labels": labels, "bias": numbers(V), "w_layout": "vd",
        "where": rng.random(shape) < 0.8, "ignore_index": int(rng.choice([-100, -7])),
        "token_weight": abs(numbers(*shape)), "class_weight": abs(numbers(V)) + 0.25, "label_smoothing": 0.125,
        "z_loss": 0.25, "temperature": float(rng.choice([0.5, 2])), "logit_softcap": float(rng.choice([2, 4])),
        "reduction": rng.choice(["mean", "sum", "none"]).item(),
        "chunk": rng.choice(np.array([1, 4, 64, "auto"], object)), "return_aux": True,
    }  # fmt: skip


def chosen(given: dict[str, Any], names: Any) -> dict[str, Any]:
    """The arguments of those names, in the right layout and with labels that exist."""
    given = {name: given[name] for name in ("x", "w", "labels", *names)}
    if given.get("w_layout") == "vd":
        given["w"] = given["w"].T
    index = given.get("ignore_index", -100)
    labels = given["labels"]
    return given | {"labels": labels % V if index is None else np.where(labels == -100, index, labels)}


def combination(i: int) -> dict[str, Any]:
    """The i-th of 50 random sets of arguments."""
    rng = np.random.default_rng([50, i])
    shape = [(), (13,), (13,), (3, 5)][rng.integers(4)]
    given = arguments(rng, shape)
    if len(shape) == 2 and rng.random() < 0.5:  # broadcast
        given |= {"where": given["where"][:1], "token_weight": given["token_weight"][:, :1]}
    return chosen(given, [name for name in list(given)[3:] if rng.random() < 0.5])


ALONE: list[dict[str, Any]] = [
    {}, {"bias": 0}, {"w_layout": "vd"}, {"where": 0}, {"ignore_index": -7}, {"ignore_index": None},
    {"token_weight": 0}, {"class_weight": 0}, {"label_smoothing": 0.125}, {"z_loss": 0.25}, {"temperature": 2.0},
    {"logit_softcap": 2.0}, {"reduction": "sum"}, {"reduction": "none"}, {"chunk": 1}, {"chunk": 4}, {"chunk": 64},
    {"return_aux": True},
]  # fmt: skip
FLOATS = ("x", "w", "bias", "token_weight", "class_weight")
MOVING = (*FLOATS, "temperature", "label_smoothing", "z_loss", "logit_softcap")


def allowed(given: dict[str, Any], cotangent: np.ndarray, dtype: str) -> dict[str, Any]:
    """What errors roundings may leave in the loss and in the gradients of x, w and bias."""
    u, rounded = min(UNIT[dtype], 2.0**-24), UNIT[dtype] * (UNIT[dtype] > 2.0**-24)
    layout, t, e = given.get("w_layout"), given.get("temperature", 1), given.get("label_smoothing", 0)
    n, cap, factor = given["labels"].size, given.get("logit_softcap"), given.get("z_loss", 0)
    x, w = given["x"].reshape(n, D), given["w"].T if layout == "vd" else given["w"]
    bias, cw = given.get("bias", np.zeros(V)), given.get("class_weight", np.ones(V))
    z = x @ w + bias
    tanh = 0 if cap is None else np.tanh(z / cap)
    z = (z if cap is None else cap * tanh) / t
    # A logit is a sum of D products and the bias.
    slip = (D + 3) * u * (abs(x) @ abs(w) + abs(bias)).max(-1, keepdims=True) / t
    live = (given.get("where", True) & (given["labels"] != given.get("ignore_index", -100))).reshape(n)
    y = np.where(live, given["labels"].reshape(n), 0)
    hot = np.eye(V)[y]
    g = np.broadcast_to(live.reshape(given["labels"].shape) * given.get("token_weight", 1), given["labels"].shape)
    g = g.reshape(n)
    if given.get("reduction", "mean") == "none":
        g = g * cotangent.reshape(n)
    elif given.get("reduction", "mean") == "mean":
        g = g / max((g * cw[y]).sum(), 1e-30)
    lse = np.log(np.exp(z).sum(-1, keepdims=True))
    p, g = np.exp(z - lse), abs(g)[:, None]
    bar = cw[y][:, None] * (p - hot) + e / V * (p * cw.sum() - cw) + 2 * factor * lse * p
    terms = cw[y][:, None] * (p + hot) + e / V * (p * cw.sum() + cw) + 2 * factor * (abs(lse) + 1) * p
    # Probabilities move relatively by twice what the logits do, the slope of the cap by as much; a sum of V
    # exponentials, and some 16 operations more.
    bar, off = g * abs(bar) * (1 - tanh**2) / t, g * (4 * slip + (V + 16) * u) * terms / t
    size = g * (cw[y][:, None] * (lse + abs(z).max(-1, keepdims=True)) + factor * lse**2)
    each = bar * rounded + off + (n + V) * u * bar  # as it enters the products, and their sums
    w_bar = abs(x).T @ each
    return {
        "loss": (g * slip * terms).sum() + (n + V + 16) * u * abs(size).sum(),
        "x": (each @ abs(w).T).reshape(given["x"].shape),
        "w": w_bar.T if layout == "vd" else w_bar,
        "bias": (off + n * u * bar).sum(0),
    }


def check(given: dict[str, Any], dtype: str) -> float:
    """The largest error of value and gradients, in units of what is allowed."""
    cotangent = np.cos(np.arange(given["labels"].size)).reshape(given["labels"].shape)
    reduced = given.get("reduction", "mean") != "none"

    def cast(name: str, a: Any) -> Any:
        wide = "float64" if dtype == "float64" else "float32"
        return jnp.asarray(a, dtype if name in ("x", "w", "bias") else wide) if name in MOVING else a

    moving = {name: cast(name, a) for name, a in given.items() if name in MOVING}

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(moving: dict[str, Any]) -> Any:
        out = head(**given | moving)
        loss = out[0] if given.get("return_aux") else out
        return loss.sum() if reduced else (loss * cotangent).sum(), loss

    def exact(return_aux: bool = False, chunk: Any = None, **given: Any) -> Any:
        loss = oracles.linear_cross_entropy(**given)
        return loss if reduced else (loss * cotangent).sum()

    (value, loss), gradients = run(moving)
    assert loss.shape == (() if reduced else given["labels"].shape)
    assert loss.dtype == ("float64" if dtype == "float64" else "float32")
    want, bounds = exact(**given), allowed(given, cotangent, dtype)
    worst = abs(float(value) - want) / (bounds["loss"] + 1e-300)
    for name, got in gradients.items():
        assert got.dtype == moving[name].dtype, name
        exactly: Any = oracles.complex_step(exact, given, name)
        # Options are differentiated without 16 bits: some 500 roundings in sums of numbers as large as the largest.
        bound: Any = bounds.get(name, 500 * min(UNIT[dtype], 2.0**-24) * (abs(exactly).max() + abs(want)))
        error: Any = abs(np.asarray(got, np.float64) - exactly)
        bound = bound + (UNIT[dtype] if name in bounds else 0) * abs(exactly) + 1e-300
        worst = max(worst, (error / bound).max())
        assert (error <= bound).all(), (name, (error / bound).max())
    assert worst <= 1
    return worst


DTYPES = ("float64", "float32", "bfloat16")
slow: Any = functools.partial(pytest.param, marks=pytest.mark.exhaustive)


def cases(count: int, quick: int) -> Any:
    """Each number with each dtype; the first of them, in turn with one dtype, in a quick run."""
    return [
        pytest.param(i, dtype) if i < quick and DTYPES[i % 3] == dtype else slow(i, dtype)
        for i in range(count)
        for dtype in DTYPES
    ]


@pytest.mark.parametrize(("i", "dtype"), cases(len(ALONE), 6))  # the others are in the combinations
def test_each_option_alone(i: int, dtype: str, x64: None) -> None:
    given = chosen(arguments(np.random.default_rng(i), (13,)) | {k: v for k, v in ALONE[i].items() if v != 0}, ALONE[i])
    check(given, dtype)


@pytest.mark.long
@pytest.mark.parametrize(("i", "dtype"), cases(50, 3))
def test_random_combinations(i: int, dtype: str, x64: None) -> None:
    check(combination(i), dtype)


# Modes, in float64.

ORACLE = ("x", "w", "labels", "bias", "w_layout", "where", "ignore_index", "token_weight", "class_weight",
          "label_smoothing", "z_loss", "temperature", "logit_softcap", "reduction")  # fmt: skip
POINT = chosen(arguments(np.random.default_rng(7), (13,)), ORACLE[3:]) | {"chunk": 4}


def exactly(given: dict[str, Any]) -> Any:
    return oracles.linear_cross_entropy(**{name: a for name, a in given.items() if name in ORACLE})


VARIED = ("x", "w", "bias", "temperature", "class_weight")


@pytest.mark.parametrize("reduction", ["mean", slow("none")])
def test_every_mode(reduction: str, x64: None) -> None:
    given = POINT | {"reduction": reduction}
    cotangent, rng = np.cos(np.arange(13)) if reduction == "none" else np.ones(()), np.random.default_rng(8)
    at: dict[str, Any] = {name: np.asarray(POINT[name], float) for name in VARIED}
    v: dict[str, Any] = {name: rng.normal(size=np.shape(POINT[name])) for name in VARIED}

    def f(moving: Any) -> Any:
        return (head(**given | moving) * cotangent).sum()

    def exact(**moving: Any) -> Any:
        return (exactly(given | moving) * cotangent).sum()

    def along(s: float) -> dict[str, Any]:
        return {name: at[name] + s * v[name] for name in VARIED}

    @jax.jit
    def run(at: Any, v: Any) -> Any:
        """All modes in one program, which is faster to compile."""
        gradient, forward = jax.jvp(jax.grad(f), (at,), (v,))
        reverse = jax.grad(lambda at: sum(jnp.vdot(a, v[name]) for name, a in jax.grad(f)(at).items()))(at)
        return jax.jvp(f, (at,), (v,))[1], gradient, reverse, forward

    pushed, gradient, reverse, forward = run(at, v)
    # 1e-12: about a hundred roundings of numbers up to a hundred times the result.
    slope = exact(**{name: at[name] + 1e-30j * v[name] for name in VARIED}).imag / 1e-30
    np.testing.assert_allclose(float(pushed), slope, rtol=1e-12)
    np.testing.assert_allclose(sum(np.vdot(gradient[name], v[name]) for name in VARIED), slope, rtol=1e-12)
    for name in VARIED:
        # A central difference of exact gradients: h² is 1e-10, rounding divided by h 1e-11, numbers up to 100.
        up, down = (oracles.complex_step(exact, along(h), name) for h in (1e-5, -1e-5))
        want = (up - down) / 2e-5
        np.testing.assert_allclose(reverse[name], want, rtol=1e-7, atol=1e-8, err_msg=name)
        np.testing.assert_allclose(forward[name], reverse[name], rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.long
def test_auxiliary(x64: None) -> None:
    given = POINT | {"return_aux": True, "reduction": "mean"}
    live, c = given["where"] & (given["labels"] != given["ignore_index"]), np.cos(np.arange(26)).reshape(2, 13)

    def logits(x: Any, w: Any, bias: Any) -> Any:
        cap, z = given["logit_softcap"], x @ (w.T if given["w_layout"] == "vd" else w) + bias
        z = cap * np.tanh(z / cap) / given["temperature"]
        return z, np.log(np.exp(z).sum(-1))

    def exact(**moving: Any) -> Any:
        z, lse = logits(**moving)
        return live * lse, live * (lse - (np.exp(z - lse[:, None]) * z).sum(-1))

    at = {name: given[name] for name in ("x", "w", "bias")}

    def with_extras(at: Any) -> Any:
        loss, aux = head(**given | at)
        return loss + (c[0] * aux.log_sum_exp + c[1] * aux.entropy).sum()

    @jax.jit
    def run(at: Any) -> Any:
        """All in one program, which is faster to compile."""
        return head(**given | at), head(**given | at | {"return_aux": False}), jax.grad(with_extras)(at)

    (loss, aux), without, gradient = run(at)
    np.testing.assert_allclose(loss, without, rtol=1e-13)  # another sum
    z, _ = logits(**at)
    for got, want in zip((aux.log_sum_exp, aux.entropy), exact(**at), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    assert aux.predicted.tolist() == np.where(live, z.argmax(-1), -1).tolist()
    assert aux.correct.tolist() == (live & (z.argmax(-1) == given["labels"])).tolist()
    assert int(aux.valid) == live.sum()

    def total(**moving: Any) -> Any:
        lse, entropy = exact(**moving)
        loss = exactly(given | moving)
        return loss + (c[0] * lse + c[1] * entropy).sum()

    for name, got in gradient.items():
        np.testing.assert_allclose(got, oracles.complex_step(total, at, name), rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rules_are_verified(reduction: str, dtype: str) -> None:
    rng, labels = np.random.default_rng(9), np.array([1, 0, 3])
    x, w = jnp.asarray(rng.normal(size=(3, 3)), dtype), jnp.asarray(rng.normal(size=(3, 4)), dtype)

    def reference(x: Any, w: Any) -> Any:
        z = x @ w
        loss = jnp.log(jnp.sum(jnp.exp(z), -1)) - jnp.sum(z * np.eye(4, dtype=np.float32)[labels], -1)
        return jnp.mean(loss) if reduction == "mean" else loss

    def rule(x: Any, w: Any) -> Any:
        return head(x, w, labels, reduction=reduction, chunk=2)

    # Under jit the other tests call it.
    verify.rule(rule, x, w, reference=reference, transforms=()).raise_if_not_ok()


# Errors.

N = 7
X, W = np.zeros((N, D), np.float32), np.zeros((D, V), np.float32)
Y, BIAS = np.zeros(N, int), np.zeros(V, np.float32)
BAD: list[tuple[str, dict[str, Any], type[Exception]]] = [
    ("x", {"x": [[0.0] * D] * N}, TypeError), ("x", {"x": X + 0j}, TypeError), ("x", {"x": X[:, :4]}, ValueError),
    ("x and w", {"w": W.astype(np.float16)}, TypeError), ("x", {"w": W[0]}, ValueError), ("w", {"w": None}, TypeError),
    ("labels", {"labels": X[:, 0]}, TypeError), ("labels", {"labels": Y[:3]}, ValueError),
    ("labels", {"labels": [0] * N}, TypeError), ("bias", {"bias": BIAS[:3]}, ValueError),
    ("bias", {"bias": [0.0] * V}, TypeError), ("w_layout", {"w_layout": "vv"}, ValueError),
    ("where", {"where": np.ones(N)}, TypeError), ("where", {"where": np.ones(3, bool)}, ValueError),
    ("ignore_index", {"ignore_index": 0.5}, TypeError), ("token_weight", {"token_weight": np.ones(3)}, ValueError),
    ("class_weight", {"class_weight": np.ones(3)}, ValueError), ("label_smoothing", {"label_smoothing": 2}, ValueError),
    ("z_loss", {"z_loss": -1}, ValueError), ("temperature", {"temperature": 0}, ValueError),
    ("temperature", {"temperature": np.ones(2)}, ValueError), ("logit_softcap", {"logit_softcap": 0}, ValueError),
    ("reduction", {"reduction": "avg"}, ValueError), ("chunk", {"chunk": 0}, ValueError),
    ("chunk", {"chunk": 1.5}, TypeError), ("accum_dtype", {"accum_dtype": int}, TypeError),
    ("accum_dtype", {"accum_dtype": jnp.float16}, ValueError),
    ("accum_dtype", {"accum_dtype": jnp.float64}, ValueError), ("precision", {"precision": {}}, TypeError),
    ("Precision", {"precision": "sharp"}, ValueError), ("axis_name", {"axis_name": np.zeros(2)}, TypeError),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "error"), BAD)
def test_errors_name_the_argument(name: str, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name}\b"):
        head(**{"x": X, "w": W, "labels": Y} | arguments)
