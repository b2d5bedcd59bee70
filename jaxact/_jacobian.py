"""Probabilities as exponentials over their sum, and the product of the Jacobian of softmax with a vector."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._reductions import Axes, class_by_class, on_cpu, size, spread


def over_total(e: Array, total: Array, axis: Axes) -> Array:
    """Exponentials divided by their `total`; 0 where no class is left, and 1 where nothing is left to the others."""
    # What is divided by one number for each row XLA multiplies by 1/total, and e·(1/e) may be less than 1: hence the
    # maximum. (The total second, as in `at_most`: a nan reaches its row through it.) What is added is lost in any other
    # sum: that is at least the `factor` of a `Shift`.
    return e / jnp.maximum(e, spread(total + 2.0**-100, axis))


@jax.custom_jvp
def certain(y: Array) -> Array:
    """`y`, with 1 for a probability within 2 ulp of 1, where the total was of exponentials that were rounded otherwise.

    To subtract a mean twice leaves ε² of the largest entry where its probability is 1 − ε instead of 1, and that can
    exceed the small entries. Derivatives pass through unchanged.
    """
    return jnp.maximum(y, jnp.floor(y + 2 * float(jnp.finfo(y.dtype).eps)))


certain.defjvp(lambda primals, tangents: (certain(*primals), *tangents))


def times_jacobian(y: Array, g: Array, axis: Axes, row_sum: Callable[[Array], Array]) -> Array:
    """The product of the Jacobian of softmax, where it is `y`, with a tangent or cotangent. `y` should be `certain`."""
    # The Jacobian is diag(y) − y yᵀ = Pᵀ diag(y) P with P u = u − ⟨u, y⟩. Where one probability is near 1, subtracting
    # the mean first leaves that entry small, so that nothing large cancels in the second subtraction. The product is
    # symmetric, as the Jacobian is: transposed for forward mode it is the same steps, from the last to the first.
    # Both differences have their sign reversed: what XLA for CPU subtracts from each entry of a row it first negates,
    # in a kernel of its own that parts the two around it; this way one kernel does it all.
    # The cotangent must not come first in the product that is summed: where it is the same for all rows, XLA of JAX
    # 0.10 writes the product over it, and later rows find it there.
    g = uncontracted(g, y, axis)
    z = y * (row_sum(y * g) - g)
    return uncontracted(-(z - y * row_sum(z)), y, axis)


def uncontracted(g: Array, y: Array, axis: Axes) -> Array:
    """`g`, also where it is a product, or is multiplied by something when transposed. `y` are probabilities.

    XLA may contract a product with what is subtracted from it, which leaves the product unrounded; and if it was
    rounded where it was summed, there is a rest where there should be none. What is subtracted from `g` times 1 is
    exact, if XLA does not know that it is 1.
    """
    if on_cpu() and size(y) >= 2**15 and not class_by_class(y, axis):
        # What the library sums would take up to half of the time again. There a barrier does, which XLA of JAX 0.10
        # leaves out, and needs not. In larger arrays no such rest has been seen, and a barrier would cost a pass.
        return lax.optimization_barrier(g) if size(y) <= 2**20 else g
    return g * lax.stop_gradient(jnp.maximum(y, 1))
