"""The cross-entropy of integer labels, row by row: what the losses and the fused head rest on.

Rows have their classes on the last axis. A label is a single place, so the sum over all the other classes is known by
itself, and with it everything that would cancel: the loss is log1p of it, and 1 − p at the label is its share.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._canonical import as_float, canonical_scalar, canonical_temperature, compute_dtype
from jaxact._exponentials import certain, divisor, finite, maximum, times_jacobian, unless_all, widen
from jaxact._forward_mode import forward_mode

AxisName = Any  # of a mesh axis, or several
BLOCK = 128  # classes that are summed together in a long row


class Classes(NamedTuple):
    """Where the class axis lies; hashable."""

    axis_name: AxisName = None  # the mesh axis over which it is split by hand
    branch: bool = True  # whether to look for the maximum only where it is needed

    def sum(self, a: Array) -> Array:
        here = jnp.sum(a, -1, keepdims=True)
        return here if self.axis_name is None else lax.psum(here, self.axis_name)

    def max(self, a: Array) -> Array:
        here = maximum(a, (a.ndim - 1,))
        return here if self.axis_name is None else lax.pmax(here, self.axis_name)


class LabelSums(NamedTuple):
    """What a row's logits z come to, seen from its label y; arrays of the row's shape with one class."""

    shift: Array  # c, finite, such that e^{zⱼ − c} is in range
    at_label: Array  # e^{z_y − c}
    others: Array  # Σ e^{zⱼ − c} over the classes j ≠ y

    @property
    def total(self) -> Array:
        """At least 1, but for a row in which no class is left: there it would be 0."""
        return jnp.maximum(self.at_label + self.others, 1)


class Losses(NamedTuple):
    """Per row, without the axis of classes."""

    nll: Array  # −log p_y
    lse: Array  # log Σ e^z
    uniform: Array  # the mean over the classes c of −w_c log p_c; 0 where no weights w are given


class Adjustment(NamedTuple):
    """What is done to logits first: cap·tanh(x/cap), then division by the temperature. None leaves a step out."""

    cap: Array | None
    temperature: Array | None

    def __call__(self, x: Array) -> Array:
        z = widen(x)
        if self.cap is None and self.temperature is None:
            return z
        # A class that does not exist is neither capped nor scaled; not even 0 times its logit reaches a derivative.
        exists = z != -jnp.inf
        z = jnp.where(exists, z, 0)
        if self.cap is not None:
            z = self.cap * jnp.tanh(z / self.cap)
        if self.temperature is not None:
            z = z / self.temperature
        return jnp.where(exists, z, -jnp.inf)


class Options(NamedTuple):
    """What makes a loss of log-probabilities, by the names of the public arguments. None leaves an option out."""

    temperature: Any
    label_smoothing: Any
    z_loss: Any
    logit_softcap: Any
    class_weight: Any

    @classmethod
    def checked(cls, **given: Any) -> "Options":
        """What is out of range raises where its value is known."""
        check, cap = canonical_scalar, given["logit_softcap"]
        fraction = (lambda e: 0 <= e <= 1, "in [0, 1]")
        coefficient = (lambda z: 0 <= z < math.inf, "finite and not negative")
        positive = (lambda c: 0 < c < math.inf, "positive and finite")
        return cls(
            canonical_temperature(given["temperature"]),
            check("label_smoothing", given["label_smoothing"], *fraction, nothing=0),
            check("z_loss", given["z_loss"], *coefficient, nothing=0),
            None if cap is None else check("logit_softcap", cap, *positive),
            given["class_weight"],
        )

    def adjustment(self, x: Array) -> Adjustment:
        cap = self.logit_softcap
        dtype = compute_dtype(x.dtype)
        return Adjustment(None if cap is None else jnp.asarray(cap, dtype), divisor(self.temperature, x))

    def weights(self, classes: int, dtype: Any) -> Array | None:
        """A factor for each class."""
        if self.class_weight is None:
            return None
        weights = as_float("class_weight", self.class_weight)
        if weights.shape != (classes,):
            raise ValueError(f"class_weight must have shape ({classes},), got {weights.shape}.")
        return weights.astype(dtype)

    def spread(self, weights: Array | None, dtype: Any) -> Array | None:
        """The weights by which smoothing spreads a label, where it does."""
        if self.label_smoothing is None:
            return None
        return jnp.ones((), dtype) if weights is None else weights

    def combine(self, losses: "Losses", label_weight: Array | None) -> Array:
        """The loss of each row."""
        nll, _, uniform = losses
        factor = None if self.label_smoothing is None else 1 - jnp.asarray(self.label_smoothing, nll.dtype)
        if label_weight is not None:
            factor = label_weight if factor is None else factor * label_weight
        # A factor of 0 leaves out even an infinite loss.
        loss = nll if factor is None else factor * jnp.where((factor == 0) & jnp.isinf(nll), 0, nll)
        if self.label_smoothing is not None:
            loss = loss + self.label_smoothing * uniform
        return loss if self.z_loss is None else loss + self.z_loss * square_of(losses.lse)


def square_of(lse: Array) -> Array:
    """lse², 0 where no class is left; an infinite one is a constant."""
    finite = jnp.isfinite(lse) | jnp.isnan(lse)
    return jnp.square(jnp.where(finite, lse, 0)) + jnp.where(lse == jnp.inf, jnp.inf, 0)


def at_index(weights: Array | None, y: Array, axis_name: AxisName) -> Array | None:
    """The weight of each label."""
    if weights is None:
        return None
    if axis_name is None:
        return jnp.take(weights, y, mode="clip")
    here = (y >= 0) & (y < weights.shape[0])
    local = jnp.where(here, jnp.take(weights, y, mode="clip"), 0)
    total = lax.psum(local, axis_name)
    # With check_vma=False the cotangent, the same on all devices, would be summed over them.
    return total if varying(local) else local + lax.stop_gradient(total - local)


def varying(a: Any) -> frozenset[Any]:
    """The mesh axes along which devices hold different values, inside `shard_map`; none with check_vma=False."""
    return jax.typeof(a).mat.varying


def vary(a: Array, axes: frozenset[Any]) -> Array:
    missing = tuple(axes - varying(a))
    return lax.pcast(a, missing, to="varying") if missing else a


def alike(a: Array, b: Array) -> tuple[Array, Array]:
    """Both divided over the same axes of a mesh, since a rule returns cotangents that are divided as its arguments."""
    axes = varying(a) | varying(b)
    a, b = vary(a, axes), vary(b, axes)
    if jax.typeof(a).sharding == jax.typeof(b).sharding:
        return a, b
    both = jax.typeof(jnp.logical_and(a, b)).sharding
    return jax.sharding.reshard(a, both), jax.sharding.reshard(b, both)


def label_index(labels: Array, classes: int, axis_name: AxisName) -> tuple[Array, Array]:
    """The place of each label among this shard's classes, outside of them if on another; and which labels exist."""
    first: Any = 0 if axis_name is None else lax.axis_index(axis_name) * classes
    count = classes if axis_name is None else classes * lax.axis_size(axis_name)
    # A narrow or unsigned dtype holds neither the count nor a difference.
    wide = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    exists = (wide >= 0) & (wide < count)
    return jnp.where(exists, wide, 0).astype(jnp.int32) - first, exists


