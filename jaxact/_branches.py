"""A second way to a result, for where some row needs it: a branch where that costs less than the pass it may save."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._reductions import few, on_cpu


def unless_all(condition: Array, exact: Callable[..., Any], quick: Callable[..., Any], *operands: Any) -> Any:
    """`exact(*operands)`, for which `quick` may stand in where the condition holds throughout.

    On CPU a pass over the logits is what costs, and is left out where no row needs it. Elsewhere a branch on a value
    that the device has computed may cost more than the pass, and so it does for few numbers.
    """
    if not on_cpu() or few(*jax.tree.leaves(operands)):
        return exact(*operands)
    return lax.cond(_all(condition), quick, exact, *operands)


def needing(quick: Callable[..., Array], count: int) -> Callable[..., Array]:
    """`quick`, as a function that needs its first operands, for a branch of what is linear in others.

    In the transpose of a branch JAX 0.10 writes down, as zeros of its size, any constant that it alone does not need.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def as_needing(*operands: Any) -> Array:
        result = quick(*operands)
        for a in jax.tree.leaves(operands[:count]):
            # 1 in any case, as XLA knows. JAX does not, and so keeps the operand for this.
            result = result * jnp.where(jnp.any(a > 0), 1, 1)
        return result

    return as_needing


@jax.custom_batching.custom_vmap
def _all(condition: Array) -> Array:
    """`jnp.all`, over the batch too when batched, so that the branch on it remains one."""
    return jnp.all(condition)


@_all.def_vmap
def _all_of_batch(size: int, batched: list[bool], condition: Array) -> tuple[Array, bool]:
    return _all(condition), False
