"""`forward_mode`: a function that has a backward rule works in every mode, and each mode uses that rule."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax._src.ad_checkpoint import saved_residuals
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxact import forward_mode

Function = Callable[..., Any]


def plain_and_every_mode(fun: Function, fwd: Function, bwd: Function, **options: Any) -> tuple[Any, Any]:
    """The same rule as a plain custom_vjp, which is the oracle for reverse mode, and through forward_mode."""
    plain, every = jax.custom_vjp(fun, **options), forward_mode(jax.custom_vjp(fun, **options))
    plain.defvjp(fwd, bwd)
    every.defvjp(fwd, bwd)
    return plain, every


@forward_mode
@jax.custom_vjp
def gauss(x: Array) -> Array:
    return jnp.exp(-x * x / 2)


gauss.defvjp(lambda x: (gauss(x), x), lambda x, g: (-g * x * gauss(x),))


def gauss_derivative(order: int, x: Any) -> np.ndarray:
    """(−1)ⁿ Heₙ(x) exp(−x²/2), with NumPy's Hermite polynomials."""
    x = np.asarray(x, np.float64)
    return np.polynomial.hermite_e.hermeval(x, [0.0] * order + [(-1.0) ** order]) * np.exp(-x * x / 2)


POINTS = np.array([-1.3, 0.4, 2.1])
MODES = {"fwd": jax.jacfwd, "rev": jax.grad}
NESTINGS = [names for order in (1, 2, 3, 4) for names in itertools.product(MODES, repeat=order)]


def nest(names: tuple[str, ...], f: Function) -> Function:
    return functools.reduce(lambda h, name: MODES[name](h), names, f)


def in_scan(f: Function) -> Function:
    return lambda x: lax.scan(lambda carry, y: (carry + f(y), None), jnp.zeros_like(x), x[None])[0]


@functools.cache
def jax_forgets_rules_in_scan() -> bool:
    """Whether JAX, as 0.10 does, drops the rule of any custom_jvp function in a scan that it linearizes."""
    odd = jax.custom_jvp(jnp.sin)
    odd.defjvp(lambda x, t: (odd(*x), 5 * odd(*x) * t[0]))
    return bool(jnp.abs(jax.jacfwd(jax.grad(in_scan(odd)))(jnp.ones(())) - 25 * jnp.sin(1.0)) > 1)


HOW: dict[str, Callable[[tuple[str, ...]], Function]] = {
    "eager": lambda names: lambda xs: nest(names, gauss)(xs[0])[None],
    "vmap": lambda names: jax.jit(jax.vmap(nest(names, gauss))),
    "remat in a scan": lambda names: jax.jit(lambda xs: lax.map(nest(names, jax.checkpoint(gauss)), xs)),
    "of a scan": lambda names: jax.jit(lambda xs: nest(names, in_scan(gauss))(xs[0])[None]),
}


# From third order on it compiles slowly. In a quick run one way must do: of third order the one in which most can go
# wrong, of fourth the eager one, where what is compiled is the same, but in pieces, and there each mode of each mode.
QUICK = {3: ["of a scan"], 4: ["eager"]}


def quick(names: tuple[str, ...], how: str) -> bool:
    return how in QUICK.get(len(names), HOW) and (len(names) < 4 or names[:2] == names[2:])


CASES = [
    pytest.param(n, how, id="-".join((*n, how)), marks=[] if quick(n, how) else [pytest.mark.exhaustive])
    for n in NESTINGS
    for how in HOW
    if len(n) < 4 or "scan" not in how
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("names", "how"), CASES)
@jax.check_tracer_leaks(False)  # it searches the heap at every trace, here for minutes; other tests run with it
def test_every_nesting_to_fourth_order(names: tuple[str, ...], how: str) -> None:
    derivative = HOW[how](names)
    if how == "of a scan" and "fwd" in names[(*names, "rev").index("rev") :] and jax_forgets_rules_in_scan():
        with pytest.raises(TypeError, match="custom_vjp"):  # JAX's error, where its own custom_jvp is silently wrong
            derivative(jnp.asarray(POINTS))
        return
    got = derivative(jnp.asarray(POINTS))
    # Sums of at most 16 products of magnitude below 10, each with a few roundings of 1.1e-16; some cancel.
    np.testing.assert_allclose(got, gauss_derivative(len(names), POINTS[: len(got)]), rtol=0, atol=1e-14)


