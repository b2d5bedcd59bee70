"""The losses of all tokens, in chunks of which one has its logits in memory, and the rules of what is made of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxact._canonical import wider
from jaxact._chunk import How, Operands, Rows, Tokens, add_chunk
from jaxact._classes import vary, varying
from jaxact._forward_mode import forward_mode, of_perturbed
from jaxact._options import Options

CHUNK_BYTES = 2**25  # of logits that are held at a time, at least, by default


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_total(how: How, operands: Operands, tokens: Tokens, weight: Array) -> tuple[Array, Rows]:
    """The weighted sum of the losses; and the rows, as constants."""
    rows, _ = sweep(how, operands, tokens)
    return jnp.sum(weighted(rows.loss, weight)), rows


def weighted(loss: Array, weight: Array) -> Array:
    return weight * _counted(loss, weight)


def _counted(loss: Array, weight: Array) -> Array:
    """The loss, but where the weight is 0 and it is infinite. (A nan is one in the gradient too.)"""
    return jnp.where((weight == 0) & jnp.isinf(loss), 0, loss)


def _total_fwd(how: How, *arguments: Any) -> Any:
    # The cotangent of a loss is its weight, but for one factor. So the gradients can be formed here, where the logits
    # are at hand.
    perturbed, (operands, tokens, weight) = _perturbed(arguments[0]), _values(arguments)
    rows, gradients = sweep(how, operands, tokens, Rows(weight, jnp.zeros_like(weight)), perturbed)
    total = jnp.sum(weighted(rows.loss, weight))
    return (total, rows), (gradients, _samples(operands), _counted(rows.loss, weight))


def _total_bwd(how: How, residuals: Any, cotangents: Any) -> Any:
    (gradients, samples, loss), (g, _) = residuals, cotangents
    return _cotangents(how, jax.tree.map(lambda a: g * a, gradients), samples), None, g * loss


weighted_total.defvjp(_total_fwd, _total_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attached(how: How, operands: Operands, tokens: Tokens, rows: Rows) -> Rows:
    """What is known of the rows, but for the prediction, with its derivatives."""
    return rows


@functools.partial(attached.defjvp, symbolic_zeros=True)
def _attached_jvp(how: How, primals: Any, tangents: Any) -> Any:
    # As by `forward_mode`, the pushforward is the transposed backward pass: but that of each chunk. In the transpose of
    # their loop, the tangents of w would be a carry, of which the next derivative keeps one for every chunk. Here they
    # are a constant, and where JAX transposes this loop, the gradient is summed as it is in `sweep`.
    operands, tokens, rows = primals
    known = attached(how, operands, tokens, rows)  # not `rows`: the next derivative is of what is returned here
    perturbed = jax.tree.map(lambda t: not isinstance(t, SymbolicZero), tangents[0])
    asked = jax.tree.map(lambda t, m: t if m else None, tangents[0], perturbed)
    samples = _samples(operands)
    operands, zeros = _accumulators(how, operands, tokens, rows, perturbed)
    (pushed,) = jax.linear_transpose(lambda gradients: _cotangents(how, gradients, samples), zeros)(asked)
    of_all, zeros = pushed._replace(x=None), zeros._replace(x=None)

    def step(nothing: None, inputs: Any) -> Any:
        x, tokens, x_dot, rows = inputs

        def backward(g: Rows) -> Any:
            sums, (_, x_bar) = add_chunk(how, operands._replace(x=x), tokens, g, perturbed, zeros)
            return sums, x_bar

        (rows_dot,) = jax.linear_transpose(backward, rows)((of_all, x_dot))
        return nothing, rows_dot

    _, rows_dot = _in_chunks(how, step, None, operands, (operands.x, tokens, pushed.x, rows))
    return known, rows_dot


def _perturbed(arguments: Any) -> Any:
    """Which leaves are differentiated."""
    return jax.tree.map(lambda a: a.perturbed, arguments, is_leaf=_is_leaf)


def _values(arguments: Any) -> Any:
    return jax.tree.map(lambda a: a.value, arguments, is_leaf=_is_leaf)


def _is_leaf(a: Any) -> bool:
    return hasattr(a, "perturbed")


def _samples(operands: Any) -> Any:
    """Nothing of each operand, but for its type."""
    return jax.tree.map(lambda a: jnp.ravel(a)[:0], operands)


def _cotangents(how: How, gradients: Any, samples: Any) -> Any:
    """The gradients in the types of their operands.

    They are summed over the devices that hold the same operand here: once, and not for each chunk.
    """
    tracked = how.axis_name is None or varying(samples.w)

    def typed(sample: Array, g: Array | None, alone: bool) -> Array | None:
        if g is None:
            return None
        # With check_vma=False, `shard_map` keeps no track.
        extra = tuple(varying(g) - varying(sample)) if tracked else () if alone else how.axis_name
        return (lax.psum(g, extra) if extra else g).astype(sample.dtype)

    # w, the bias and the weights are split, and what is a matter of rows is computed on each.
    options = Options(temperature=False, label_smoothing=True, z_loss=True, logit_softcap=False, class_weight=True)
    alone = Operands(False, True, True, options)
    return jax.tree.map(typed, samples, gradients, jax.tree.broadcast(alone, samples))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 4))
def sweep(
    how: How, operands: Operands, tokens: Tokens, g: Rows | None = None, perturbed: Any = None
) -> tuple[Rows, Any]:
    """The rows and, where their cotangents are given, the cotangents of the operands asked for, None for the others."""
    return _sweep(how, perturbed, operands, tokens, g)


@functools.partial(sweep.defjvp, symbolic_zeros=True)
def _sweep_jvp(how: How, perturbed: Any, primals: Any, tangents: Any) -> Any:
    # Where a step holds one array of logits, its derivative holds some five.
    fine = how._replace(chunk=_quarter(how, primals[0]))
    f, values, of_values = of_perturbed(lambda *arrays: _sweep(fine, perturbed, *arrays), primals, tangents)
    return jax.jvp(f, (values,), (of_values,))


def _sweep(how: How, perturbed: Any, operands: Operands, tokens: Tokens, g: Rows | None) -> tuple[Rows, Any]:
    perturbed = jax.tree.map(lambda a: False, operands) if perturbed is None else perturbed
    operands, zeros = _accumulators(how, operands, tokens, g, perturbed)

    def step(sums: Any, inputs: Any) -> Any:
        x, tokens, g = inputs
        return add_chunk(how, operands._replace(x=x), tokens, g, perturbed, sums)

    sums, (rows, x_bar) = _in_chunks(how, step, zeros._replace(x=None), operands, (operands.x, tokens, g))
    return rows, sums._replace(x=x_bar)


def _accumulators(how: How, operands: Operands, tokens: Tokens, g: Rows | None, perturbed: Any) -> tuple[Operands, Any]:
    """The operands as a loop takes them, and zeros for the cotangents of those asked for."""
    # Inside `shard_map`, cotangents are summed over devices at the end. What differs between them must say so, or JAX
    # would sum those of the options in every step.
    of_rows = frozenset[Any]().union(*map(varying, jax.tree.leaves((operands.x, tokens.live, g))))
    of_all = of_rows | varying(operands.w)
    of_options = Options(
        temperature=of_all, label_smoothing=of_rows, z_loss=of_rows, logit_softcap=of_all, class_weight=of_all
    )
    prefix = Operands(of_all, of_all, of_all, of_options)
    axes = jax.tree.broadcast(prefix, operands)
    operands = operands._replace(options=jax.tree.map(vary, operands.options, axes.options))

    def zeros(a: Array, m: bool, axes: frozenset[Any]) -> Array | None:
        dtype = wider(how.accum_dtype, jnp.result_type(a))
        return vary(jnp.zeros(jnp.shape(a), dtype), axes) if m else None

    return operands, jax.tree.map(zeros, operands, perturbed, axes)


def _in_chunks(how: How, step: Any, sums: Any, operands: Operands, inputs: Any) -> tuple[Any, Any]:
    """As `lax.scan`, of a step that takes and returns a chunk of tokens.

    Chunk i takes tokens i, i + count, i + 2·count, ...: where tokens are sharded over devices, each device then has its
    part of every chunk. What is left over makes a smaller chunk, so that no padding enters any sum.
    """
    n, size = operands.x.shape[0], _size(how, operands)
    count = n // size
    # Not two slices, whose transpose is a sum of padded arrays: where that follows a product, XLA for CPU of JAX 0.10
    # may make one kernel of them, which writes nowhere and ends the process.
    parts = jax.tree.map(lambda a: lax.split(a, (size * count, n - size * count)), inputs)
    whole, rest = jax.tree.transpose(jax.tree.structure(inputs), None, parts)
    split = jax.tree.map(lambda a: a.reshape(size, count, *a.shape[1:]).swapaxes(0, 1), whole)
    # Checkpointed, since what derivatives of higher order and transposition save of a step, they save for all steps.
    step = jax.checkpoint(step, prevent_cse=False)
    # Under checkpoint too: JAX 0.10 forgets custom rules, and with them second derivatives, in the part of a loop that
    # it takes to be known.
    loop = jax.checkpoint(functools.partial(lax.scan, step), prevent_cse=False)
    sums, rows = loop(sums, split)
    rows = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(size * count, *a.shape[2:]), rows)
    if size * count < n:
        sums, last = step(sums, rest)
        rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows, last)
    return sums, rows


def _size(how: How, operands: Operands) -> int:
    """The number of tokens in a chunk."""
    n, features = operands.x.shape
    if how.chunk:
        return min(how.chunk, max(n, 1))
    # With every chunk the gradient of w is read and written. Beside it, somewhat less for logits is not much.
    return _even(n, max(CHUNK_BYTES * features // (4 * max(operands.w.size, 1)), features * 13 // 16, 1))


def _quarter(how: How, operands: Operands) -> int:
    return _even(operands.x.shape[0], max(_size(how, operands) // 4, 1))


def _even(n: int, most: int) -> int:
    if most == 1:
        return 1  # n may be symbolic
    least = -(-n // most)
    # What is left over takes memory of its own: rather somewhat smaller chunks, if they leave nothing.
    return n // next((count for count in range(least, 2 * least) if n % count == 0), least) if n else 1
