"""Arguments made canonical, once for all functions: dtypes, axes, masks, temperature, and the errors they raise."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

Axis = int | tuple[int, ...] | None


def require_array(name: str, x: ArrayLike) -> ArrayLike:
    """`x`, if it is an array or a number. Cheap, for use before a jitted call, which would take containers apart."""
    if hasattr(x, "aval"):  # JAX's own, most often: the quickest to tell
        return x
    if not (hasattr(x, "dtype") or isinstance(x, (bool, int, float, complex))):
        raise TypeError(f"{name} must be an array or a number, got {type(x).__name__}.")
    if isinstance(x, (np.ndarray, np.generic)):
        if x.dtype.kind in "OSUMm" or (x.dtype.kind == "f" and x.dtype.itemsize > 8):
            raise TypeError(f"{name} must be an array of numbers, got dtype {x.dtype}.")
        if not x.dtype.isnative:  # whose bytes a jitted call may take for those of native numbers
            raise TypeError(f"{name} must have the byte order of this machine, got dtype {x.dtype.str}.")
    elif hasattr(x, "dtype") and not hasattr(x, "__jax_array__"):  # another library's
        raise TypeError(
            f"{name} must be an array of JAX or NumPy or a number, got {type(x).__name__}: convert it first."
        )
    return x


def optional_array(name: str, x: ArrayLike | None) -> ArrayLike | None:
    """The same of what may be left out, which is None then."""
    return None if x is None else require_array(name, x)


def require_labels(name: str, labels: ArrayLike) -> ArrayLike:
    """The same of class labels, where those of NumPy that JAX cuts to 32 bits stay out of range."""
    labels = require_array(name, labels)
    if isinstance(labels, (np.ndarray, np.generic)) and labels.dtype.kind in "iu":
        dtype = jax.dtypes.canonicalize_dtype(labels.dtype)
        if dtype != labels.dtype:
            return np.clip(labels, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)
    return labels


def as_float(name: str, x: ArrayLike) -> Array:
    """`x` as a floating-point array: integers and bools become the default float."""
    array = jnp.asarray(require_array(name, x))
    if jnp.issubdtype(array.dtype, jnp.floating):
        if jnp.finfo(array.dtype).bits < 16:  # some of them have no infinity, and none is promoted implicitly
            raise TypeError(f"{name} must be a float of at least 16 bits, got {array.dtype}: cast it first.")
        return array
    if jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool:
        return array.astype(float)  # JAX reads `float` as float64 under jax_enable_x64 and as float32 otherwise
    raise TypeError(f"{name} must be real, got dtype {array.dtype}.")


def compute_dtype(dtype: Any) -> Any:
    """The dtype to compute in: float32 for narrower floats, else the dtype itself."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def widen(x: Array) -> Array:
    """`x` in the dtype to compute in."""
    return x.astype(compute_dtype(x.dtype))


def rounded_once(f: Callable[..., Any]) -> Callable[..., Any]:
    """Computes `f` in float32 or wider and rounds the results once, to the dtype of its first argument."""

    @functools.wraps(f)
    def in_compute_dtype(x: Array, *args: Any) -> Any:
        wide = jax.tree.map(functools.partial(_convert, compute_dtype(x.dtype)), (x, *args))
        return jax.tree.map(functools.partial(_convert, x.dtype), f(*wide))

    return in_compute_dtype


def _convert(dtype: Any, a: Any) -> Any:
    # Not needlessly: `astype` would make a Python number's weak dtype strong.
    return a.astype(dtype) if hasattr(a, "dtype") and a.dtype != dtype else a


def static_axis(axis: Any) -> Axis:
    """`axis` as what a jitted call can hash. A list counts as a tuple, as in `jax.nn`."""
    if axis is None or type(axis) is int:  # most often
        return axis
    try:
        return tuple(map(operator.index, axis)) if isinstance(axis, (tuple, list)) else operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be an int, a tuple of ints or None, got {shown(axis)}.") from None


def shown(value: Any) -> str:
    """What came for an option that must be known, for an error."""
    traced = isinstance(value, jax.core.Tracer)
    return "a traced value: under jit, name it in static_argnames" if traced else repr(value)