@pytest.mark.usefixtures("x64")
@jax.check_tracer_leaks(False)  # for the same reason
def test_every_way_to_ask_for_a_derivative() -> None:
    x, v = jnp.asarray(POINTS), jnp.asarray([1.0, -2.0, 0.5])
    first, second = gauss_derivative(1, x), gauss_derivative(2, x)
    results = {
        "jvp": (jax.jvp(gauss, (x,), (v,))[1], first * v),
        "linearize": (jax.linearize(gauss, x)[1](v), first * v),
        "jacfwd": (jax.jacfwd(gauss)(x), np.diag(first)),
        "jacrev": (jax.jacrev(gauss)(x), np.diag(first)),
        "jvp of grad": (jax.jvp(jax.grad(lambda y: gauss(y).sum()), (x,), (v,))[1], second * v),
        "grad of jvp": (jax.grad(lambda y: jax.jvp(gauss, (y,), (v,))[1].sum())(x), second * v),
    }
    for name, (got, want) in results.items():
        # Two products and exp, of order 1: a few roundings of 1.1e-16.
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-15, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@jax.check_tracer_leaks(False)  # for the same reason
def test_narrow_dtypes_to_second_order(dtype: str) -> None:
    x = jnp.asarray(POINTS, dtype)
    for names in NESTINGS[2:6]:
        got = jax.jit(jax.vmap(nest(names, gauss)))(x)
        assert got.dtype == x.dtype
        # Eight roundings of quantities below 2 (x·x is larger, but exp damps it), eps/2 each.
        atol = 8 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(got, np.float64), gauss_derivative(len(names), x), rtol=0, atol=atol)


@pytest.mark.parametrize("rule_first", [False, True])
def test_jax_17840_forward_mode_for_a_custom_vjp_function(rule_first: bool) -> None:
    @jax.custom_vjp
    def cube(x: Array) -> Array:
        """x³."""
        return x**3

    every = None if rule_first else forward_mode(cube)
    (every or cube).defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))
    every = every or forward_mode(cube)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(cube, (2.0,), (1.0,))
    assert jax.jvp(every, (2.0,), (1.0,)) == jax.value_and_grad(every)(2.0) == (8.0, 12.0)
    assert (every.__name__, every.__doc__) == ("cube", "x³.")


@pytest.mark.usefixtures("x64")
def test_jax_16049_hessian_where_forward_and_backward_call_the_function_itself() -> None:
    hessian = jax.jit(jax.hessian(lambda x: gauss(x).prod()))(jnp.asarray(POINTS))
    value, first, second = (gauss_derivative(order, POINTS) for order in (0, 1, 2))
    want = np.outer(first / value, first / value) * value.prod()
    np.fill_diagonal(want, second / value * value.prod())
    np.testing.assert_allclose(hessian, want, rtol=1e-14)  # products of about a dozen factors, 1.1e-16 each


def test_options_of_defvjp_pass_through_and_arguments_at_rest_get_no_tangent() -> None:
    perturbed: list[tuple[bool, bool]] = []

    def fwd(x: Any, y: Any) -> tuple[Array, Any]:
        perturbed.append((x.perturbed, y.perturbed))
        return x.value * y.value, (x.value, y.value)

    every = forward_mode(jax.custom_vjp(lambda x, y: x * y))
    every.defvjp(fwd, lambda res, g: (g * res[1], g * res[0]), symbolic_zeros=True)
    assert jax.jvp(lambda x: every(x, 5.0), (2.0,), (1.0,)) == (10.0, 5.0)
    assert jax.jvp(lambda y: every(2.0, y), (5.0,), (1.0,)) == (10.0, 2.0)
    assert jax.grad(every, argnums=(0, 1))(2.0, 5.0) == (5.0, 2.0)
    assert perturbed == [(True, False), (False, True), (True, True)]


