"""The cross-entropy of labels that are probabilities, row by row: the rule of `losses.softmax_cross_entropy`.

Rows have their classes on the last axis. Where a class is impossible, its −log p is infinite, and in −Σ q log p a label
of 0 must leave it out. So there are two ways to sum: the one that copes with infinity is taken where a loss needs it,
and, since a selection costs nothing there, of shared exponentials.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._branches import unless_all
from jaxact._canonical import widen
from jaxact._forward_mode import forward_mode
from jaxact._limits import between, is_largest
from jaxact._log_softmax import _log_softmax, kept_sums, without_mean
from jaxact._reductions import at_once, class_by_class, maximum, sum_over
from jaxact._row_sums import RowSums, below, row_sums, sums_at_once
from jaxact._shared_exponentials import shared_row_sums, shares_sums


@forward_mode
@jax.custom_vjp
def soft_losses(x: Array, q: Array) -> tuple[Array, RowSums]:
    """−Σ q log p of each row, and the sums it is made of, as constants."""
    axis = (x.ndim - 1,)
    if shares_sums(x, None, axis):
        sums = shared_row_sums(x, axis)
        log_p = _below_or_impossible(x, sums.peak) - jnp.log1p(sums.others)[..., None]
        # A selection copes with infinity in one way; XLA's library does not take it in.
        counts = (q != 0) & (sums.total != 0)[..., None]
        return -sum_over(jnp.where(counts, q.astype(log_p.dtype) * log_p, 0), axis), sums
    sums = row_sums(x, None, axis)
    largest, tiny = (float(a) for a in (jnp.finfo(sums.peak.dtype).max, jnp.finfo(sums.peak.dtype).tiny))

    # With m the maximum, log p = (x − m) − log(1 + others), of two terms that are negative or 0.
    def quick(x: Array, q: Array, sums: RowSums) -> Array:
        log_p = below(sums.peak, widen(x), axis) - jnp.log1p(sums.others)[..., None]
        # Infinite beside +inf and the largest number. (Not a comparison, for one kernel.)
        return -sum_over(log_p * q.astype(log_p.dtype), axis) - jnp.log1p(-is_largest(sums.peak))

    def exact(x: Array, q: Array, sums: RowSums) -> Array:
        # Infinity times a label of 0 must be 0. So it is split in two finite factors, whose product with any other
        # label is infinite. The limit is 0 where no class is left.
        nll = jnp.log1p(sums.others)[..., None] - _below_or_impossible(x, sums.peak)
        limit = largest * jnp.minimum(sums.total, 1)
        factor = between(nll * tiny, 1, limit[..., None])
        loss = sum_over(jnp.minimum(nll, 1 / tiny) * q.astype(nll.dtype) * factor, axis)
        return loss + 0 * sums.total  # the limits may have lost a nan

    if class_by_class(x, axis):
        # Not the total: XLA of JAX 0.10 finds again, for each class, what has two uses.
        left = jnp.where(maximum(x, axis) == -jnp.inf, 0, jnp.ones_like(sums.total))
        return exact(x, q, sums._replace(total=left)), sums
    # Behind a barrier, as in `softmax_of_sums`, for the logits to be widened again and not kept from the sum.
    loss = quick(*((x, q, sums) if at_once(x, axis) else lax.optimization_barrier((x, q, sums))))

    def anew(x: Array, q: Array, loss: Array) -> Array:
        return exact(x, q, sums_at_once(x, None, axis))

    return unless_all(jnp.isfinite(loss), anew, lambda x, q, loss: loss, x, q, loss), sums


def _below_or_impossible(x: Array, peak: Array) -> Array:
    """Of logits, x − m: −inf at −inf, and beside +inf or the largest number."""
    largest = float(jnp.finfo(peak.dtype).max)
    # The difference is 0 or at least an ulp of the largest number, so the product is 0 or infinite.
    return below(peak, widen(x), (x.ndim - 1,)) * jnp.maximum(is_largest(peak) * largest, 1)[..., None]


def _soft_losses_fwd(x: Array, q: Array) -> Any:
    loss, sums = soft_losses(x, q)
    kept = kept_sums(x, sums, (x.ndim - 1,), shares_sums(x, None, (x.ndim - 1,)))
    return (loss, sums), (x, q, loss if kept is None else kept)


def _soft_losses_bwd(residuals: Any, cotangents: Any) -> tuple[Array, Array]:
    x, q, kept = residuals
    g, axis = cotangents[0][..., None], (x.ndim - 1,)
    shared = shares_sums(x, None, axis)

    def of_log_p(g: Array, q: Array) -> Array:
        return -g * q.astype(g.dtype)

    def in_one(all_count: bool) -> Callable[..., Array]:
        def of(x: Array, g: Array, q: Array) -> Array:
            return without_mean(of_log_p, x, None, None, axis, g, q, all_count=all_count)

        return jax.checkpoint(of, prevent_cse=False)

    if class_by_class(x, axis):
        x_bar = in_one(False)(x, g, q)
    elif at_once(x, axis) and not shared:
        # Where all losses are finite, what is impossible has no label.
        finite = jnp.isfinite(lax.stop_gradient(kept))
        x_bar = unless_all(finite, in_one(False), in_one(True), x, g, q)
    else:
        x_bar = without_mean(of_log_p, x, None, kept, axis, g, q, shared=shared)
    log_p = _log_softmax(widen(x), None, axis, False)[0]
    q_bar = -g * jnp.where(log_p == -jnp.inf, 0, log_p)
    return x_bar.astype(x.dtype), q_bar.astype(q.dtype)


soft_losses.defvjp(_soft_losses_fwd, _soft_losses_bwd)
