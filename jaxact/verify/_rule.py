"""`rule`: is this derivative right?"""

import math
from collections.abc import Callable, Iterable
from types import EllipsisType
from typing import Any

import numpy as np

from jaxact._canonical import canonical_int
from jaxact.verify._report import Report
from jaxact.verify._session import MODES, TRANSFORMS, Session


def rule(
    f: Callable[..., Any],
    *args: Any,
    reference: Callable[..., Any] | None = None,
    derivative: Callable[..., Any] | None = None,
    modes: str | Iterable[str] = "auto",
    order: int = 1,
    bound: float | None = None,
    transforms: str | Iterable[str] = TRANSFORMS,
    edges: Any = ...,
    directions: int = 8,
    seed: int = 0,
) -> Report:
    """Verifies the derivative of `f` at `args`, in every mode that it has, against an oracle in float64 or better.

    Args:
        f: a function of arrays or pytrees, with custom rules or without. Where it would draw random numbers, of which
            float64 has others, it should be given what is drawn instead.
        *args: example inputs. Float arrays and numbers are differentiated, in float64, float32, bfloat16 or float16 as
            they come (a NumPy array of float64 is checked in float64 even where `jax_enable_x64` is off); integer
            arrays are not, and other Python values are constants.
        reference: the same function in JAX, in float64 NumPy, or in mpmath for one number. Without it the reference is
            what `f` itself computes, in float64 and without its custom rules. (One in NumPy is held against that by
            differences, and where the two disagree there is no verdict.)
        derivative: the exact derivative, in JAX, NumPy or mpmath: the slopes of an elementwise function, or the
            Jacobians as `jax.jacobian` lays them out.
        modes: "auto" for those that `f` has, or "reverse", "forward" or both, which must then exist.
        order: check derivatives up to this order.
        bound: k in |error| ≤ k·u·Σⱼ|Jᵢⱼ||gⱼ|, u the unit roundoff of the narrowest dtype. By default 8, to which is
            added what inputs off by 8 u would change; in float64, where the oracle is in float64 too, 1024.
        transforms: under which to check beside plain calls: of "jit", "vmap", "remat". Under "vmap" the (co)tangents
            are a batch, alone and with `args`: with one array of these at a time, and with all, so many that XLA takes
            other kernels than for them alone. Others of these rows hold other numbers, and must come out as alone; or
            have a nan or ±inf in them: where one is lost in the batch, a fact of the report says so, and the verdict
            remains.
        edges: for an elementwise function, where to check its first derivative besides: ... for a sweep of ±0 and all
            magnitudes, without ±inf and nan, absent where `f` takes no array of another shape, is not elementwise there
            or has a loop, which need not end there; a dict from input to derivative; or None. In the sweep a slope of
            nan is refuted, and at a kink one beyond those beside it; where no more is known, the report says so, and
            the verdict remains.
        directions: random directions beside the one-hot ones.
        seed: of the random numbers.

    Returns:
        A `Report`. Its verdict is "verified", "refuted" or, where the oracle does not know or the check could not have
        failed, "inconclusive".

    Raises:
        TypeError, ValueError: if an argument is not as above, or one of `args` or of the results is complex.

    Numerics:
        The error bound holds for each element and does not grow with the array. Jacobians of up to 2²¹ entries are
        checked whole, of larger ones 64 rows and columns, and products with random vectors that reach all of them. The
        same check is made on mutants of the products, and a verdict of "verified" means that all of them were refuted.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxact import verify
        >>> @jax.custom_vjp
        ... def sigmoid(x):
        ...     return 1 / (1 + jnp.exp(-x))
        >>> sigmoid.defvjp(lambda x: (sigmoid(x), sigmoid(x)), lambda s, g: (g * s * (1 - s),))
        >>> report = verify.rule(sigmoid, jnp.linspace(-20.0, 20.0, 9))
        >>> print(report.verdict, "-", report.reasons[0])
        refuted - the backward rule returns 0 where the derivative is 2.061e-09 (x = 20); 1 − f(x) has cancelled
    """
    wanted = () if modes == "auto" else _some_of('modes must be "auto" or', modes, MODES)
    if modes != "auto" and not wanted:
        raise ValueError(f'modes must be "auto" or of {MODES}, got {modes!r}.')
    transforms = _some_of("transforms must be", transforms, TRANSFORMS)
    for name, value, least in (("order", order, 1), ("directions", directions, 1), ("seed", seed, 0)):
        canonical_int(name, value, least)
    for name, f_or_none in (("reference", reference), ("derivative", derivative)):
        if f_or_none is not None and not callable(f_or_none):
            raise TypeError(f"{name} must be a function or None, got {f_or_none!r}.")
    if bound is not None:
        if not _is_number(bound):
            raise TypeError(f"bound must be a number or None, got {bound!r}.")
        if not 0 < bound < math.inf:
            raise ValueError(f"bound must be positive and finite, got {bound}.")
    if not (edges is None or isinstance(edges, (dict, EllipsisType))):
        raise TypeError(f"edges must be a dict from input to derivative, ... or None, got {type(edges).__name__}.")
    if isinstance(edges, dict) and not all(map(_is_number, (*edges, *edges.values()))):
        raise TypeError(f"edges must be a dict from numbers to numbers, got {edges!r}.")
    return Session(
        f=f, args=args, reference=reference, derivative=derivative, wanted=wanted, order=order, given_bound=bound,
        transforms=transforms, edges=edges, directions=directions, seed=seed,
    ).run()  # fmt: skip


def _some_of(must_be: str, value: Any, choices: tuple[str, ...]) -> tuple[str, ...]:
    """One of the choices, or several; the first words of the error."""
    try:
        some = (value,) if isinstance(value, str) else tuple(value)
    except TypeError:
        raise TypeError(f"{must_be} one or more of {choices}, got {value!r}.") from None
    if not all(isinstance(one, str) and one in choices for one in some):
        raise ValueError(f"{must_be} one or more of {choices}, got {value!r}.")
    return some


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return np.ndim(value) == 0 and not isinstance(value, (str, bytes))