def test_pytrees_and_several_results() -> None:
    def fun(weights: dict[str, Array], pair: tuple[Array, list[Array]]) -> dict[str, Any]:
        x, (y,) = pair
        return {"product": weights["a"] * x, "rest": (x + y, [weights["b"] * y])}

    def bwd(res: Any, g: dict[str, Any]) -> Any:
        (w, (x, (y,))), (g_sum, (g_by,)) = res, g["rest"]
        return {"a": g["product"] * x, "b": g_by * y}, (g["product"] * w["a"] + g_sum, [g_sum + g_by * w["b"]])

    plain, every = plain_and_every_mode(fun, lambda *args: (fun(*args), args), bwd)
    args = ({"a": jnp.array([2.0, 3.0]), "b": jnp.array([5.0, 7.0])}, (jnp.arange(2.0), [jnp.array([1.5, 2.5])]))
    want = jax.jit(jax.jacrev(plain, (0, 1)))(*args)
    for mode in (jax.jacfwd, jax.jacrev):
        # Sums and products of small integers and halves: exact.
        jax.tree.map(np.testing.assert_array_equal, jax.jit(mode(every, (0, 1)))(*args), want)


STATIC = [{"nondiff_argnums": places} for places in ((0,), (1,), (2,), (0, 2))] + [{"nondiff_argnames": ("b",)}]


@pytest.mark.parametrize("options", STATIC, ids=str)
def test_static_arguments_at_any_place(options: dict[str, Any]) -> None:
    # The static arguments are strings, which JAX could not trace; their lengths multiply.
    def fwd(a: Any, b: Any, c: Any) -> tuple[Any, Any]:
        moving = [v for v in (a, b, c) if not isinstance(v, str)]
        return math.prod(len(v) for v in (a, b, c) if isinstance(v, str)) * sum(v * v for v in moving), moving

    def bwd(*args: Any) -> tuple[Any, ...]:
        *static, res, g = args
        return tuple(2 * math.prod(len(s) for s in static) * v * g for v in res)

    plain, every = plain_and_every_mode(lambda a, b, c: fwd(a, b, c)[0], fwd, bwd, **options)
    args = ["abc" if i in options.get("nondiff_argnums", (1,)) else i + 2.0 for i in range(3)]
    moving = tuple(i for i, arg in enumerate(args) if not isinstance(arg, str))
    assert jax.grad(plain, moving)(*args) == jax.grad(every, moving)(*args) == jax.jacfwd(every, moving)(*args)


def test_keyword_arguments_and_defaults() -> None:
    every = forward_mode(jax.custom_vjp(lambda x, y=3.0, z=2.0: x * y * z))
    every.defvjp(lambda x, y, z: (x * y * z, (x, y, z)), lambda r, g: (g * r[1] * r[2], g * r[0] * r[2], None))
    assert jax.jvp(lambda x: every(x), (5.0,), (1.0,)) == (30.0, 6.0)
    assert jax.jvp(lambda y: every(5.0, z=1.0, y=y), (4.0,), (1.0,)) == (20.0, 5.0)
    assert jax.grad(lambda y: every(y=y, x=5.0))(4.0) == 10.0


