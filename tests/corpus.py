"""Derivative rules to try a checker on: `WRONG` ones, which it must refute, and `RIGHT` ones, which it must not.

Every rule is short enough to be judged by reading it. A wrong one makes one mistake and is right otherwise, and the
mistake is at least 100 units of roundoff, in some element, for some cotangent. A right one is within 4 units of
Σⱼ |Jᵢⱼ||gⱼ|, or of what rounding its arguments would do, where nothing underflows.

`reference` is given where the function's own formula, differentiated in float64, would be wrong too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracles
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import linear_call

import jaxact

Function = Callable[..., Any]
HALF, BRAIN = jnp.float16, jnp.bfloat16


class Case(NamedTuple):
    """A function with its rule, arguments to try it at, and how to know better if the function itself does not."""

    name: str
    f: Callable[..., Any]
    args: tuple[Any, ...]
    reference: Callable[..., Any] | None = None
    why: str = ""
    edges: Any = ...


# --- Arguments ---


# Made and rounded by NumPy, so that importing this module compiles nothing.
def array(values: Any, dtype: Any = np.float32) -> Array:
    return jnp.asarray(np.asarray(values).astype(dtype))


def draw(*shape: int, scale: float = 1.0, dtype: Any = np.float32, seed: int = 0) -> Array:
    return array(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def between(low: float, high: float, count: int = 61, dtype: Any = np.float32) -> Array:
    return array(np.linspace(low, high, count), dtype)


X = draw(300)
LOGITS = draw(8, 10, scale=3)
CONFIDENT = array([[30, 0, -5], [-4, 25, 1], [0.5, 2, 35]])  # one probability of each row rounds to 1
MASK = array(np.random.default_rng(1).random(300) < 0.7, bool)
ROW_MASK = array(np.random.default_rng(1).random((8, 10)) < 0.7, bool)
TEMPERATURE = array(1.5)
POSITIVE = array(0.1 + 0.05 * np.cos(np.add.outer(range(4), range(4))))
EXPONENT = array(3, np.int32)
SQUARE = draw(6, 6), draw(6, 6, seed=1)
WELL_CONDITIONED = array(3 * np.eye(4) + np.random.default_rng(0).normal(size=(4, 4)) / 2)
LABELS = array([3, 1, 4, 1, 5, 9, 2, 6], np.int32)
PICKED = array([2, 7, 7, 1, 0, 7], np.int32)


# --- Ways to write a rule ---


def with_backward(value: Function, backward: Function) -> Any:
    """A custom_vjp function. `backward(*args, cotangent)` gives a tuple, the cotangent of every argument."""

    # Without the defaults of `value`, for which custom_vjp would want cotangents.
    @jax.custom_vjp
    def f(*args: Any) -> Any:
        return value(*args)

    f.defvjp(lambda *args: (value(*args), args), lambda args, g: backward(*args, g))
    return f


def elementwise(value: Function, slope: Function) -> Any:
    """A custom_vjp function of one argument with the derivative `slope`."""
    return with_backward(value, lambda x, g: (g * slope(x),))


def with_pushforward(value: Function, pushforward: Function) -> Any:
    """A custom_jvp function of one argument. `pushforward(x, tangent)` gives the value and its tangent."""
    f = jax.custom_jvp(value)
    f.defjvp(lambda primals, tangents: pushforward(*primals, *tangents))
    return f


def elementwise_forward(value: Function, slope: Function) -> Any:
    """A custom_jvp function of one argument with the derivative `slope`."""
    return with_pushforward(value, lambda x, t: (value(x), slope(x) * t))


def sine(backward: Function) -> Any:
    """sin with a rule in terms of the cotangent that the right one, g·cos x, would return."""
    return with_backward(jnp.sin, lambda x, g: (backward(g * jnp.cos(x)),))


def two_slopes(forward: Function, reverse: Function) -> Any:
    """sin, whose derivative is `forward` in forward mode and `reverse` in reverse mode."""

    def tangent(x: Array, t: Array) -> Any:
        slopes = forward(x), reverse(x)
        return linear_call(lambda s, t: s[0] * t, lambda s, g: s[1] * g, slopes, t)

    return with_pushforward(jnp.sin, lambda x, t: (jnp.sin(x), tangent(x, t)))


def otherwise_in_a_batch(f: Function, batched: Function) -> Any:
    """`f`, which jax.vmap replaces by `batched`."""
    g = custom_vmap(f)
    g.def_vmap(lambda axis_size, in_batched, x: (batched(x), True))  # of one argument, which is batched
    return g


def traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def at_x(name: str, f: Function, why: str) -> Case:
    """A case at 300 normal arguments that needs no reference."""
    return Case(name, f, (X,), None, why)


# --- Functions, as plain formulas ---


def sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))


def softplus(x: Array) -> Array:
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def softmax(x: Array, axis: int = -1) -> Array:
    e = jnp.exp(x - lax.stop_gradient(jnp.max(x, axis, keepdims=True)))
    return e / jnp.sum(e, axis, keepdims=True)


def softmax_of_at_most(x: Array) -> Array:
    """The minimum changes nothing but +inf − inf; and, where XLA for CPU takes another kernel for it, a nan."""
    peak = jnp.max(x, -1, keepdims=True)
    e = jnp.exp(jnp.minimum(x, peak) - peak)
    return e / jnp.sum(e, -1, keepdims=True)


def logsumexp(x: Array) -> Array:
    peak = lax.stop_gradient(jnp.max(x, -1, keepdims=True))
    return peak[..., 0] + jnp.log(jnp.sum(jnp.exp(x - peak), -1))


def log_softmax(x: Array) -> Array:
    return x - logsumexp(x)[..., None]


def layer_norm(x: Array) -> Array:
    centered = x - jnp.mean(x, -1, keepdims=True)
    return centered / jnp.sqrt(jnp.mean(centered * centered, -1, keepdims=True) + 1e-5)


def norm(x: Array) -> Array:
    peak = lax.stop_gradient(jnp.max(jnp.abs(x)))
    return peak * jnp.sqrt(jnp.sum((x / peak) ** 2))


def entropy(x: Array, mask: Array) -> Array:
    p = jnp.where(mask, softmax(jnp.where(mask, x, -jnp.inf)), 0)
    return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), -1)


def gelu(x: Array) -> Array:
    return x * (1 + lax.erf(x / np.sqrt(2).item())) / 2


def affine(parameters: dict[str, Array], x: Array) -> Array:
    return parameters["scale"] * x + parameters["shift"]


def tanh_steps(x: Array, w: Array, count: int) -> Array:
    return lax.scan(lambda carry, _: (jnp.tanh(carry @ w), None), x, None, length=count)[0]


def repeated(f: Function, x: Array, count: int) -> Array:
    return lax.scan(lambda carry, _: (f(carry), None), x, None, length=count)[0]


# --- References ---


def others(x: Array) -> Array:
    """Σ over j ≠ i of exp(xⱼ − xᵢ). Without the term j = i there is nothing that cancels in its derivative."""
    differences = x[..., None, :] - x[..., :, None]
    return jnp.sum(jnp.where(np.eye(x.shape[-1]) == 1, 0, jnp.exp(differences)), -1)


def exact_softmax(x: Array) -> Array:
    return 1 / (1 + others(x))


def exact_log_softmax(x: Array) -> Array:
    return -jnp.log1p(others(x))


def exact_cross_entropy(x: Array, labels: Array) -> Array:
    return -jnp.take_along_axis(exact_log_softmax(x), labels[:, None], -1)[:, 0]


def mp_sigmoid(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def mp_softplus(x: Any) -> Any:
    return mpmath.log(1 + mpmath.exp(x))


def mp_log_sigmoid(x: Any) -> Any:
    return -mpmath.log(1 + mpmath.exp(-x))


def mp_logit(p: Any) -> Any:
    return mpmath.log(p / (1 - p))


# --- Wrong rules ---


def softmax_backward(x: Array, g: Array) -> Array:
    """Right but for rounding: where a probability rounds to 1, so does ⟨g, y⟩ to g."""
    y = softmax(x)
    return y * (g - jnp.sum(g * y, -1, keepdims=True))


def softmax_t_backward(x: Array, t: Array, g: Array) -> tuple[Array, Array]:
    y = softmax(x / t)
    z = y * (g - jnp.sum(g * y, -1, keepdims=True)) / t
    return z, -jnp.sum(z * jnp.log(y))


def temperature_backward_without_factor(x: Array, t: Array, g: Array) -> tuple[Array, Array]:
    x_bar, t_bar = softmax_t_backward(x, t, g)
    return x_bar * t, t_bar


def entropy_backward(x: Array, mask: Array, g: Array) -> tuple[Array, None]:
    p = softmax(jnp.where(mask, x, -jnp.inf))
    return -g[..., None] * p * (jnp.log(p) + entropy(x, mask)[..., None]), None


def layer_norm_backward(x: Array, g: Array) -> tuple[Array]:
    return (g / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5),)


def gather_backward(x: Array, g: Array) -> tuple[Array]:
    return (jnp.zeros_like(x).at[PICKED].set(g),)


def gelu_tanh_slope(x: Array) -> Array:
    t = jnp.tanh(0.79788456 * (x + 0.044715 * x**3))
    return (1 + t) / 2 + x * (1 - t * t) / 2 * 0.79788456 * (1 + 0.134145 * x * x)


def solve_backward(a: Array, b: Array, g: Array) -> tuple[Array, Array]:
    inverse = jnp.linalg.inv(a)
    return -inverse.T @ g @ (inverse @ b).T, inverse @ g


wrong_tanh = elementwise(jnp.tanh, lambda x: 1 - jnp.tanh(x))


WRONG: list[Case] = [
    # Nothing, or something else altogether
    Case("zero_jvp_200", elementwise_forward(sigmoid, jnp.zeros_like), (draw(200),), why="the derivative is 0"),
    Case("zero_jvp_2000", elementwise_forward(sigmoid, jnp.zeros_like), (draw(2000),), why="the derivative is 0"),
    at_x("zero_vjp", elementwise(sigmoid, jnp.zeros_like), "the derivative is 0"),
    Case("zero_bfloat16", elementwise(jnp.tanh, jnp.zeros_like), (draw(50, dtype=BRAIN),), why="the derivative is 0"),
    Case("zero_float16", elementwise(jnp.tanh, jnp.zeros_like), (draw(50, dtype=HALF),), why="the derivative is 0"),
    at_x("nan_slope", elementwise(jnp.sin, lambda x: x * jnp.nan), "the derivative is nan"),
    Case(
        "none_for_a_float",
        with_backward(jnp.multiply, lambda x, w, g: (g * w, None)),
        (X, draw(300, seed=1)),
        why="None, which means 0, as the cotangent of a float argument",
    ),
    # A forward rule that computes another value
    Case(
        "forward_returns_minus_f_1000",
        with_pushforward(sigmoid, lambda x, t: (-sigmoid(x), jaxact.sigmoid(x) * jaxact.sigmoid(-x) * t)),
        (draw(1000),),
        why="the forward rule returns −f(x)",
    ),
    # Factors
    at_x("sign_flipped", sine(lambda v: -v), "the sign"),
    at_x("factor_2", sine(lambda v: 2 * v), "a factor of 2"),
    at_x("factor_1_001", sine(lambda v: 1.001 * v), "a factor of 1.001"),
    at_x("factor_1_0001", sine(lambda v: 1.0001 * v), "a factor of 1.0001, 1700 u in float32"),
    Case("factor_float64", sine(lambda v: v * (1 + 1e-9)), (np.linspace(-2, 2, 20),), why="1 + 1e-9 in float64"),
    Case("log2_unit", elementwise(jnp.log, lambda x: 1.442695 / x), (between(0.1, 9),), why="the slope of log2"),
    at_x(
        "mean_without_1_over_n",
        with_backward(jnp.mean, lambda x, g: (jnp.full_like(x, g),)),
        "the derivative of the sum",
    ),
    # A few elements only
    at_x(
        "one_of_300",
        elementwise(jnp.sin, lambda x: jnp.cos(x) * jnp.where(np.arange(300) == 137, 1.01, 1)),
        "1 % in one element of 300",
    ),
    at_x("one_zero_of_300", sine(lambda v: v.at[299].set(0)), "the last of 300 elements is 0"),
    Case("last_row", sine(lambda v: v.at[-1].multiply(1.01)), (draw(20, 9),), why="1 % in the last row"),
    at_x("negative_side", elementwise(jnp.sin, lambda x: jnp.where(x < 0, 1.01, 1) * jnp.cos(x)), "1 % for negative x"),
    at_x(
        "beyond_a_threshold", elementwise(jnp.sin, lambda x: jnp.where(x > 2, 1.01, 1) * jnp.cos(x)), "1 % beyond x = 2"
    ),
    Case(
        "far_out",
        elementwise(lambda x: x / (1 + jnp.abs(x)), lambda x: jnp.where(x > 1e3, 0, (1 + jnp.abs(x)) ** -2)),
        (array(np.append(X, 1e4)),),
        why="0 instead of 1e-8 at one large x",
    ),
    # False zeros in the tails
    Case(
        "sigmoid_tail",
        elementwise(sigmoid, lambda x: sigmoid(x) * (1 - sigmoid(x))),
        (between(17, 30),),
        mp_sigmoid,
        "s(1 − s) is 0 where s rounds to 1",
    ),
    Case(
        "sigmoid_tail_both_sides",
        elementwise(sigmoid, lambda x: sigmoid(x) * (1 - sigmoid(x))),
        (between(-30, 30, 301),),
        sigmoid,
        "s(1 − s) is 0 where s rounds to 1",
    ),
    Case("jax_sigmoid_tail", jax.nn.sigmoid, (between(-20, 20, 81),), oracles.sigmoid, "s(1 − s) is 0 from 17 on"),
    Case(
        "sigmoid_tail_float64",
        elementwise(sigmoid, lambda x: sigmoid(x) * (1 - sigmoid(x))),
        (np.linspace(30, 60, 31),),
        mp_sigmoid,
        "s(1 − s) is 0 from 37 on in float64",
    ),
    Case(
        "log_sigmoid_tail",
        elementwise(lambda x: -softplus(-x), lambda x: 1 - sigmoid(x)),
        (between(10, 30),),
        mp_log_sigmoid,
        "1 − s is 0 where s rounds to 1",
    ),
    Case(
        "tanh_tail",
        elementwise(jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2),
        (between(9, 15),),
        mpmath.tanh,
        "1 − tanh² is 0 where tanh rounds to 1",
    ),
    Case(
        "softplus_as_relu",
        elementwise(softplus, lambda x: jnp.where(x > 20, 1, jnp.where(x < -20, 0, sigmoid(x)))),
        (between(-40, 40, 161),),
        mp_softplus,
        "0 instead of eˣ below −20",
    ),
    Case(
        "softplus_linear_from_5",
        elementwise(softplus, lambda x: jnp.where(x > 5, 1, sigmoid(x))),
        (between(-8, 8),),
        mp_softplus,
        "1 instead of σ(x) beyond x = 5",
    ),
    Case(
        "softmax_certain_row",
        with_backward(softmax, lambda x, g: (softmax_backward(x, g),)),
        (CONFIDENT,),
        exact_softmax,
        "y(g − ⟨g, y⟩) cancels where y rounds to 1",
    ),
    # softmax, its logarithm and its temperature
    Case(
        "softmax_without_sum",
        with_backward(softmax, lambda x, g: (softmax(x) * g,)),
        (LOGITS,),
        why="the second term is missing",
    ),
    Case(
        "softmax_sum_over_batch",
        with_backward(softmax, lambda x, g: (softmax(x) * (g - jnp.sum(g * softmax(x), 0, keepdims=True)),)),
        (LOGITS,),
        why="summed over the wrong axis",
    ),
    Case(
        "log_softmax_without_sum",
        with_backward(log_softmax, lambda x, g: (g - softmax(x) * g,)),
        (LOGITS,),
        why="the cotangents of a row are not summed",
    ),
    Case(
        "temperature_without_chain_factor",
        with_backward(lambda x, t: softmax(x / t), temperature_backward_without_factor),
        (LOGITS, TEMPERATURE),
        why="1/T is missing from the cotangent of the logits",
    ),
    Case(
        "temperature_ignored",
        with_backward(lambda x, t: softmax(x / t), lambda x, t, g: (softmax_t_backward(x, t, g)[0], jnp.zeros_like(t))),
        (LOGITS, TEMPERATURE),
        why="the cotangent of T is 0",
    ),
    Case(
        "softmax_temperature_log_p",
        with_backward(lambda x, t: softmax(x / t), softmax_t_backward),
        (array([[200, 0, -5], [1, 2, 3]]), TEMPERATURE),
        why="0·log 0 makes the cotangent of T nan",
    ),
    Case(
        "logsumexp_unshifted",
        with_backward(logsumexp, lambda x, g: (g[..., None] * jnp.exp(x) / jnp.sum(jnp.exp(x), -1, keepdims=True),)),
        (array([[100, 99, 3], [1, 2, 3]]),),
        why="eˣ overflows: inf/inf",
    ),
    Case(
        "cross_entropy_next_label",
        with_backward(
            lambda x, labels: -jnp.take_along_axis(log_softmax(x), labels[:, None], -1)[:, 0],
            lambda x, labels, g: (g[:, None] * (softmax(x) - jax.nn.one_hot((labels + 1) % 10, 10)), None),
        ),
        (LOGITS, LABELS),
        why="off by one in the label",
    ),
    # Masks
    Case(
        "mask_leaks",
        with_backward(lambda x, mask: jnp.where(mask, jnp.sin(x), 0), lambda x, mask, g: (g * jnp.cos(x), None)),
        (X, MASK),
        why="masked entries get a gradient",
    ),
    Case(
        "entropy_log_p",
        with_backward(entropy, entropy_backward),
        (LOGITS, ROW_MASK),
        why="0·log 0 at masked entries is nan",
    ),
    Case(
        "where_of_nan",
        lambda x: jnp.where(x > 0, jnp.sqrt(x), 0),
        (X,),
        lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0),
        "no custom rule, but autodiff multiplies 0 by nan in the branch not taken",
    ),
    # Not linear in the cotangent
    at_x("cotangent_squared", sine(lambda v: v * v), "quadratic in the cotangent"),
    at_x("cotangent_absolute", sine(jnp.abs), "the absolute value of the cotangent"),
    at_x("cotangent_plus_constant", sine(lambda v: v + 1e-3), "a constant is added"),
    at_x("cotangent_clipped_at_1", sine(lambda v: jnp.clip(v, -1, 1)), "clips the cotangent"),
    at_x("cotangent_clipped_at_100", sine(lambda v: jnp.clip(v, -100, 100)), "clips large cotangents"),
    at_x(
        "cotangent_in_bfloat16",
        with_backward(jnp.sin, lambda x, g: (g.astype(BRAIN).astype(g.dtype) * jnp.cos(x),)),
        "rounds the cotangent to bfloat16",
    ),
    Case(
        "matmul_in_bfloat16",
        with_backward(jnp.matmul, lambda x, w, g: ((g.astype(BRAIN) @ w.T.astype(BRAIN)).astype(x.dtype), x.T @ g)),
        (draw(16, 32), draw(32, 8, seed=1)),
        why="the backward product is computed in bfloat16",
    ),
    # The wrong formula
    at_x("residual_of_the_output", elementwise(jnp.sin, lambda x: jnp.cos(jnp.sin(x))), "keeps y for x"),
    at_x("relu_slope_1", elementwise(lambda x: jnp.maximum(x, 0), jnp.ones_like), "slope 1 at negative x too"),
    at_x("clip_slope_1_outside", elementwise(lambda x: jnp.clip(x, -1, 1), jnp.ones_like), "slope 1 outside too"),
    at_x("round_straight_through", elementwise(jnp.round, jnp.ones_like), "slope 1 of a step function"),
    at_x("expm1", elementwise(jnp.expm1, jnp.expm1), "expm1 instead of exp"),
    Case(
        "logit_of_p_squared",
        elementwise(jaxact.logit, lambda p: 1 / (p * p)),
        (between(0.05, 0.95),),
        why="1/p² for 1/(p(1 − p))",
    ),
    Case("gelu_of_tanh", elementwise(gelu, gelu_tanh_slope), (between(0, 4),), why="the slope of its approximation"),
    Case(
        "sqrt_with_epsilon",
        elementwise(jnp.sqrt, lambda x: 0.5 / jnp.sqrt(x + 1e-6)),
        (array([1e-8, 1e-6, 1e-4, 0.1, 1, 10]),),
        why="an ε in the root, wrong near 0",
    ),
    Case(
        "norm_with_epsilon",
        with_backward(norm, lambda x, g: (g * x / (norm(x) + 1e-6),)),
        (draw(20, scale=1e-5),),
        why="an ε in the denominator, wrong at small norms",
    ),
    Case(
        "norm_underflow",
        with_backward(norm, lambda x, g: (g * x / jnp.sqrt(jnp.sum(x * x)),)),
        (draw(20, scale=1e-25),),
        why="the squares underflow to 0",
    ),
    Case(
        "norm_overflow_float16",
        with_backward(norm, lambda x, g: (g * x / jnp.sqrt(jnp.sum(x * x)),)),
        (draw(20, scale=300, dtype=HALF),),
        why="the squares overflow in float16",
    ),
    Case(
        "softplus_overflow_float16",
        elementwise(softplus, lambda x: jnp.exp(x) / (1 + jnp.exp(x))),
        (between(0, 14, dtype=HALF),),
        oracles.softplus,
        "eˣ overflows in float16: inf/inf",
    ),
    at_x(
        "product_of_one_term", elementwise(lambda x: x * jnp.sin(x), jnp.sin), "one term of the product rule is missing"
    ),
    Case(
        "product_stop_gradient",
        lambda x: x * lax.stop_gradient(jnp.sin(x)),
        (X,),
        lambda x: x * np.sin(x),
        "no custom rule, but one factor is held constant",
    ),
    Case("layer_norm_constant_statistics", with_backward(layer_norm, layer_norm_backward), (LOGITS,), why="μ, σ fixed"),
    # Arguments, results and containers
    Case(
        "square_without_transpose",
        with_backward(jnp.matmul, lambda x, w, g: (g @ w, x.T @ g)),
        SQUARE,
        why="g w instead of g wᵀ, which only shapes that differ would show",
    ),
    Case(
        "square_transposed",
        with_backward(jnp.matmul, lambda x, w, g: (g @ w.T, g.T @ x)),
        SQUARE,
        why="the cotangent of w is transposed",
    ),
    Case(
        "cotangents_swapped",
        with_backward(jnp.matmul, lambda x, w, g: (x.T @ g, g @ w.T)),
        SQUARE,
        why="the cotangents of the two arguments are swapped",
    ),
    Case(
        "solve_without_transpose",
        with_backward(lambda a, b: jnp.linalg.inv(a) @ b, solve_backward),
        (WELL_CONDITIONED, draw(4, 3)),
        why="a⁻¹ instead of its transpose",
    ),
    Case(
        "leaves_swapped",
        with_backward(affine, lambda p, x, g: ({"scale": g, "shift": g * x}, g * p["scale"])),
        ({"scale": draw(30, seed=1), "shift": draw(30, seed=2)}, draw(30)),
        why="the cotangents of two leaves are swapped",
    ),
    at_x(
        "second_output_ignored",
        with_backward(lambda x: (jnp.sin(x), jnp.cos(x)), lambda x, g: (g[0] * jnp.cos(x),)),
        "the cotangent of the second result is not used",
    ),
    Case(
        "integer_n_plus_1",
        with_backward(
            lambda x, n: x ** n.astype(x.dtype),
            lambda x, n, g: (g * (n + 1).astype(x.dtype) * x ** n.astype(x.dtype), None),
        ),
        (between(0.5, 2), EXPONENT),
        why="(n + 1)xⁿ instead of nxⁿ⁻¹",
    ),
    Case(
        "gather_without_addition",
        with_backward(lambda x: x[PICKED], gather_backward),
        (draw(10),),
        why="an entry picked twice gets the cotangent of one of them",
    ),
    Case("cumsum_forwards", with_backward(jnp.cumsum, lambda x, g: (jnp.cumsum(g),)), (draw(40),), why="not reversed"),
    Case(
        "scan_without_last_step",
        with_backward(
            lambda x, w: tanh_steps(x, w, 5), lambda x, w, g: jax.vjp(lambda x, w: tanh_steps(x, w, 4), x, w)[1](g)
        ),
        (draw(4, 6), SQUARE[1]),
        why="the backward loop forgets a step",
    ),
    at_x("wrong_inside_scan", lambda x: repeated(wrong_tanh, x, 3), "1 − tanh for 1 − tanh², in a loop"),
    # The contract
    at_x(
        "cotangent_of_wrong_dtype",
        sine(lambda v: v.astype(BRAIN)),
        "a bfloat16 cotangent of a float32 argument, which JAX lets pass",
    ),
    at_x("cotangent_of_wrong_shape", sine(jnp.sum), "a scalar; JAX raises"),
    at_x("cotangents_too_many", with_backward(jnp.sin, lambda x, g: (g * jnp.cos(x), g)), "two; JAX raises"),
    # Right in one setting, wrong in another
    at_x(
        "wrong_under_jit",
        elementwise(jnp.sin, lambda x: jnp.cos(x) * (1.01 if traced(x) else 1)),
        "right eagerly, and 1 % off in a compiled program",
    ),
    Case(
        "value_wrong_under_jit",
        elementwise(lambda x: jnp.sin(x) * (1.01 if traced(x) else 1), jnp.cos),
        (X,),
        np.sin,
        "the value is 1 % off in a compiled program",
    ),
    at_x(
        "wrong_under_vmap",
        elementwise(jnp.sin, otherwise_in_a_batch(jnp.cos, lambda x: 1.01 * jnp.cos(x))),
        "the slope is 1 % off in a batch",
    ),
    Case(
        "value_wrong_under_vmap",
        elementwise(otherwise_in_a_batch(jnp.sin, lambda x: jnp.sin(x) * 1.01), jnp.cos),
        (X,),
        np.sin,
        "the value is 1 % off in a batch",
    ),
    at_x(
        "wrong_in_forward_mode",
        two_slopes(lambda x: 1.01 * jnp.cos(x), jnp.cos),
        "the two modes are not adjoint, and forward mode is the wrong one",
    ),
    at_x(
        "wrong_in_reverse_mode",
        two_slopes(jnp.cos, lambda x: 1.01 * jnp.cos(x)),
        "the two modes are not adjoint, and reverse mode is the wrong one",
    ),
    at_x(
        "wrong_in_eager_forward_mode",
        with_pushforward(jnp.sin, lambda x, t: (jnp.sin(x), (1 if traced(t) else 2) * jnp.cos(x) * t)),
        "right where JAX linearizes it, doubled in jax.jvp",
    ),
    at_x(
        "forward_mode_of_nonlinear",
        jaxact.forward_mode(sine(lambda v: v * jnp.abs(v))),
        "not linear in the cotangent, so there is nothing to transpose; jaxact raises",
    ),
    at_x(
        "forward_mode_of_factor",
        jaxact.forward_mode(sine(lambda v: 1.001 * v)),
        "a factor of 1.001, and so in every mode",
    ),
]


# --- Wrong in the second derivative alone ---

WRONG_AT_ORDER_2: list[Case] = [
    at_x(
        "softplus_constant_slope",
        elementwise(softplus, lambda x: lax.stop_gradient(jaxact.sigmoid(x))),
        "the slope is right and held constant",
    ),
    Case("jax_softplus_tail", jax.nn.softplus, (between(17, 30),), mp_softplus, "its slope rounds to 1, a constant"),
    at_x(
        "sigmoid_slope_with_wrong_slope",
        elementwise(sigmoid, elementwise(lambda x: jaxact.sigmoid(x) * jaxact.sigmoid(-x), sigmoid)),
        "the rule of the slope is wrong",
    ),
]


# --- Right rules ---


def cube_backward(x: Array, g: Array) -> tuple[Array]:
    return (g * 3 * x * x,)


def matmul_backward(x: Array, w: Array, g: Array) -> tuple[Array, Array]:
    return g @ w.T, x.T @ g


def in_float32(f: Function) -> Function:
    """`f` computed in float32 and rounded once to the dtype of its first argument."""
    return lambda x, *args: f(x.astype(np.float32), *(a.astype(np.float32) for a in args)).astype(x.dtype)


def cross_entropy(x: Array, labels: Array) -> Array:
    return -jnp.take_along_axis(jaxact.log_softmax(x), labels[:, None], -1)[:, 0]


def optional_shift(x: Array, shift: Array | None) -> Array:
    return x * x if shift is None else x * x + shift


def cube(x: Array) -> Array:
    return x * x * x


def piecewise(x: Array) -> Array:
    return jnp.where(x > 0, jnp.log1p(jnp.where(x > 0, x, 0)), jnp.sin(x))


SPREAD = between(-8, 8)
TAILS = between(-80, 80, 161)
WEIGHTS = draw(16, 32), draw(32, 8, seed=1)
custom_sine = elementwise(jnp.sin, jnp.cos)
custom_square = elementwise(lambda x: x * x, lambda x: 2 * x)


RIGHT: list[Case] = [
    # jaxact
    Case("sigmoid", jaxact.sigmoid, (SPREAD,), oracles.sigmoid, "moderate arguments"),
    Case("sigmoid_tails", jaxact.sigmoid, (TAILS,), mp_sigmoid, "slopes down to e⁻⁸⁰ where the value rounds to 1"),
    Case("sigmoid_tails_jax", jaxact.sigmoid, (TAILS,), sigmoid, "the same, of a JAX reference"),
    Case(
        "sigmoid_underflow", jaxact.sigmoid, (between(-300, 300, 121),), mp_sigmoid, "0 where e⁻ˣ is subnormal or less"
    ),
    Case("log_sigmoid", jaxact.log_sigmoid, (SPREAD,), oracles.log_sigmoid, "moderate arguments"),
    Case("log_sigmoid_tails", jaxact.log_sigmoid, (TAILS,), mp_log_sigmoid, "slopes down to e⁻⁸⁰"),
    Case(
        "softplus", jaxact.softplus, (SPREAD,), oracles.softplus, "at 0 autodiff of max(x, 0) + log1p(e^−|x|) gives 0"
    ),
    Case("softplus_tails", jaxact.softplus, (TAILS,), mp_softplus, "values and slopes down to e⁻⁸⁰"),
    Case("logit", jaxact.logit, (between(0.01, 0.99),), oracles.logit, "at ½ the value is 0"),
    Case(
        "logit_tails", jaxact.logit, (array([1e-30, 1e-10, 0.4999, 0.5, 0.5001, 0.999999]),), mp_logit, "slopes to 1e30"
    ),
    Case("softmax", jaxact.softmax, (LOGITS,), oracles.softmax, "a dense Jacobian in each row"),
    Case("softmax_certain", jaxact.softmax, (CONFIDENT,), exact_softmax, "y(g − ⟨g, y⟩) would cancel"),
    Case("softmax_axis_0", lambda x: jaxact.softmax(x, axis=0), (LOGITS,), why="sums over another axis than the last"),
    Case("softmax_large", jaxact.softmax, (array([1e4, 1e4 + 1, 1e4 - 2]),), exact_softmax, "e^10000 overflows"),
    Case("log_softmax", jaxact.log_softmax, (LOGITS,), oracles.log_softmax, "its own formula is not for autodiff"),
    Case("log_softmax_certain", jaxact.log_softmax, (CONFIDENT,), exact_log_softmax, "g − y Σ g would cancel"),
    Case(
        "logsumexp",
        lambda x: jaxact.logsumexp(x, axis=-1),
        (LOGITS,),
        oracles.logsumexp,
        "its own formula is not for autodiff",
    ),
    Case("logsumexp_certain", lambda x: jaxact.logsumexp(x, axis=-1), (CONFIDENT,), logsumexp, "slopes down to e⁻³⁵"),
    Case("softmax_temperature", lambda x, t: jaxact.softmax(x, temperature=t), (LOGITS, TEMPERATURE), why="a scalar"),
    Case(
        "softmax_masked",
        lambda x, mask: jaxact.softmax(x, where=mask),
        (LOGITS, ROW_MASK),
        why="a boolean argument, and entries whose derivative is 0",
    ),
    Case("sigmoid_bfloat16", jaxact.sigmoid, (between(-8, 8, dtype=BRAIN),), oracles.sigmoid, "rounded once"),
    Case("softmax_bfloat16", jaxact.softmax, (draw(8, 10, scale=3, dtype=BRAIN),), oracles.softmax, "rounded once"),
    Case("softmax_float16", jaxact.softmax, (draw(8, 10, scale=3, dtype=HALF),), oracles.softmax, "rounded once"),
    Case("sigmoid_float64", jaxact.sigmoid, (np.linspace(-30, 30, 61),), mp_sigmoid, "the oracle must beat float64"),
    # No custom rule
    at_x("sin", jnp.sin, "slopes near 0"),
    Case("sin_float64", jnp.sin, (np.linspace(-3, 3, 50),), mpmath.sin, "the oracle must beat float64"),
    Case("exp", jnp.exp, (between(-10, 10),), np.exp, "values of many sizes"),
    Case("matmul", jnp.matmul, WEIGHTS, why="two arguments, and sums of products"),
    Case("layer_norm", layer_norm, (LOGITS,), why="entries of the Jacobian that cancel"),
    at_x("linear", lambda x: 3 * x - x[::-1], "the slope does not depend on x"),
    at_x("constant", lambda x: jnp.ones_like(x), "the derivative is 0"),
    at_x("sign", jnp.sign, "the derivative is 0"),
    at_x("relu", jax.nn.relu, "0 on one side"),
    at_x("absolute", jnp.abs, "a kink, but not at these arguments"),
    at_x("pieces", piecewise, "two formulas in jnp.where"),
    Case("scalar", lambda x: x * jnp.sin(x), (array(0.7),), why="no dimensions"),
    Case("empty", jnp.sin, (draw(0, 3),), why="no elements"),
    Case("gather", lambda x: x[PICKED] ** 2, (draw(10),), why="an entry picked three times and entries never picked"),
    Case("cumsum", jnp.cumsum, (draw(40),), why="a triangular Jacobian"),
    Case("scan", lambda x, w: tanh_steps(x, w, 20), (draw(3, 4), POSITIVE), why="20 steps of rounding"),
    Case("inverse", jnp.linalg.inv, (WELL_CONDITIONED,), why="a function of a matrix"),
    Case(
        "cholesky_solve",
        lambda a, b: jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(a), True), b),
        (array(4 * np.eye(4) - np.asarray(POSITIVE)), array(np.exp(draw(4)))),
        why="a solver, of a matrix whose inverse is positive",
    ),
    Case("huge", lambda x: jnp.sqrt(x) * 3, (array(1e30 * np.exp(X)),), why="arguments of 1e30, slopes of 1e-15"),
    Case("huge_reciprocal", lambda x: 1 / x, (array(1e15 * np.exp(X)),), why="slopes of 1e-30"),
    Case("tiny", lambda x: jnp.sin(x) * 5, (draw(300, scale=1e-30),), why="arguments of 1e-30"),
    Case("tiny_square", custom_square, (draw(300, scale=1e-30),), why="the value underflows, the slope does not"),
    # 16 bits
    Case("tanh_bfloat16_inside", in_float32(jnp.tanh), (between(-2, 2, dtype=BRAIN),), np.tanh, "float32 inside", None),
    Case("sin_float16_inside", in_float32(jnp.sin), (between(-8, 8, dtype=HALF),), np.sin, "float32 inside"),
    Case("tanh_bfloat16", jnp.tanh, (between(-0.5, 0.5, dtype=BRAIN),), np.tanh, "bfloat16 throughout", None),
    Case("product_bfloat16", lambda x: 3 * x * x, (draw(40, dtype=BRAIN),), why="bfloat16 throughout"),
    Case("product_float16", lambda x: 3 * x * x, (draw(40, dtype=HALF),), why="float16 throughout"),
    # Custom rules
    at_x("cube_vjp", with_backward(cube, cube_backward), "reverse mode only"),
    at_x("cube_jvp", elementwise_forward(cube, lambda x: 3 * x * x), "a custom_jvp rule"),
    at_x("cube_every_mode", jaxact.forward_mode(with_backward(cube, cube_backward)), "forward_mode"),
    Case("matmul_vjp", with_backward(jnp.matmul, matmul_backward), WEIGHTS, why="two arguments of different shape"),
    Case(
        "matmul_every_mode",
        jaxact.forward_mode(with_backward(jnp.matmul, matmul_backward)),
        WEIGHTS,
        why="forward_mode",
    ),
    at_x("nested", elementwise(jnp.sin, elementwise(jnp.cos, lambda x: -jnp.sin(x))), "a rule in a rule"),
    at_x("composed", lambda x: custom_square(jax.jit(custom_sine)(x)), "a rule of a rule"),
    at_x("in_a_loop", lambda x: repeated(custom_sine, x, 3), "a rule inside lax.scan"),
    at_x("jitted", jax.jit(elementwise(jnp.sin, jnp.cos)), "a rule inside jit"),
    Case("mapped", jax.vmap(with_backward(lambda x: x @ x, lambda x, g: (2 * g * x,))), (draw(8, 5),), why="in vmap"),
    at_x("checkpointed", jax.checkpoint(lambda x: custom_sine(x) * 2), "a rule inside jax.checkpoint"),
    # Arguments, results and containers
    Case(
        "dictionary",
        with_backward(affine, lambda p, x, g: ({"scale": g * x, "shift": g}, g * p["scale"])),
        ({"scale": draw(30, seed=1), "shift": draw(30, seed=2)}, draw(30)),
        why="a pytree argument",
    ),
    Case(
        "tuple_of_weights",
        lambda layer, x: jnp.tanh(x @ layer[0] + layer[1]),
        ((draw(16, 8, scale=0.05), draw(8, scale=0.2, seed=1)), draw(5, 16)),
        why="a pytree argument without a custom rule",
    ),
    Case(
        "power",
        with_backward(
            lambda x, n: x ** n.astype(x.dtype),
            lambda x, n, g: (g * n.astype(x.dtype) * x ** (n - 1).astype(x.dtype), None),
        ),
        (between(0.5, 2), EXPONENT),
        why="an integer argument whose cotangent is None",
    ),
    Case("cross_entropy", cross_entropy, (LOGITS, LABELS), exact_cross_entropy, "an integer argument, and few results"),
    Case("without_shift", optional_shift, (X, None), why="None as an argument"),
    Case(
        "without_shift_vjp",
        with_backward(optional_shift, lambda x, shift, g: (2 * g * x, None)),
        (X, None),
        why="None as an argument of a custom rule",
    ),
    at_x(
        "two_outputs",
        with_backward(lambda x: (jnp.sin(x), jnp.cos(x)), lambda x, g: (g[0] * jnp.cos(x) - g[1] * jnp.sin(x),)),
        "a sum that cancels for some cotangents",
    ),
    Case(
        "value_and_index",
        lambda x: {"max": jnp.max(x, -1), "at": jnp.argmax(x, -1)},
        (LOGITS,),
        why="an integer result",
    ),
    at_x("mean", with_backward(jnp.mean, lambda x, g: (jnp.full_like(x, g / x.size),)), "one result of many"),
]
