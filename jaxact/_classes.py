"""Where the classes and the rows of an array lie on the devices, and what belongs to a label there."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType

from jaxact._canonical import wider
from jaxact._reductions import maximum, sum_over

AxisName = Any  # of a mesh axis, or several


class Classes(NamedTuple):
    """Where the class axis lies; hashable."""

    axis_name: AxisName = None  # the mesh axis over which it is split by hand
    lean: bool = False  # whether memory counts for more than the time of a pass

    def sum(self, a: Array) -> Array:
        here = sum_over(a, (a.ndim - 1,))[..., None]
        return here if self.axis_name is None else lax.psum(here, self.axis_name)

    def max(self, a: Array) -> Array:
        here = maximum(a, (a.ndim - 1,))[..., None]
        return here if self.axis_name is None else lax.pmax(here, self.axis_name)


def static_axis_name(axis_name: AxisName) -> AxisName:
    """`axis_name` as what a jitted call can hash. A list counts as a tuple."""
    names = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    try:
        hash(names)
    except TypeError:
        raise TypeError(f"axis_name must be the name of a mesh axis or a tuple of them, got {axis_name!r}.") from None
    return names


def varying(a: Any) -> frozenset[Any]:
    """The mesh axes along which devices hold different values, inside `shard_map`; none with check_vma=False."""
    return jax.typeof(a).mat.varying


def vary(a: Array, axes: frozenset[Any]) -> Array:
    missing = tuple(axes - varying(a))
    return lax.pcast(a, missing, to="varying") if missing else a


def alike(*arrays: Any) -> Any:
    """All divided over the same axes of a mesh, since a rule returns cotangents that are divided as its arguments.

    None, for one that is not given, remains.
    """
    given = jax.tree.leaves(arrays)
    axes = frozenset[Any]().union(*map(varying, given))
    varied = [vary(a, axes) for a in given]
    if len({jax.typeof(a).sharding for a in varied}) > 1:
        # That which JAX gives the result of an operation on all of them.
        common = jax.typeof(functools.reduce(jnp.logical_and, varied)).sharding
        varied = [jax.sharding.reshard(a, common) for a in varied]
    return jax.tree.unflatten(jax.tree.structure(arrays), varied)


def as_divided(a: Array, like: Array) -> Array:
    """`a` divided over the explicit axes of a mesh as `like` is."""
    wanted = jax.typeof(like).sharding
    return a if jax.typeof(a).sharding.spec == wanted.spec else jax.sharding.reshard(a, wanted)


def label_index(labels: Array, classes: int, axis_name: AxisName) -> tuple[Array, Array]:
    """The place of each label among this shard's classes, outside of them if on another; and which labels exist."""
    first: Any = 0 if axis_name is None else lax.axis_index(axis_name) * classes
    count = classes if axis_name is None else classes * lax.axis_size(axis_name)
    # A narrow or unsigned dtype holds neither the count nor a difference. (4 bits are promoted with nothing.)
    narrow = jnp.iinfo(labels.dtype).bits < 32
    wide = labels.astype(jnp.int32 if narrow else wider(labels.dtype, jnp.int32))
    exists = (wide >= 0) & (wide < count)
    return jnp.where(exists, wide, 0).astype(jnp.int32) - first, exists


def integer_labels(labels: Any, shape: tuple[int, ...], whose: str) -> Array:
    """The labels, if they are integers in the shape of `whose`."""
    array = jnp.asarray(labels)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {array.dtype}.")
    if array.shape != shape:
        raise ValueError(f"labels must have the shape of {whose}, {shape}, got {array.shape}.")
    return array


def as_row(of_classes: Array, ndim: int) -> Array:
    """What there is one of for each class, as a row among so many axes: JAX can be told not to add axes by itself."""
    return jnp.expand_dims(of_classes, range(ndim - 1))


def at_index(weights: Array | None, y: Array, axis_name: AxisName) -> Array | None:
    """The weight of each label."""
    if weights is None:
        return None
    if AxisType.Explicit in (jax.typeof(y).sharding.mesh.axis_types or ()) or weights.shape[0] == 0:
        # A gather needs a class; and over the explicit axes of a mesh, of which `vmap` may have taken one from the
        # type, it or its transpose may be more than JAX can divide.
        row, places = (as_row(a, y.ndim + 1) for a in (weights, jnp.arange(weights.shape[0])))
        local = jnp.sum(jnp.where(y[..., None] == places, row, 0), -1)
    else:
        local = jnp.take(weights, y, mode="clip")
    if axis_name is None:
        return local
    local = jnp.where((y >= 0) & (y < weights.shape[0]), local, 0)
    total = lax.psum(local, axis_name)
    # With check_vma=False the cotangent, the same on all devices, would be summed over them.
    return total if varying(local) else local + lax.stop_gradient(total - local)


def not_ignored(labels: Array, ignore_index: int) -> Array:
    """Where a label is not the one to ignore, which may not even exist in its dtype."""
    info = jnp.iinfo(labels.dtype)
    known = info.min <= ignore_index <= info.max
    return labels != ignore_index if known else jnp.ones_like(labels, bool)


def predicted(z: Array, classes: Classes) -> Array:
    """The first class with the largest logit."""
    z = lax.stop_gradient(z)  # a maximum over devices has no derivative
    largest = z >= classes.max(z)
    if not z.shape[-1]:
        return jnp.zeros(z.shape[:-1], int)
    place = jnp.argmax(largest, -1)  # of numbers, it takes XLA for CPU five times as long
    if classes.axis_name is None:
        return place
    # The first of the devices that have it.
    place = place + lax.axis_index(classes.axis_name) * z.shape[-1]
    return lax.pmin(jnp.where(jnp.any(largest, -1), place, jnp.iinfo(place.dtype).max), classes.axis_name)
