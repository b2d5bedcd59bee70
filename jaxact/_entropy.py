"""The entropy of each row, and its derivative."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._class_probabilities import probabilities
from jaxact._classes import Classes
from jaxact._forward_mode import forward_mode
from jaxact._jacobian import certain, times_jacobian
from jaxact._limits import below_infinity
from jaxact._row_sums import Total, below, undominated

FAR_BELOW = 1000.0  # of a class so far below the maximum nothing is left in a sum


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def entropy(classes: Classes, z: Array, total: Total) -> Array:
    """H = −Σ p log p of each row, in nats, with the class axis kept. The `total` is about the maximum."""
    # Of H = log S + Σ e^{−d} d / S, with d = m − z the distances from the maximum and S = Σ e^{−d}, all terms are
    # positive or 0. But where one class has most of S = 1 + o, log S has lost the digits of o. There
    # H = (log S − (S − 1)/S) + (o + Σ e^{−d} d)/S, of which the first is about o²/2: for that what is left is enough.
    # And o is summed along with the rest, in one pass: 1 is added to d wherever it is not 0.
    dominated = jnp.where(undominated(total.sum - 1), 0.0, 1.0)
    top = lax.optimization_barrier(total.shift)  # or XLA keeps e^{−d} from where it was summed before
    d = -jnp.maximum(below(top, z, ()), -FAR_BELOW)
    mean = classes.sum(jnp.exp(-d) * (d + jnp.minimum(d / float(jnp.finfo(d.dtype).tiny), dominated))) / total.sum
    return (jnp.log(total.sum) - dominated * (total.sum - 1) / total.sum) + mean


def _entropy_fwd(classes: Classes, z: Array, total: Total) -> Any:
    return entropy(classes, z, total), (z, total)


def _entropy_bwd(classes: Classes, residuals: Any, g: Array) -> Any:
    z, total = residuals
    return entropy_cotangent(classes, z, total, g), None


entropy.defvjp(_entropy_fwd, _entropy_bwd)


def entropy_cotangent(classes: Classes, z: Array, total: Total, g: Array) -> Array:
    # ∂H/∂z = −p (log p + H) = p (d − ⟨p, d⟩): the logarithms cancel, and with them all that could be lost in them. That
    # is the Jacobian of softmax times d.
    # (Not `below`, which at the maximum itself has half its slope.)
    d = jnp.minimum(total.shift - below_infinity(z), FAR_BELOW)
    p = probabilities(classes, z, total)
    # Where p is 0, a product with `FAR_BELOW` may have overflowed when this is transposed.
    return jnp.where(p == 0, 0, g * times_jacobian(certain(p), d, (z.ndim - 1,), classes.sum))