def test_labels_masks_none_and_integer_results() -> None:
    def fun(logits: Array, labels: Array, mask: Array, bias: Array | None) -> tuple[Array, Array, None]:
        shifted = logits if bias is None else logits + bias
        return jnp.where(mask, shifted[jnp.arange(3), labels], 0), jnp.argmax(logits, axis=-1), None

    def bwd(res: Any, g: Any) -> tuple[Any, ...]:
        logits, labels, mask, bias = res
        assert g[1].dtype == jax.dtypes.float0
        x_bar = jnp.where(mask, g[0], 0)[:, None] * jax.nn.one_hot(labels, 2, dtype=logits.dtype)
        return x_bar, None, None, None if bias is None else x_bar.sum(axis=0)

    plain, every = plain_and_every_mode(fun, lambda *args: (fun(*args), args), bwd)
    logits = jnp.array([[1.0, 2.0], [4.0, 3.0], [5.0, 6.0]])
    labels, mask = jnp.array([1, 0, 1]), jnp.array([True, True, False])
    args, argnums = (logits, labels, mask, jnp.array([0.5, 1.5])), (0, 3)
    want = jax.jit(jax.jacrev(lambda *a: plain(*a)[0], argnums))(*args)
    for mode in (jax.jacfwd, jax.jacrev):
        got = jax.jit(mode(lambda *a: every(*a)[0], argnums))(*args)
        jax.tree.map(np.testing.assert_array_equal, got, want)  # zeros and ones: exact
    # No bias; float0 tangents for the integers, and float0 back for the integer result.
    still = [np.zeros(a.shape, jax.dtypes.float0) for a in (labels, mask)]
    primals, tangents = jax.jvp(every, (logits, labels, mask, None), (logits, *still, None))
    np.testing.assert_array_equal(tangents[0], [2.0, 4.0, 0.0])
    np.testing.assert_array_equal(primals[1], [1, 0, 1])
    assert (tangents[1].dtype, primals[2], tangents[2]) == (jax.dtypes.float0, None, None)


def test_an_integer_result_inside_shard_map() -> None:
    # It differs between devices, and so must its tangent, though that is nothing.
    _, every = plain_and_every_mode(
        lambda x: (x**2, jnp.argmax(x)), lambda x: (every(x), x), lambda x, g: (2 * x * g[0],)
    )
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
    specs: Any = {"mesh": mesh, "in_specs": PartitionSpec("i"), "out_specs": PartitionSpec("i")}
    x = jnp.array([1.0, 2.0, 3.0])
    total = jax.shard_map(lambda x: every(x)[0], **specs)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: total(x).sum()))(x), 2 * x)
    np.testing.assert_array_equal(jax.jit(lambda x: jax.jvp(total, (x,), (x,))[1])(x), 2 * x * x)


def test_none_as_cotangent_and_empty_arrays_and_trees() -> None:
    every = forward_mode(jax.custom_vjp(lambda x, y, nothing: (x * y, {"x": x, "nothing": nothing})))
    # The rule holds y for a constant.
    every.defvjp(lambda x, y, nothing: (every(x, y, nothing), y), lambda y, g: (g[0] * y + g[1]["x"], None, ()))
    assert jax.jvp(lambda x, y: every(x, y, ()), (2.0, 3.0), (1.0, 1.0))[1] == (3.0, {"x": 1.0, "nothing": ()})
    assert jax.jvp(lambda y: every(2.0, y, ())[0], (3.0,), (1.0,))[1] == 0.0
    assert jax.grad(lambda y: every(2.0, y, ())[0])(3.0) == 0.0
    empty = jnp.zeros((0, 3))
    assert jax.jvp(gauss, (empty,), (empty,))[1].shape == (0, 3)
    assert jax.jacfwd(gauss)(empty).shape == jax.jacrev(gauss)(empty).shape == (0, 3, 0, 3)


def wasteful_bwd(x: Array, g: Array) -> tuple[Array]:
    """From one residual, several arrays as large."""
    t, s = jnp.tanh(x), jnp.exp(x)
    return (t * g * s + jnp.sin(s) * (g * t) * jnp.cos(t),)


def head_bwd(res: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """Computes the probabilities again, row by row."""
    x, w = res

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def row(w_bar: Array, x_row: Array) -> tuple[Array, Array]:
        logits_bar = g * jax.nn.softmax(x_row @ w)
        return w_bar + jnp.outer(x_row, logits_bar), w @ logits_bar

    w_bar, x_bar = lax.scan(row, jnp.zeros_like(w), x)
    return x_bar, w_bar


def some(*shape: int) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).normal(size=shape).astype(np.float32)


