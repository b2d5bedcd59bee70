"""Maxima and sums over the classes of each row, in the way that is quick for their numbers.

XLA for CPU reduces a row at a time, and what it does at the start and the end of each takes longer than ten classes do.
So where there are few classes and many rows, all rows are taken at once, class by class, as slices.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

Axes = tuple[int, ...]

FEW = 12  # from 16 classes on it is as quick row by row


def maximum(x: Array, axis: Axes) -> Array:
    if class_by_class(x, axis):
        return lax.optimization_barrier(_in_pairs(jnp.maximum, _slices(x, axis)))
    return jnp.max(x, axis, initial=-jnp.inf)


def sum_over(x: Array, axis: Axes) -> Array:
    if class_by_class(x, axis):
        # Behind a barrier: XLA would find the sum again for each entry of the row that it is subtracted from.
        return lax.optimization_barrier(_in_pairs(jnp.add, _slices(x, axis)))
    return jnp.sum(x, axis)


def sum_but_largest(f: Callable[[Array], Array], x: Array, axis: Axes) -> Array:
    """Σ f(xⱼ) over all classes but the largest, of a few; of several that are the largest, over all but one.

    Of two classes the larger goes on to the next pair, and the smaller is one of the others. So the others are known
    without a mask, and their number without a count.
    """
    others = []

    def larger(a: Array, b: Array) -> Array:
        others.append(f(jnp.minimum(a, b)))
        return jnp.maximum(a, b)

    _in_pairs(larger, _slices(x, axis))
    return lax.optimization_barrier(_in_pairs(jnp.add, others))


def _slices(x: Array, axis: Axes) -> list[Array]:
    return [lax.index_in_dim(x, i, axis[0], keepdims=False) for i in range(x.shape[axis[0]])]


def _in_pairs(combine: Callable[[Array, Array], Array], arrays: list[Array]) -> Array:
    """All combined into one, by halving their number: a sum rounds once for each halving, and not for each array."""
    while len(arrays) > 1:
        pairs = [combine(a, b) for a, b in zip(arrays[::2], arrays[1::2], strict=False)]
        arrays = pairs + arrays[2 * len(pairs) :]
    return arrays[0]


def class_by_class(x: Array, axis: Axes) -> bool:
    """Whether there are so few classes, of so many rows, that they are taken one by one; on CPU alone."""
    narrow = len(axis) == 1 and 1 < class_count(x, axis) <= FEW and size(x) >= 2**8 * class_count(x, axis)
    return narrow and not jax.typeof(x).sharding.spec[axis[0]] and on_cpu()


def on_cpu() -> bool:
    """Whether it will run on CPU, as far as is known here. For speed alone: what is done for CPU is right anywhere."""
    return jax.default_backend() == "cpu"


def at_once(x: Array, axis: Axes) -> bool:
    """Whether to go through all rows at once, since a branch that may save a pass takes longer than the pass.

    So it is class by class, of few numbers, and of at least 4096 rows that lie one after another: there XLA for CPU
    makes one kernel of softmax, however often it goes through a row.
    """
    contiguous = axis == tuple(range(x.ndim - len(axis), x.ndim))
    return class_by_class(x, axis) or few(x) or (contiguous and size(x) >= 4096 * class_count(x, axis) > 0)


def small(x: Array) -> bool:
    """Whether there are so few numbers that to start anything takes longer than to go through them once more.

    XLA for CPU splits a loop that has many operations between threads, one with our exponential from 2000 numbers on.
    """
    return size(x) <= 2**15


def few(*arrays: Array) -> bool:
    """Whether there are so few numbers that to go through them takes no time."""
    return max(map(size, arrays)) <= 2**11


def class_count(x: Array, axis: Axes) -> int:
    """The number of classes; where it is symbolic, as in `jax.export`, more than there will be."""
    count = math.prod(x.shape[a] for a in axis)
    return count if isinstance(count, int) else 2**31


def size(x: Array) -> int:
    """The number of entries; 0 where it is symbolic, since what is done for few is right for any."""
    return x.size if isinstance(x.size, int) else 0


def spread(a: Array, axis: Axes) -> Array:
    """What there is one of for each row, for all entries of the row."""
    return jnp.expand_dims(a, axis)