def wider(a: Any, b: Any) -> Any:
    """The wider of two dtypes. It is asked for: JAX may be told not to promote by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def canonical_axis(axis: Axis, ndim: int) -> tuple[int, ...]:
    """`axis` as a sorted tuple of distinct axes in [0, ndim); None means all."""
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis={axis} is out of range for an array with {ndim} dimensions.")
    canonical = tuple(sorted({a % ndim for a in axes}))
    if len(canonical) < len(axes):
        raise ValueError(f"axis={axis} names an axis twice.")
    return canonical


def broadcast(name: str, value: ArrayLike, shape: tuple[int, ...], whose: str) -> Array:
    """A real array in the shape of the argument `whose`."""
    array = as_float(name, value)
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to the shape {shape} of {whose}, got {array.shape}.") from None


def masked(x: Array, where: ArrayLike | None, fill: float, name: str = "the input") -> Array:
    """`x` with `fill` where the mask is False. What stood there, nan included, leaves no trace in any derivative.

    The name is that of the argument whose shape `x` has.
    """
    return x if where is None else _filled(x, where, fill, name)


# What is kept is the mask as it was given, and not what it is spread to, nor the zeros of the derivative.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _filled(x: Array, where: ArrayLike, fill: float, name: str) -> Array:
    return jnp.where(canonical_mask(where, x.shape, name), x, jnp.asarray(fill, x.dtype))


def canonical_mask(where: ArrayLike, shape: tuple[int, ...], whose: str) -> Array:
    """The mask in the shape of the argument `whose`."""
    mask = jnp.asarray(where)
    if mask.dtype != bool:
        raise TypeError(f"where must be boolean, got dtype {mask.dtype}.")
    try:
        return jnp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"where must broadcast to the shape {shape} of {whose}, got {mask.shape}.") from None


def canonical_int(name: str, value: Any, least: int | None = None, what: str = "an int") -> int:
    """A value that is known, as an int."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {what}, got {shown(value)}.") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number


def canonical_bool(name: str, value: Any) -> bool:
    """A choice that is known; 0 and 1 count as False and True."""
    if isinstance(value, (bool, int, np.bool_)) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {shown(value)}.")


def does_nothing(value: ArrayLike | None, literal: float) -> bool:
    """Whether an option is the literal that leaves it out, and then costs nothing."""
    return isinstance(value, (int, float)) and value == literal


def canonical_temperature(temperature: ArrayLike) -> ArrayLike | None:
    """The temperature, or None for a literal 1."""
    if does_nothing(temperature, 1):
        return None
    return canonical_scalar("temperature", temperature, lambda t: 0 < t < math.inf, "positive and finite")


def canonical_smoothing(epsilon: ArrayLike) -> ArrayLike | None:
    """The smoothing, or None for a literal 0."""
    if does_nothing(epsilon, 0):
        return None
    return canonical_scalar("label_smoothing", epsilon, lambda e: 0 <= e <= 1, "in [0, 1]")


def divisor(temperature: ArrayLike | None, x: Array) -> Array | None:
    """The temperature as what `x` is divided by: nan where it is not positive, which a traced one may be."""
    if temperature is None:
        return None
    t = as_float("temperature", temperature).astype(compute_dtype(x.dtype))
    return jnp.where(t > 0, t, jnp.nan)


def canonical_scalar(name: str, value: ArrayLike, accept: Callable[[float], bool], what: str) -> ArrayLike:
    """The value of an option.

    One that is known is checked, as what it will be in the default float. A traced one cannot be.
    """
    if np.ndim(require_array(name, value)) != 0:
        raise ValueError(f"{name} must be a scalar, got shape {np.shape(value)}.")
    try:
        number = float(value)  # type: ignore[arg-type]
    except jax.errors.ConcretizationTypeError:
        return value
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be a real number, got {value!r}.") from None
    dtype = jnp.result_type(float)
    rounded = number if 2.0**-126 <= abs(number) < 2.0**128 else _flushed(number, dtype)
    if not accept(rounded):
        got = f"{number}" if rounded is number else f"{number}, which is {rounded} in {dtype}"
        raise ValueError(f"{name} must be {what}, got {got}.")
    return value


def _flushed(number: float, dtype: Any) -> float:
    """The number itself, or 0 or infinity where XLA makes that of it."""
    info = jnp.finfo(dtype)
    if 0 < abs(number) < float(info.tiny):
        return 0.0
    return math.copysign(math.inf, number) if float(info.max) < abs(number) < math.inf else number