def head(x: Array, w: Array) -> Array:
    return jax.nn.logsumexp(x @ w, axis=-1).sum()


MATMUL = (jnp.matmul, lambda a, b: (a @ b, (a, b)), lambda res, g: (g @ res[1].T, res[0].T @ g))
WASTEFUL = (jnp.sin, lambda x: (jnp.sin(x), x), wasteful_bwd)
SCAN = (head, lambda x, w: (head(x, w), (x, w)), head_bwd)
WITH_ARGS = [(MATMUL, (some(4, 5), some(5, 6))), (WASTEFUL, (some(64),)), (SCAN, (some(8, 4), some(4, 32)))]
RULES = pytest.mark.parametrize(("rule", "args"), WITH_ARGS, ids=["matmul", "wasteful", "scan"])


@RULES
def test_reverse_mode_is_custom_vjp_and_forward_mode_its_transpose(rule: Any, args: Any) -> None:
    plain, every = plain_and_every_mode(*rule)
    y, argnums = plain(*args), tuple(range(len(args)))
    g = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    pullbacks = [lambda *a, f=f: jax.vjp(f, *a)[1](g) for f in (plain, every)]
    want, got = ([pullback(*args), jax.jit(pullback)(*args)] for pullback in pullbacks)
    jax.tree.map(np.testing.assert_array_equal, got, want)  # to the bit, eager and compiled
    jacobians = jax.jit(jax.jacfwd(every, argnums))(*args), jax.jit(jax.jacrev(plain, argnums))(*args)
    # The same sums, of at most 64 products of order 1, in another order: 64 roundings of 6e-8 at most.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=4e-6, atol=4e-6), *jacobians)


@RULES
def test_reverse_mode_keeps_the_residuals_of_the_rule_and_no_more(rule: Any, args: Any) -> None:
    args = jax.tree.map(jnp.asarray, args)
    plain, every = plain_and_every_mode(*rule)
    want = sum(arg.nbytes for arg in args)
    for f in (plain, every, jax.jit(every)):
        kept: list[Any] = [aval for aval, _ in saved_residuals(f, *args)]
        assert sum(aval.size * aval.dtype.itemsize for aval in kept) == want
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(jax.vjp(f, *args)[1])) == want  # eager


def test_forward_mode_uses_the_rule_and_not_the_function() -> None:
    """Autodiff of 0·x gives 0 and autodiff of x gives 1; the rules say otherwise."""
    _, straight_through = plain_and_every_mode(lambda x: 0 * x, lambda x: (0 * x, None), lambda _, g: (g,))
    _, clipped = plain_and_every_mode(lambda x: x, lambda x: (x, x), lambda x, g: (jnp.where(jnp.abs(x) < 1, g, 0),))
    x, v = jnp.array([0.3, 1.7, -2.2]), jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(jax.jvp(straight_through, (x,), (v,))[1], v)
    np.testing.assert_array_equal(jax.jvp(clipped, (x,), (v,))[1], [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(jax.grad(lambda x: clipped(x).sum())(x), [1.0, 0.0, 0.0])


def test_sharded_over_a_mesh() -> None:
    mesh, rows = Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data")
    x, v = some(4, 3), some(4, 3) + 1
    _, every = plain_and_every_mode(*WASTEFUL)

    def both(x: Any, v: Any) -> tuple[Array, Array]:
        return jax.jvp(every, (x,), (v,))[1], jax.vjp(every, x)[1](v)[0]

    mapped = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(rows, rows), out_specs=(rows, rows)))(x, v)
    placed = jax.jit(both)(*jax.device_put((x, v), NamedSharding(mesh, rows)))
    for got in (mapped, placed):
        # The same elementwise program, perhaps fused otherwise: a dozen roundings of 6e-8, of quantities below 10.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-5), got, both(x, v))
    assert placed[0].sharding.is_equivalent_to(NamedSharding(mesh, rows), 2)