def counts(labels: Array, ignore_index: int) -> Array:
    """Where a label is not the one to ignore, which may not even exist in its dtype."""
    info = jnp.iinfo(labels.dtype)
    known = info.min <= ignore_index <= info.max
    return labels != ignore_index if known else jnp.ones_like(labels, bool)


def elsewhere(z: Array, y: Array) -> Array:
    """0 at the label, 1 at every other class. In floating point: on CPU booleans in a sum keep XLA from vectorising."""
    return jnp.minimum(jnp.abs(_distance(z, y)), 1).astype(compute_dtype(z.dtype))


def _distance(z: Array, y: Array) -> Array:
    """From the label, in places."""
    # Beyond 2²⁴ not every whole number is a float32.
    dtype = compute_dtype(z.dtype) if z.shape[-1] <= 2**24 else jnp.int32
    # One row of places: JAX moves out of a loop what is the same in every step, and then keeps it.
    return jnp.arange(z.shape[-1], dtype=dtype) - y[..., None].astype(dtype)


def at_label(x: Array, adjust: Adjustment, y: Array, classes: Classes) -> Array:
    """z_y, with the class axis kept; infinite if it is the largest number."""
    if _whole(x, classes):
        z_y = finite(adjust(jnp.take_along_axis(x, y[..., None], -1, mode="clip")))
    else:
        # Where classes are split, by hand or over the explicit axes of a mesh, the label's is on one of the devices.
        # Between the largest numbers, 0 times anything is 0; a nan makes the row nan, as it should.
        z_y = classes.sum(finite(adjust(x)) * (1 - elsewhere(x, y)))
    largest = float(jnp.finfo(z_y.dtype).max)
    return jnp.where(z_y >= largest, jnp.inf, jnp.where(z_y <= -largest, -jnp.inf, z_y))


