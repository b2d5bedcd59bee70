"""`forward_mode`: one derivative rule for every mode."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, zero_from_primal

Result = TypeVar("Result", covariant=True)


class EveryMode(Protocol[Result]):
    """What `forward_mode` returns, for type checkers: they know no parameters of a `jax.custom_vjp` function."""

    __name__: str
    defvjp: Callable[..., None]

    def __call__(self, *args: Any, **kwargs: Any) -> Result: ...


def forward_mode(f: "jax.custom_vjp[Result]") -> EveryMode[Result]:
    """Gives a `jax.custom_vjp` function a forward mode, so that it works in every mode.

    `jax.custom_vjp` takes one rule, the backward pass, and then refuses `jax.jvp`,
    `jax.linearize`, `jax.jacfwd` and `jax.hessian`. But the rule already holds all there is to know:

    - the backward pass maps a cotangent ȳ to Jᵀȳ, and it is *linear* in ȳ;
    - JAX can transpose a linear function, and the transpose of Jᵀ is J;
    - so the pushforward ẋ ↦ Jẋ is the transposed backward pass.

    Reverse mode transposes once more, arrives at the backward pass as written, and keeps the residuals that
    the rule keeps. Higher orders differentiate the rule itself, so a rule written in functions with exact
    derivatives has exact derivatives of every order.

    Args:
        f: a function decorated with `jax.custom_vjp`. Arguments and results may be pytrees; arguments may be
            integers, None or named in `nondiff_argnums`, and their cotangents may be None.

    Returns:
        A `jax.custom_jvp` function with the signature of `f`. Its `defvjp` is that of `f`, so the rule may be
        defined before or after.

    Raises:
        TypeError: if `f` is not a `jax.custom_vjp` function, and, when it is differentiated, if its backward
            pass cannot be transposed: because it is not linear in the cotangent, or because it applies an
            operation to the cotangent for which JAX has no transpose (`lax.while_loop`, another custom rule, `cg`, a
            kernel). A backward pass that adds a constant is not linear either, but transposes without complaint, and
            without the constant: reverse mode loses it too.

    Numerics:
        The pushforward evaluates the same products as the backward pass. That is wrapped in `jax.checkpoint`,
        since JAX would otherwise save what it computes from the residuals. A backward pass that loops with
        `lax.scan` needs its body wrapped in `jax.checkpoint(..., prevent_cse=False)` too.

        JAX 0.10 forgets custom rules, its own `jax.custom_jvp` included, in the forward derivative of the gradient of
        a `lax.scan` (`jax.hessian` of a loop). Here that is an error and not a wrong number; JAX 0.12 has mended it.

    Example:
        >>> import jax, jaxact
        >>> @jaxact.forward_mode
        ... @jax.custom_vjp
        ... def cube(x):
        ...     return x**3
        >>> cube.defvjp(lambda x: (cube(x), x), lambda x, g: (3 * x**2 * g,))
        >>> jax.jvp(cube, (2.0,), (1.0,))[1]
        Array(12., dtype=float32, weak_type=True)
        >>> float(jax.grad(cube)(2.0)), float(jax.hessian(cube)(2.0))
        (12.0, 12.0)

    References:
        Radul et al., "You Only Linearize Once" (POPL 2023), on deriving one mode from the other; jax issue 17840.
    """
    if not isinstance(f, jax.custom_vjp):
        raise TypeError(f"forward_mode: f must be a jax.custom_vjp function, got {type(f).__name__}.")

    @functools.partial(jax.custom_jvp, nondiff_argnums=f.nondiff_argnums)
    @functools.wraps(f)
    def in_every_mode(*args: Any) -> Any:
        return f(*args)

    def pushforward(*args: Any) -> Any:
        *static, primals, tangents = args
        return _transpose_backward(f, _bind_static(f, static, len(primals)), primals, tangents)

    # With symbolic zeros we learn which arguments move, and transpose with respect to those alone.
    in_every_mode.defjvp(pushforward, symbolic_zeros=True)
    in_every_mode.defvjp = f.defvjp  # type: ignore[attr-defined]  # custom_jvp has none, so we add it
    return cast(EveryMode[Result], in_every_mode)


def _bind_static(f: jax.custom_vjp, static: list[Any], count: int) -> Callable[..., Any]:
    """`f` as a function of its `count` differentiable arguments alone."""
    places = dict(zip(f.nondiff_argnums, static, strict=True))

    def bound(*primals: Any) -> Any:
        rest = iter(primals)
        return f(*(places[i] if i in places else next(rest) for i in range(len(places) + count)))

    return bound


def of_perturbed(f: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Callable[..., Any], list[Any], list[Any]]:
    """`f` as a function of the leaves that have a tangent, with their values and tangents."""
    tree: Any  # to type checkers, jaxlib's PyTreeDef has no methods
    leaves, tree = jax.tree.flatten(primals)
    tangent_leaves = tree.flatten_up_to(tangents)
    moves = [not isinstance(t, SymbolicZero) for t in tangent_leaves]

    def f_of_perturbed(perturbed: list[Any]) -> Any:
        rest = iter(perturbed)
        return f(*tree.unflatten(next(rest) if m else leaf for m, leaf in zip(moves, leaves, strict=True)))

    values, of_values = ([a for m, a in zip(moves, all, strict=True) if m] for all in (leaves, tangent_leaves))
    return f_of_perturbed, values, of_values


def _transpose_backward(f: jax.custom_vjp, bound: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    f_of_perturbed, values, perturbed_tangents = of_perturbed(bound, primals, tangents)

    def of_floats(perturbed: list[Any]) -> tuple[list[Any], Any]:
        out = f_of_perturbed(perturbed)
        return list(filter(_is_float, jax.tree.leaves(out))), out

    # Without the integer results: inside `shard_map` their cotangents would have to say on which devices they differ.
    floats, vjp, out = jax.vjp(of_floats, values, has_aux=True)
    types = [jax.typeof(v) for v in values]

    # Under checkpoint, partial evaluation saves the rule's residuals and nothing computed from them. Its barriers
    # against common subexpressions are not wanted: sharing work between the two passes is what we hope for.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def backward(float_cotangents: list[Any]) -> Any:
        # `jax.custom_vjp` takes a cotangent of another float dtype than the argument's.
        return [
            c if c.dtype == t.dtype else c.astype(t.dtype) for c, t in zip(vjp(float_cotangents)[0], types, strict=True)
        ]

    transpose = jax.linear_transpose(backward, floats)
    try:
        (float_tangents,) = transpose(perturbed_tangents)
    except Exception:
        # At higher orders this also runs the rules of functions that the backward pass calls, whose errors are not
        # ours to explain. Transposing shapes alone runs none of them.
        try:
            jax.eval_shape(transpose, perturbed_tangents)
        except Exception as error:
            raise TypeError(_not_transposable(f, error)) from error
        raise
    return out, _with_zeros(out, float_tangents)


def _not_transposable(f: jax.custom_vjp, error: Exception) -> str:
    name, why = getattr(f, "__name__", repr(f)), f" ({type(error).__name__}: {str(error).strip() or 'no message'})"
    if isinstance(error, AssertionError):  # of JAX's, to itself
        why = ""
    return (
        f"forward_mode: the backward rule of {name!r} cannot be transposed, so there is no forward mode to derive "
        f"from it{why}. Either it is not linear in the "
        "cotangent, or returns another shape than the argument has, which makes it wrong, or it applies to "
        "the cotangent an operation without a transpose (lax.while_loop, another custom rule, a kernel). Write the "
        "rule with transposable operations, or use jax.custom_vjp alone if reverse mode is enough."
    )


def _is_float(y: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(y), jnp.inexact)


def _with_zeros(out: Any, float_tangents: list[Any]) -> Any:
    """Tangents of all results: those given, and for the integer ones a zero, of the devices that hold them."""
    rest = iter(float_tangents)
    return jax.tree.map(lambda y: next(rest) if _is_float(y) else zero_from_primal(y), out)