@pytest.mark.parametrize("f", [math.sin, jax.custom_jvp(jnp.sin), 3], ids=lambda f: type(f).__name__)
def test_an_argument_that_is_no_custom_vjp_is_named(f: Any) -> None:
    with pytest.raises(TypeError, match=rf"forward_mode: f must be a jax\.custom_vjp .*got {type(f).__name__}"):
        forward_mode(f)


def with_backward(name: str, of_cotangent: Function, slope: Function = jnp.ones_like) -> Any:
    def twice(x: Array) -> Array:
        return 2 * x

    twice.__name__ = name
    every = forward_mode(jax.custom_vjp(twice))
    every.defvjp(lambda x: (2 * x, x), lambda x, g: (slope(x) * of_cotangent(g),))
    return every


NOT_TRANSPOSABLE: dict[str, Function] = {
    "product": lambda g: g * g,
    "double product": lambda g: 2 * g * g,  # at which JAX only asserts
    "maximum": lambda g: jnp.maximum(g, 0),
    "power": lambda g: g**2,
    "choice": lambda g: jnp.where(g > 0, g, 0),
    "while": lambda g: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, 2 * c[1]), (0, g))[1],
}


@pytest.mark.parametrize("backward", NOT_TRANSPOSABLE)
def test_a_backward_that_cannot_be_transposed_is_explained(backward: str) -> None:
    f = with_backward("culprit", NOT_TRANSPOSABLE[backward])
    for differentiate in (jax.jacfwd, jax.grad, lambda f: jax.jit(jax.grad(f))):
        with pytest.raises(TypeError, match=r"'culprit' cannot be transposed.*not linear.*Write the rule") as caught:
            differentiate(f)(1.5)
        assert "Assertion" not in str(caught.value)


def bug(*_: Any) -> Any:
    raise ValueError("a bug of the user's")


def test_an_error_in_the_rule_itself_is_not_hidden() -> None:
    fails_forward = forward_mode(jax.custom_vjp(lambda x: x))
    fails_forward.defvjp(bug, lambda _, g: (g,))
    for f, mode in itertools.product((fails_forward, with_backward("f", bug)), (jax.jacfwd, jax.grad, jax.hessian)):
        with pytest.raises(ValueError, match="a bug of the user's"):
            jax.jit(mode(f))(1.5)


@pytest.mark.parametrize("names", NESTINGS[2:6], ids="-".join)
def test_an_error_in_a_rule_that_the_rule_calls_is_not_hidden(names: tuple[str, ...]) -> None:
    """At second order, differentiating the transposed rule runs the rules of the functions that it calls."""
    with pytest.raises(ValueError, match="a bug of the user's"):
        nest(names, with_backward("f", lambda g: g, slope=with_backward("slope", bug)))(1.5)
    with pytest.raises(TypeError, match="backward rule of 'slope'") as caught:
        nest(names, with_backward("f", lambda g: g, slope=with_backward("slope", lambda g: g * g)))(1.5)
    assert "backward rule of 'f'" not in str(caught.value)


@pytest.mark.parametrize(("of_argument", "of_cotangent"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_cotangent_of_another_float_dtype_than_the_argument(of_argument: str, of_cotangent: str) -> None:
    # `jax.custom_vjp` takes it, and mixed precision has it: weights of 16 bits and gradients of 32.
    @forward_mode
    @jax.custom_vjp
    def f(w: Any) -> Any:
        return w.astype(jnp.float32) * 2

    f.defvjp(lambda w: (f(w), None), lambda _, g: ((2 * g).astype(of_cotangent),))
    w = jnp.asarray(3, of_argument)
    assert jax.grad(f)(w) == 2
    assert jax.jvp(f, (w,), (w,))[1] == 6
    assert jax.grad(f)(w).dtype == w.dtype