def _whole(x: Array, classes: Classes) -> bool:
    """Whether the classes are split neither by hand nor over the explicit axes of a mesh."""
    return classes.axis_name is None and not any(jax.typeof(x).sharding.spec)


def _in_blocks(x: Array, adjust: Adjustment, y: Array, shift: Array) -> Array:
    """The sum of e^{z − shift} but at the label: of long rows on CPU in two thirds of the time of a sum with a mask.

    Only the label's block needs one.
    """
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    own = jnp.take_along_axis(blocks, (y // BLOCK)[..., None, None], -2, mode="clip")[..., 0, :]
    sums = jnp.sum(jnp.exp(adjust(blocks) - shift[..., None]), -1) * elsewhere(blocks[..., 0], y // BLOCK)
    at_own = jnp.exp(adjust(own) - shift) * elsewhere(own, y % BLOCK)
    return jnp.sum(sums, -1, keepdims=True) + jnp.sum(at_own, -1, keepdims=True)


def label_sums(x: Array, adjust: Adjustment, y: Array, live: Array | None, classes: Classes) -> tuple[Array, LabelSums]:
    """z_y and the sums. Rows that are not `live` do not matter and may hold anything.

    What a gather or a branch is given is written to memory: logits as they are, which may have 16 bits.
    """
    z_y = at_label(x, adjust, y, classes)

    def about_label(x: Array, y: Array, z_y: Array, others: Array) -> LabelSums:
        return LabelSums(finite(z_y), jnp.ones_like(z_y), others)

    def about_maximum(x: Array, y: Array, z_y: Array, others: Array) -> LabelSums:
        z = adjust(x)
        peak = finite(classes.max(z))
        # The minimum changes +inf alone.
        others = classes.sum(jnp.exp(jnp.minimum(z, peak) - peak) * elsewhere(z, y))
        return LabelSums(peak, jnp.exp(jnp.minimum(z_y, peak) - peak), others)

    if not classes.branch:
        return z_y, about_maximum(x, y, z_y, z_y)
    # About the label, no maximum need be found first, as long as nothing overflows: until the loss is 87.
    shift = finite(z_y)
    if _whole(x, classes) and x.shape[-1] % BLOCK == 0 and x.shape[-1] >= 16 * BLOCK:
        others = _in_blocks(x, adjust, y, shift)
    else:
        others = classes.sum(jnp.exp(adjust(x) - shift) * elsewhere(x, y))
    in_range = (others < float(jnp.finfo(others.dtype).max) / 4) & (z_y > -jnp.inf)
    if live is not None:
        in_range |= ~live[..., None]
    return z_y, unless_all(in_range, about_maximum, about_label, x, y, z_y, others)


def losses_of(z: Array, z_y: Array, sums: LabelSums, weights: Array | None, classes: Classes) -> Losses:
    shift, at_label, others = sums
    # Of −log p_y = (c − z_y) + log(Σ e^{z − c}) both terms are positive or 0. Where c = z_y, 1 drops out of the sum.
    log_total = jnp.log1p(others + (at_label - 1))
    nll = jnp.where(z_y >= shift, 0, shift - z_y) + log_total
    # The shift is the largest finite number where a logit is infinite, which takes all.
    infinite = shift >= float(jnp.finfo(z.dtype).max)
    nll = jnp.where(infinite & (z_y < jnp.inf), jnp.inf, nll)
    empty = at_label + others == 0
    nll, lse = jnp.where(empty, 0, nll), jnp.where(empty, -jnp.inf, jnp.where(infinite, jnp.inf, shift + log_total))
    if weights is None:
        uniform = jnp.zeros_like(nll)
    else:
        at_each, heavy, count = _spread(z, weights, classes)
        # Beside an infinite logit every other class is infinitely unlikely.
        distance = jnp.where(infinite & (z < jnp.inf), jnp.inf, shift - finite(z))
        distance = classes.sum(jnp.where(at_each == 0, 0, at_each * distance))
        uniform = (heavy * log_total + distance) / count
    return Losses(*(a[..., 0] for a in (nll, lse, uniform)))


def _spread(z: Array, weights: Array, classes: Classes) -> tuple[Array, Array, Array]:
    """The weights of the classes that exist, their sum, and the number of those classes, at least 1."""
    exist = z != -jnp.inf
    at_each = jnp.where(exist, weights.astype(z.dtype), 0)
    return at_each, classes.sum(at_each), jnp.maximum(classes.sum(exist.astype(z.dtype)), 1)


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def label_losses(
    classes: Classes, x: Array, y: Array, live: Array | None, weights: Array | None, adjust: Adjustment
) -> tuple[Losses, LabelSums]:
    """The losses of logits `x` after adjustment, 0 where not live; and the sums they are made of, as constants."""
    z_y, sums = label_sums(x, adjust, y, live, classes)
    losses = losses_of(adjust(x), z_y, sums, weights, classes)
    return losses if live is None else Losses(*(jnp.where(live, a, 0) for a in losses)), sums


def _label_losses_fwd(
    classes: Classes, x: Array, y: Array, live: Array | None, weights: Array | None, adjust: Adjustment
) -> Any:
    losses, sums = label_losses(classes, x, y, live, weights, adjust)
    return (losses, sums), (x, y, live, weights, adjust, losses.nll, sums)


def _label_losses_bwd(classes: Classes, residuals: Any, cotangents: Any) -> Any:
    x, y, live, weights, adjust, nll, sums = residuals
    # Behind a barrier, XLA widens the logits again and does not keep them wide from where they were summed.
    x = lax.optimization_barrier(x)
    if live is not None and adjust != Adjustment(None, None):
        x = jnp.where(live[..., None], x, 0)  # 0 times nan, otherwise, in the derivatives of the adjustment
    z, pull = jax.vjp(lambda x, adjust: adjust(x), x, adjust)
    z_bar, weights_bar = logit_cotangent(z, y, live, weights, nll, sums, cotangents[0], classes)
    if weights is not None and varying(weights_bar) != varying(weights):
        weights_bar = lax.psum(weights_bar, tuple(varying(weights_bar) - varying(weights)))
    x_bar, adjust_bar = pull(z_bar)
    if classes.axis_name is not None and not varying(x):
        adjust_bar = jax.tree.map(lambda a: lax.psum(a, classes.axis_name), adjust_bar)  # check_vma=False
    return x_bar, None, None, weights_bar, adjust_bar


label_losses.defvjp(_label_losses_fwd, _label_losses_bwd)


def logit_cotangent(
    z: Array,
    y: Array,
    live: Array | None,
    weights: Array | None,
    nll: Array,
    sums: LabelSums,
    g: Losses,
    classes: Classes,
) -> tuple[Array, Array | None]:
    """The cotangents of the logits and of the weights."""
    # ∂nll/∂z = p − 1[y], ∂lse/∂z = p and ∂uniform/∂z = (p Σw − w)/count.
    nll, g_nll, g_lse, g_uniform = (a[..., None] for a in (nll, *g))
    if weights is not None:
        at_each, heavy, count = _spread(z, weights, classes)
        g_each = g_uniform / count
        g_lse = g_lse + g_each * heavy
    p = _probabilities(classes, z, sums)
    # Nor is it to keep the distances.
    here = _distance(z, lax.optimization_barrier(y)) == 0
    z_bar = jnp.where(here, g_lse * jnp.exp(-nll) - g_nll * _complement(nll), (g_nll + g_lse) * p)
    weights_bar = None
    if weights is not None:
        z_bar = z_bar - g_each * at_each
        weights_bar = jnp.where(z != -jnp.inf, -g_each * _log_probabilities(classes, z, sums), 0)
        if live is not None:
            weights_bar = jnp.where(live[..., None], weights_bar, 0)
        extra = tuple(range(z.ndim - weights.ndim))
        weights_bar = jnp.sum(weights_bar, extra).astype(weights.dtype)
    # What does not exist has no derivative, whatever its row's loss is.
    exists = z != -jnp.inf
    z_bar = jnp.where(exists if live is None else exists & live[..., None], z_bar, 0)
    return z_bar, weights_bar


@jax.custom_jvp
def _complement(nll: Array) -> Array:
    """1 − p of the label, as accurate as its loss −log p."""
    return -jnp.expm1(-nll)


# Written down because JAX 0.10 has 1 + expm1 for it, where all digits of a small p are lost.
_complement.defjvps(lambda nll_dot, _, nll: nll_dot * jnp.exp(-nll))


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probabilities(classes: Classes, z: Array, sums: LabelSums) -> Array:
    # The minimum changes +inf alone, from which no shift can be taken. Behind the barrier XLA computes the exponentials
    # again instead of keeping them from where they were summed.
    shift, total = lax.optimization_barrier((sums.shift, sums.total))
    return jnp.exp(jnp.minimum(z, float(jnp.finfo(z.dtype).max)) - shift) / total


def _probabilities_fwd(classes: Classes, z: Array, sums: LabelSums) -> tuple[Array, Array]:
    p = _probabilities(classes, z, sums)
    return p, p


def _probabilities_bwd(classes: Classes, p: Array, g: Array) -> tuple[Array, None]:
    return times_jacobian(certain(p), g, classes.sum), None


_probabilities.defvjp(_probabilities_fwd, _probabilities_bwd)


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probabilities(classes: Classes, z: Array, sums: LabelSums) -> Array:
    return (jnp.minimum(z, float(jnp.finfo(z.dtype).max)) - sums.shift) - jnp.log(sums.total)


def _log_probabilities_fwd(classes: Classes, z: Array, sums: LabelSums) -> Any:
    return _log_probabilities(classes, z, sums), (z, sums)


def _log_probabilities_bwd(classes: Classes, residuals: Any, g: Array) -> Any:
    z, sums = residuals
    return g - _probabilities(classes, z, sums) * classes.sum(g), None


_log_probabilities.defvjp(_log_probabilities_fwd, _log_probabilities_bwd)


def entropy(z: Array, sums: LabelSums, classes: Classes) -> tuple[Array, Any]:
    """H = −Σ p log p of each row, in nats, and the cotangent of the logits as a function of its cotangent."""
    p = _probabilities(classes, z, sums)
    terms = jnp.where(p > 0, _log_probabilities(classes, z, sums), 0)
    h = -classes.sum(p * terms)
    return h[..., 0], lambda g: -g[..., None] * p * (terms + h)


def predicted(z: Array, classes: Classes) -> Array:
    """The first class with the largest logit."""
    place = jnp.argmax(z, -1)
    if classes.axis_name is None:
        return place
    # The first of the devices that have it.
    here, top = jnp.max(z, -1), classes.max(z)[..., 0]
    place = place + lax.axis_index(classes.axis_name) * z.shape[-1]
    return lax.pmin(jnp.where(here == top, place, jnp.iinfo(place.dtype).max), classes.axis_name)
