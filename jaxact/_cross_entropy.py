"""The cross-entropy of integer labels, row by row: what the losses and the fused head rest on.

Rows have their classes on the last axis. A label is a single place, so the sum over all the other classes is known by
itself, and with it everything that would cancel: the loss is log1p of it, and 1 − p at the label is its share.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._class_probabilities import log_probabilities, others_probabilities, probabilities, without_mean
from jaxact._classes import Classes, as_divided, varying
from jaxact._forward_mode import forward_mode
from jaxact._label_sums import LabelSums, at_labels, label_logit, label_sums, places_of
from jaxact._limits import finite
from jaxact._options import Adjustment, Losses
from jaxact._reductions import class_count
from jaxact._row_sums import Total, below
from jaxact._shared_exponentials import shares


def losses_of(z: Array, z_y: Array, sums: LabelSums, weights: Array | None, classes: Classes) -> Losses:
    shift, at_label, others, _ = sums
    # Of −log p_y = (c − z_y) + log(Σ e^{z − c}) both terms are positive or 0. Where c = z_y, 1 drops out of the sum.
    empty = at_label + others == 0
    log_total = jnp.where(empty, 0, jnp.log1p(others + (at_label - 1)))
    nll = jnp.where(z_y >= shift, 0, shift - z_y) + log_total
    # The shift is the largest finite number where a logit is infinite, which takes all, unless there is a nan.
    infinite = (shift >= float(jnp.finfo(z.dtype).max)) & ~jnp.isnan(others)
    nll = jnp.where(infinite & (z_y < jnp.inf), jnp.inf, nll)
    nll, lse = jnp.where(empty, 0, nll), jnp.where(empty, -jnp.inf, jnp.where(infinite, jnp.inf, shift + log_total))
    if weights is None:
        uniform = jnp.zeros_like(nll)
    elif _is_even(weights):
        uniform = _mean_information(classes, z, sums.total)
    else:
        at_each, count = _existing_weights(z, weights, classes)
        log_p = log_probabilities(classes, z, sums.total)
        uniform = -classes.sum(jnp.where(at_each == 0, 0, at_each * log_p)) / count
    return Losses(*(a[..., 0] for a in (nll, lse, uniform)))


def _is_even(weights: Array) -> bool:
    """Whether they are the constant 1, for all classes."""
    return weights.ndim == 0


def _mean_information(classes: Classes, z: Array, total: Total) -> Array:
    """The mean of −log p over the classes that exist; 0 where none does."""
    # About the maximum m, −log p = (m − z) + log Σ e^{z − m}, of two terms that are positive or 0. Where the second is
    # so small that 1 in the sum costs its digits, the first is large for all classes but one.
    top = classes.max(z)
    peak = finite(top)
    exists = z != -jnp.inf
    count = _count(exists, z.dtype, classes)
    distance = classes.sum(jnp.where(exists, -below(peak, z, ()), 0)) / count
    # Of one class both terms are 0, but for the rounding of its exponentials.
    log_total = jnp.where(count == 1, 0, jnp.log(total.sum * jnp.exp(total.shift - peak)))
    # Beside an infinite logit every other class is infinitely unlikely.
    distance = jnp.where((top == jnp.inf) & (distance > 0), jnp.inf, distance)
    return jnp.where(top == -jnp.inf, 0, distance + log_total)


def _count(exists: Array, dtype: Any, classes: Classes) -> Array:
    """The number of classes that exist, at least 1."""
    return jnp.maximum(classes.sum(exists.astype(dtype)), 1)


def _existing_weights(z: Array, weights: Array, classes: Classes) -> tuple[Array, Array]:
    """The weights of the classes that exist, and the number of those classes, at least 1."""
    exist = z != -jnp.inf
    at_each = jnp.where(exist, weights.astype(z.dtype), 0)
    return at_each, _count(exist, z.dtype, classes)


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def label_losses(
    classes: Classes,
    x: Array,
    y: Array,
    live: Array | None,
    weights: Array | None,
    adjust: Adjustment,
    differentiated: bool,
) -> tuple[Losses, Total]:
    """The losses of logits `x` after adjustment, 0 where not live; and the sum they are made of, as a constant."""
    shared = differentiated and _shares(x, weights, classes)
    if shared:
        x = _only_live(x, live)
    z_y, sums = label_sums(x, adjust, y, live, classes, shared)
    losses = losses_of(adjust(x), z_y, sums, weights, classes)
    return losses if live is None else Losses(*(jnp.where(live, a, 0) for a in losses)), sums.total


def _shares(x: Array, weights: Array | None, classes: Classes) -> bool:
    """Whether a derivative shares the exponentials of the loss: each row on one device, and no weights of classes."""
    even = (weights is None or _is_even(weights)) and not classes.lean
    local = classes.axis_name is None and not any(jax.typeof(x).sharding.spec)
    axis = (x.ndim - 1,)
    # Of fewer classes a row's own numbers, of which there are more, take what this saves.
    return even and local and class_count(x, axis) >= 2**5 and shares(x, axis)


def _only_live(x: Array, live: Array | None) -> Array:
    """The logits, 0 in rows that do not count. These may hold anything, and 0 times it would reach derivatives."""
    return x if live is None else jnp.where(live[..., None], x, 0)


def _label_losses_fwd(classes: Classes, *arguments: Any) -> Any:
    *given, _ = arguments
    losses, total = label_losses(classes, *given, True)
    return (losses, total), (*given, losses.nll, total)


def _label_losses_bwd(classes: Classes, differentiated: bool, residuals: Any, cotangents: Any) -> Any:
    x, y, live, weights, adjust, nll, total = residuals
    shared = _shares(x, weights, classes)
    if not (classes.lean or shared):
        # Behind a barrier, XLA widens the logits again and does not keep them wide from where they were summed. But in
        # second derivatives it then also keeps probabilities twice.
        x = lax.optimization_barrier(x)
    if not classes.lean:  # the head has left it out before
        x = _only_live(x, live)
        if live is not None and not shared:
            total = Total(*(jnp.where(live[..., None], a, 1) for a in total))
    z, pull = jax.vjp(lambda x, adjust: adjust(x), x, adjust)
    z_bar, weights_bar = logit_cotangent(z, y, live, weights, nll, total, cotangents[0], classes, shared)
    if weights_bar is not None:
        if varying(weights_bar) != varying(weights):
            weights_bar = lax.psum(weights_bar, tuple(varying(weights_bar) - varying(weights)))
        weights_bar = as_divided(weights_bar, weights)
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
    total: Total,
    g: Losses,
    classes: Classes,
    shared: bool = False,
) -> tuple[Array, Array | None]:
    """The cotangents of the logits and of the weights; of the exponentials of the sum, where these are `shared`."""
    # ∂nll/∂z = p − 1[y], ∂lse/∂z = p and ∂uniform/∂z = (p Σw − w)/count.
    if live is not None:
        g = Losses(*(jnp.where(live, a, 0) for a in g))
    nll, g_nll, g_lse, g_uniform = (a[..., None] for a in (nll, *g))
    exists, weights_bar = z != -jnp.inf, None
    if weights is not None:
        if _is_even(weights):
            of_each = g_uniform / _count(exists, z.dtype, classes)
            g_lse, weights_bar = g_lse + g_uniform, jnp.zeros_like(weights)
        else:
            at_each, count = _existing_weights(z, weights, classes)
            g_each = g_uniform / count
    at_label = g_lse * jnp.exp(-nll) - g_nll * _complement(nll)
    if shared:
        p = others_probabilities(classes, z, y, total)
        impossible = label_logit(z, Adjustment(), y, classes) == -jnp.inf  # the gather is that of the loss
        z_bar = jnp.where(exists & (p != 0), (g_nll + g_lse) * p, 0)  # the cotangent may be infinite
        if weights is not None:
            z_bar = jnp.where(exists, z_bar - of_each, 0)
        return at_labels(lax.scatter_add, z_bar, y, jnp.where(impossible, 0, at_label)), weights_bar
    p = probabilities(classes, z, total)
    z_bar = (g_nll + g_lse) * p
    # Behind a barrier, or XLA would keep the distances of the sum.
    places = places_of(z)
    here = places == lax.optimization_barrier(y)[..., None].astype(places.dtype)
    z_bar = jnp.where(here, at_label, z_bar)
    if weights is not None and _is_even(weights):
        z_bar = z_bar - of_each
    elif weights is not None:
        z_bar = z_bar + without_mean(classes, p, -g_each * at_each)
        log_p = log_probabilities(classes, z, total)
        log_p = jnp.where(log_p == -jnp.inf, 0, log_p)  # constant
        extra = tuple(range(z.ndim - weights.ndim))
        weights_bar = jnp.sum(-g_each * log_p, extra).astype(weights.dtype)
    # What does not exist has no derivative, whatever its row's loss is.
    return jnp.where(exists, z_bar, 0), weights_bar


@jax.custom_jvp
def _complement(nll: Array) -> Array:
    """1 − p of the label, as accurate as its loss −log p."""
    return -jnp.expm1(-nll)


# Written down because JAX 0.10 has 1 + expm1 for it, where all digits of a small p are lost.
_complement.defjvps(lambda nll_dot, _, nll: nll_dot * jnp.exp(-nll))
