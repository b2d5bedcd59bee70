"""What a row's logits come to, seen from its label: the label's logit, and the sum over all the other classes.

Rows have their classes on the last axis, whole or split over devices.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._branches import unless_all
from jaxact._canonical import compute_dtype
from jaxact._classes import Classes, as_row
from jaxact._elementary import exp
from jaxact._exponentials import room, scaled_exponentials, whole_shift
from jaxact._limits import at_most, finite, is_possible
from jaxact._options import Adjustment
from jaxact._row_sums import Total, undominated, written_sum


class LabelSums(NamedTuple):
    """What a row's logits z come to, seen from its label y; arrays of the row's shape with one class."""

    shift: Array  # c, finite, such that e^{zⱼ − c} is in range
    at_label: Array  # e^{z_y − c}
    others: Array  # Σ e^{zⱼ − c} over the classes j ≠ y
    total: Total


def far(dtype: Any) -> float:
    """Above e^{room + 1}; times the number of classes, it does not overflow."""
    return 2.0 ** math.ceil((room(dtype) + 1) / math.log(2))


def but_label(e: Array, y: Array) -> Array:
    """`e` from 0 to `far`, with 0 at the label, by three operations. (By booleans, XLA for CPU does not vectorise.)"""
    return at_most(_distance(e, y), e)


def _distance(z: Array, y: Array) -> Array:
    """0 at the label, `far` or more at every other class."""
    # Behind a barrier the places are an operand: an iota inside of a kernel that sums may, in XLA of JAX 0.12, get
    # values made for another shape.
    places = places_of(z)
    dtype = compute_dtype(z.dtype)
    unit = far(dtype) if jnp.issubdtype(places.dtype, jnp.floating) else 1
    away = jnp.abs(lax.optimization_barrier(unit * places) - unit * y[..., None].astype(places.dtype))
    return away.astype(dtype) * (far(dtype) / unit)


def places_of(z: Array) -> Array:
    """The place of each class, in one row."""
    # Beyond 2²⁴ not every whole number is a float32. One row: JAX moves out of a loop what is the same in every step,
    # and then keeps it.
    count = z.shape[-1]
    exact = isinstance(count, int) and count <= 2**24  # it may be symbolic
    return as_row(jnp.arange(count, dtype=compute_dtype(z.dtype) if exact else jnp.int32), z.ndim)


def label_logit(x: Array, adjust: Adjustment, y: Array, classes: Classes) -> Array:
    """z_y, with the class axis kept; +inf if it is the largest number."""
    if _whole(x, classes):
        row, place = (x, y) if (folds := _folds(x, y, classes)) is None else (folds.own, folds.fold)
        z_y = adjust(jnp.take_along_axis(row, place[..., None], -1, mode="clip"))
    else:
        # Where classes are split, by hand or over the explicit axes of a mesh, the label's is on one of the devices.
        # Between the largest numbers, 0 times anything is 0; a nan makes the row nan, as it should.
        z, here = adjust(x), 1 - jnp.minimum(_distance(x, y), 1)
        z_y = classes.sum(finite(z) * here)
        z_y = jnp.where(classes.sum(is_possible(z) * here) == 0, -jnp.inf, z_y)
    return jnp.where(z_y >= float(jnp.finfo(z_y.dtype).max), jnp.inf, z_y)


def _whole(x: Array, classes: Classes) -> bool:
    """Whether the classes are split neither by hand nor over the explicit axes of a mesh."""
    return classes.axis_name is None and not jax.typeof(x).sharding.spec[-1]


class Folds(NamedTuple):
    """Rows, folded, and where the label is there."""

    row: Array  # (..., folds, places)
    place: Array
    fold: Array
    own: Array  # (..., folds): what is at the label's place in each fold


def _folds(x: Array, y: Array, classes: Classes) -> Folds | None:
    """Long rows, folded at least four times. (Who asks again is given the same: XLA finds what is in it once.)

    On CPU to leave out the label adds half to the time of a sum, and multiplies it in rows of more than 2¹⁵. The sum
    across the folds need not leave it out, but only what comes of it, and the label's place in each.
    Logits of 16 bits only in such rows: XLA of JAX 0.10 takes twice as long to sum them across folds.
    """
    count = x.shape[-1]
    least = 2**13 if x.dtype == compute_dtype(x.dtype) else 2**15 + 1
    if not (isinstance(count, int) and count >= least and _whole(x, classes)):  # it may be symbolic
        return None
    if (folds := next((n for n in range(4, count // 256 + 1) if count % n == 0), None)) is None:
        return None
    row = x.reshape(*x.shape[:-1], folds, count // folds)
    place, fold = y % row.shape[-1], y // row.shape[-1]
    return Folds(row, place, fold, jnp.take_along_axis(row, place[..., None, None], -1, mode="clip")[..., 0])


def _others(x: Array, adjust: Adjustment, y: Array, classes: Classes) -> Array:
    """The sum of eᶻ but at the label."""
    folds = _folds(x, y, classes)
    if folds is None:
        return classes.sum(but_label(jnp.exp(adjust(x)), y))
    row, place, fold, own = folds
    across = jnp.sum(jnp.exp(adjust(row)), -2)
    at_place = jnp.sum(but_label(jnp.exp(adjust(own)), fold), -1, keepdims=True)
    return jnp.sum(but_label(across, place), -1, keepdims=True) + at_place


def others_exponentials(z: Array, peak: Array, y: Array) -> tuple[Array, Array]:
    """`scaled_exponentials`, and 0 at the label: to write it takes less time than three operations for every class."""
    e, at_peak = scaled_exponentials(z, peak[..., 0], (z.ndim - 1,))
    return at_labels(lax.scatter, e, y, jnp.zeros_like(peak)), at_peak[..., None]


def at_labels(scatter: Callable[..., Array], z: Array, y: Array, updates: Array) -> Array:
    """`scatter` at each label, for which there is one update."""
    last, batch = (z.ndim - 1,), tuple(range(z.ndim - 1))
    numbers = lax.ScatterDimensionNumbers((), last, last, batch, batch)
    places, updates = y[..., None], updates[..., 0]
    return scatter(z, places, updates, numbers, indices_are_sorted=True, unique_indices=True, mode="clip")


def label_sums(
    x: Array, adjust: Adjustment, y: Array, live: Array | None, classes: Classes, shared: bool
) -> tuple[Array, LabelSums]:
    """z_y, as it was rounded for the sums, and these. Rows that are not `live` do not matter and may hold anything.

    What a gather or a branch is given is written to memory: logits as they are, which may have 16 bits. `shared`:
    whether a derivative follows that shares the exponentials.
    """
    z_y = label_logit(x, adjust, y, classes)

    def about_label(x: Array, y: Array, z_y: Array, others: Array, about_z_y: Array) -> tuple[Array, LabelSums]:
        c = finite(z_y)
        shift = whole_shift(c, room(c.dtype), 0)
        total = Total(shift, others * jnp.exp(-shift) + jnp.exp(c - shift))
        return z_y, LabelSums(c, jnp.ones_like(z_y), about_z_y, total)

    def about_maximum(x: Array, y: Array, z_y: Array, *_: Array) -> tuple[Array, LabelSums]:
        z = adjust(x)
        peak = finite(classes.max(z))
        whole = whole_shift(peak, room(peak.dtype), jnp.minimum(peak, 0))
        at_peak = jnp.exp(peak - whole)
        if shared:
            e, e_at_peak = others_exponentials(z, peak, y)
            others = written_sum(e, (e.ndim - 1,))[..., None] / e_at_peak
        else:
            # The minimum changes +inf alone.
            others = classes.sum(but_label(jnp.exp(at_most(peak, z) - whole), y)) / at_peak
        # Where no other class attains the maximum, the label's logit is that. A cap may have been rounded otherwise
        # alone than in a row: XLA for CPU has more than one tanh.
        z_y = jnp.where(jnp.isfinite(z_y) & ~undominated(others), peak, z_y)
        at_label = jnp.exp(at_most(peak, z_y) - peak)
        both = jnp.maximum(at_label + others, 1)
        # About the maximum are what is shared, and what the entropy needs, which is asked for where memory counts.
        total = Total(peak, both) if classes.lean or shared else Total(whole, both * at_peak)
        return z_y, LabelSums(peak, at_label, others, total)

    if classes.lean or shared:
        return about_maximum(x, y, z_y)
    # To sum the exponentials as they are takes no maximum and rounds no logit. Divided by the label's they are what is
    # wanted, unless they overflow, or so little is left that what was flushed counts.
    others = _others(x, adjust, y, classes)
    largest = float(jnp.finfo(others.dtype).max)
    root = exp(jnp.minimum(-z_y / 2, math.floor(math.log(largest) - 0.5)))
    about_z_y = (others * root) * root
    in_range = (others > 2.0**-80) & (others < far(others.dtype)) & (about_z_y < largest / 4) & (z_y > -jnp.inf)
    if live is not None:
        in_range |= ~live[..., None]
    return unless_all(in_range, about_maximum, about_label, x, y, z_y, others, about_z_y)
