"""A second way to a result, for where some row needs it: a branch where that costs less than the pass it may save."""

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


@jax.custom_batching.custom_vmap
def _all(condition: Array) -> Array:
    """`jnp.all`, over the batch too when batched, so that the branch on it remains one."""
    return jnp.all(condition)


@_all.def_vmap
def _all_of_batch(size: int, batched: list[bool], condition: Array) -> tuple[Array, bool]:
    return _all(condition), False
