"""Logits, losses and cotangents of one chunk of tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._canonical import wider
from jaxact._classes import AxisName, Classes, as_row, at_index, predicted
from jaxact._cross_entropy import label_losses, logit_cotangent
from jaxact._entropy import entropy, entropy_cotangent
from jaxact._options import Adjustment, Losses, Options


class How(NamedTuple):
    """What is known before the arrays; hashable."""

    class_axis: int  # of w
    chunk: int | None
    accum_dtype: Any
    precision: Any
    axis_name: AxisName
    extras: bool  # whether rows have an entropy and a prediction
    batch: tuple[Any, ...] = ()  # the mesh axes over which the tokens of one sum are split

    def over_batch(self, a: Array) -> Array:
        return lax.psum(a, self.batch) if self.batch else a

    def product(self, a: Array, b: Array, over_a: int, over_b: int) -> Array:
        """The sum over one axis of each, accumulated."""
        dtype = wider(self.accum_dtype, a.dtype)
        dimensions = (((over_a,), (over_b,)), ((), ()))
        return lax.dot_general(a, b, dimensions, precision=self.precision, preferred_element_type=dtype)


class Operands(NamedTuple):
    """What has a derivative, and, with bools for arrays, which of it is asked for."""

    x: Any  # (N, D)
    w: Any
    bias: Any
    options: Any


class Tokens(NamedTuple):
    """What has none."""

    y: Array  # (N,) places of the labels
    live: Array  # (N,) whether they count


class Rows(NamedTuple):
    """Per token."""

    loss: Array
    lse: Array
    entropy: Array | None = None
    predicted: Array | None = None


def add_chunk(how: How, operands: Operands, tokens: Tokens, g: Rows | None, perturbed: Any, sums: Any) -> Any:
    """One chunk: its rows and the cotangent of its x; the cotangents of the other operands are added to `sums`."""
    x, w, bias, options = operands
    x = jnp.where(tokens.live[:, None], x, 0)  # 0 times nan, otherwise, in the products
    z = how.product(x, w, 1, 1 - how.class_axis)
    if bias is not None:
        z = z + as_row(bias.astype(z.dtype), z.ndim)

    weights = options.weights(z.shape[-1], z.dtype)
    smoothing, adjust = options.smoothing_weights(weights, z.dtype), options.adjustment(z)
    adjusted, pull_adjust = jax.vjp(lambda z, adjust: adjust(z), z, adjust)
    # Beside the products a pass over logits is cheap. A branch keeps XLA from reusing their memory, and in second
    # derivatives an exponential that is not XLA's does so too. The entropy needs the maximum in any case.
    classes = Classes(how.axis_name, lean=g is not None or how.extras)
    losses, total = label_losses(classes, adjusted, tokens.y, tokens.live, smoothing, Adjustment(), False)

    def loss_of(losses: Losses, options: Options) -> Array:
        by_class = at_index(options.weights(z.shape[-1], z.dtype), tokens.y, how.axis_name)
        return jnp.where(tokens.live, options.combine(losses, by_class), 0)

    loss, pull_loss = jax.vjp(loss_of, losses, options)
    rows = Rows(loss, losses.lse)
    if how.extras:
        nats = jnp.where(tokens.live, entropy(classes, adjusted, total)[..., 0], 0)
        rows = Rows(loss, losses.lse, nats, predicted(adjusted, classes))
    if g is None:
        return sums, (rows, None)

    # By hand and not by `jax.vjp` of all this: JAX 0.10 forgets custom rules, and with them second derivatives, of what
    # it transposes inside a loop.
    losses_bar, options_bar = pull_loss(g.loss)
    losses_bar = losses_bar._replace(lse=losses_bar.lse + g.lse)
    z_bar, smoothing_bar = logit_cotangent(
        adjusted, tokens.y, tokens.live, smoothing, losses.nll, total, losses_bar, classes
    )
    if g.entropy is not None:
        entropy_bar = entropy_cotangent(classes, adjusted, total, g.entropy[:, None])
        z_bar = z_bar + jnp.where(tokens.live[:, None], entropy_bar, 0)
    z_bar, adjust_bar = pull_adjust(z_bar)
    # The adjustment and the weights of smoothing are the options themselves.
    of_adjust = {"temperature": adjust_bar.temperature, "logit_softcap": adjust_bar.cap, "class_weight": smoothing_bar}
    options_bar = options_bar._replace(
        **{k: getattr(options_bar, k) + v for k, v in of_adjust.items() if None not in (getattr(options, k), v)}
    )
    bars = Operands(None, None, z_bar.sum(0) if perturbed.bias else None, options_bar)
    z_bar = z_bar.astype(x.dtype)
    x_bar = how.product(z_bar, w, 1, how.class_axis) if perturbed.x else None
    if perturbed.w and how.class_axis:
        # XLA for CPU multiplies a third slower where it has to transpose the left factor as it goes.
        bars = bars._replace(w=how.product(lax.optimization_barrier(x.T), z_bar, 1, 0))
    elif perturbed.w:
        bars = bars._replace(w=how.product(z_bar, x, 0, 0))
    # The tree of the sums has None for what is not asked for.
    sums = jax.tree.map(lambda a, b: None if a is None else a + b, sums, bars, is_leaf=lambda a: a is None)
    return sums, (rows, x_bar)
