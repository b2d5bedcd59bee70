"""linear_cross_entropy: the last projection and its loss, over chunks of tokens, without ever holding all logits."""

import functools
import operator
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec as P
from jax.typing import ArrayLike

from jaxact._canonical import as_float, masked, require_array, require_arrays
from jaxact._cross_entropy import (
    Adjustment,
    AxisName,
    Classes,
    Losses,
    Options,
    at_index,
    counts,
    entropy,
    label_index,
    label_losses,
    logit_cotangent,
    predicted,
)
from jaxact._forward_mode import forward_mode

CHUNK_BYTES = 2**25  # of the logits that "auto" holds at a time


class Auxiliary(NamedTuple):
    """What `linear_cross_entropy(..., return_aux=True)` adds: arrays with the shape of the labels, and a count.

    `log_sum_exp` and `entropy`, in nats, are differentiable. They are 0 for tokens that do not count, `predicted` is −1
    and `correct` False.
    """

    log_sum_exp: Array
    entropy: Array
    predicted: Array
    correct: Array
    valid: Array  # the number of tokens that count


def linear_cross_entropy(
    x: ArrayLike,
    w: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    w_layout: Literal["dv", "vd"] = "dv",
    where: ArrayLike | None = None,
    ignore_index: int | None = -100,
    token_weight: ArrayLike | None = None,
    class_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    logit_softcap: ArrayLike | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | Literal["auto"] = "auto",
    accum_dtype: Any = jnp.float32,
    precision: Any = None,
    axis_name: AxisName = None,
    return_aux: bool = False,
) -> Any:
    """Softmax cross-entropy of the logits x·w + bias, without materialising them.

    The loss of a token is that of `jaxact.losses.softmax_cross_entropy_with_integer_labels`, times its weight. Logits
    exist for `chunk` tokens at a time. Where "mean" or "sum" is differentiated, the gradients are formed along with the
    loss, in three matrix products (6NDV operations); "none" and a differentiated `return_aux` form the logits once more
    (8NDV). An argument that is not differentiated costs no product, and an evaluation one alone.

    Args:
        x: (..., D), the features of each token.
        w: (D, V); or (V, D), as of tied embeddings, with `w_layout="vd"`. In the dtype of `x`.
        labels: (...), integers in [0, V), or `ignore_index`.
        bias: (V,).
        w_layout: "dv" or "vd".
        where: boolean, broadcastable to the shape of `labels`. False means that this token does not count.
        ignore_index: the label of tokens that do not count; None for none.
        token_weight: a factor for each token, broadcastable to the shape of `labels`.
        class_weight: (V,), a factor for each class, as in PyTorch.
        label_smoothing: ε in [0, 1], spread over all classes.
        z_loss: the coefficient of (log Σ e^z)².
        temperature: divides the logits; a scalar > 0.
        logit_softcap: a positive number C; logits become C·tanh(logits/C) first.
        reduction: "mean" divides the sum by that of the weights, of token and class, of tokens that count, and is 0
            where that is 0; "sum"; or "none" for the loss of each token.
        chunk: the number of tokens whose logits are held at a time; "auto" for about 32 MiB of them.
        accum_dtype: what the products and the gradient of `w` are accumulated in; never narrower than `x`.
        precision: of the products, as for `jax.numpy.matmul`.
        axis_name: inside `shard_map`, the mesh axis over which V is split by hand: `w`, `bias` and `class_weight` are
            then this device's part, and labels count through all parts.
        return_aux: also return an `Auxiliary`.

    Returns:
        The loss, a scalar or with the shape of `labels`, in float32 (float64 for float64 inputs); with `return_aux` the
        pair of it and an `Auxiliary`. nan for a label out of range.

    Raises:
        TypeError: if an argument has the wrong type or dtype, or `x` and `w` differ in dtype.
        ValueError: if shapes do not fit, or an option is out of its range.

    Derivative:
        With z̄ the cotangent of the logits, x̄ = z̄ wᵀ, w̄ = xᵀ z̄ and the bias's Σ z̄. Cotangents of 16-bit logits are
        rounded to 16 bits before the products. All options that are real numbers are differentiable too. Reverse mode
        of "mean" and "sum" keeps the gradients, that of "none" the arguments.

    Numerics:
        Products accumulate in `accum_dtype`; logits, their statistics and the loss are never rounded to 16 bits.
        Forward and backward pass form the logits by the same operations. Held by
        `tests/test_linear_cross_entropy.py`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxact
        >>> x, w, labels = jnp.eye(3, 4), jnp.eye(4, 50_000), jnp.array([0, 1, -100])
        >>> print(jaxact.linear_cross_entropy(x, w, labels).round(4))
        9.8198
        >>> dx, dw = jax.grad(jaxact.linear_cross_entropy, argnums=(0, 1))(x, w, labels)

    References:
        jax issue 35906. Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2025); Hsu et al.,
        "Liger Kernel" (2024).
    """
    options = Options.checked(
        temperature=temperature,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        class_weight=class_weight,
    )
    if w_layout not in ("dv", "vd"):
        raise ValueError(f'w_layout must be "dv" or "vd", got {w_layout!r}.')
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}.')
    if not jnp.issubdtype(jnp.dtype(accum_dtype), jnp.floating):
        raise TypeError(f"accum_dtype must be a float type, got {accum_dtype!r}.")
    how = _How(
        w_layout, None if chunk == "auto" else _whole("chunk", chunk, 1), jnp.dtype(accum_dtype),
        lax.Precision(precision) if isinstance(precision, str) else precision, axis_name, return_aux,
    )  # fmt: skip
    ignored = None if ignore_index is None else _whole("ignore_index", ignore_index)
    for name, value in (("x", x), ("w", w), ("labels", labels)):
        require_array(name, value)
    require_arrays(bias=bias, where=where, token_weight=token_weight, class_weight=class_weight)
    return _of_any(how, reduction, ignored, x, w, labels, bias, where, token_weight, options)


def _whole(name: str, value: Any, least: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}.") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number


class _How(NamedTuple):
    """What is known before the arrays; hashable."""

    layout: str
    chunk: int | None
    accum_dtype: Any
    precision: Any
    axis_name: AxisName
    extras: bool  # whether rows have an entropy and a prediction
    batch: tuple[Any, ...] = ()  # the mesh axes over which the tokens of one sum are split

    def over_batch(self, a: Array) -> Array:
        return lax.psum(a, self.batch) if self.batch else a

    @property
    def classes(self) -> Classes:
        # Beside the products a pass over logits is cheap, and a branch keeps XLA from reusing their memory.
        return Classes(self.axis_name, branch=False)

    def product(self, a: Array, b: Array, over_a: int, over_b: int) -> Array:
        """The sum over one axis of each, accumulated."""
        dtype = jnp.promote_types(self.accum_dtype, a.dtype)
        dimensions = (((over_a,), (over_b,)), ((), ()))
        return lax.dot_general(a, b, dimensions, precision=self.precision, preferred_element_type=dtype)


class _Operands(NamedTuple):
    """What has a derivative, and, with bools for arrays, which of it is asked for."""

    x: Any  # (N, D)
    w: Any
    bias: Any
    options: Any


class _Tokens(NamedTuple):
    """What has none."""

    y: Array  # (N,) places of the labels
    live: Array  # (N,) whether they count


class _Rows(NamedTuple):
    """Per token."""

    loss: Array
    lse: Array
    entropy: Array | None = None
    predicted: Array | None = None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _of_any(
    how: _How,
    reduction: str,
    ignore_index: int | None,
    x: ArrayLike,
    w: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None,
    where: ArrayLike | None,
    token_weight: ArrayLike | None,
    options: Options,
) -> Any:
    x, w, labels = as_float("x", x), as_float("w", w), jnp.asarray(labels)
    shape = labels.shape
    features, vocabulary = (w.shape if how.layout == "dv" else w.shape[::-1]) if w.ndim == 2 else (-1, -1)
    if x.ndim == 0 or x.shape[-1] != features:
        wanted = "(D, V)" if how.layout == "dv" else "(V, D)"
        raise ValueError(f"x must have shape (..., D) and w {wanted}, got {x.shape} and {w.shape}.")
    if x.dtype != w.dtype:
        raise TypeError(f"x and w must have one dtype, got {x.dtype} and {w.dtype}: cast the one you mean to.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}.")
    if shape != x.shape[:-1]:
        raise ValueError(f"labels must have the shape of x without its last axis, {x.shape[:-1]}, got {shape}.")
    dtype = jnp.promote_types(how.accum_dtype, x.dtype)
    if bias is not None:
        bias = as_float("bias", bias)
        if bias.shape != (vocabulary,):
            raise ValueError(f"bias must have shape ({vocabulary},), got {bias.shape}.")
    live = jnp.ones(shape, bool) if where is None else masked(jnp.ones(shape, bool), where, False)
    if ignore_index is not None:
        live &= counts(labels, ignore_index)
    weight = jnp.ones(shape, dtype)
    if token_weight is not None:
        try:
            weight = jnp.broadcast_to(as_float("token_weight", token_weight).astype(dtype), shape)
        except ValueError:
            raise ValueError(
                f"token_weight must broadcast to the shape {shape} of labels, got {jnp.shape(token_weight)}."
            ) from None
    options = options._replace(class_weight=options.weights(vocabulary, dtype))
    return _on_mesh(how, reduction, x, w, (labels, live, weight), bias, options)


def _on_mesh(how: _How, reduction: str, x: Array, w: Array, tokens: Any, bias: Array | None, options: Options) -> Any:
    """The loss; where the axes of the arrays' mesh are explicit, of each device's part, and then of all."""
    sharding, place = jax.typeof(x).sharding, 1 if how.layout == "dv" else 0
    split = _names(jax.typeof(w).sharding.spec[place])
    # A mesh axis that splits the classes cannot split the tokens too.
    batch = [tuple(name for name in _names(entry) if name not in split) for entry in sharding.spec[:-1]]
    names = tuple(name for entry in batch for name in entry)
    if not (split or names):
        return _loss(how, reduction, x, w, tokens, bias, options)
    mesh = sharding.mesh if names else jax.typeof(w).sharding.mesh
    by_class, by_token = P(split or None), P(*(entry or None for entry in batch))
    of_options = Options(P(), P(), P(), P(), by_class)
    specs = (P(*by_token, None), P(None, *by_class) if place else P(*by_class, None), by_token, by_class, of_options)
    here = how._replace(axis_name=split or None, batch=names)
    out = P() if reduction != "none" else by_token
    of_device = jax.shard_map(
        functools.partial(_loss, here, reduction),
        mesh=mesh,
        in_specs=specs,
        out_specs=(out, cast(Any, Auxiliary)(by_token, by_token, by_token, by_token, P())) if how.extras else out,
    )
    arguments = (x, w, tokens, bias, options)
    tree: Any  # to type checkers, jaxlib's PyTreeDef has no methods
    leaves, tree = jax.tree.flatten(arguments)
    wanted = [NamedSharding(mesh, spec) for spec in _along(specs, arguments)]
    return of_device(*tree.unflatten([jax.sharding.reshard(a, to) for a, to in zip(leaves, wanted, strict=True)]))


def _names(entry: Any) -> tuple[Any, ...]:
    """The mesh axes of one entry of a partition."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _along(prefix: Any, tree: Any) -> list[Any]:
    """What the prefix of a tree says of each leaf."""
    return jax.tree.leaves(jax.tree.broadcast(prefix, tree))


def _loss(how: _How, reduction: str, x: Array, w: Array, tokens: Any, bias: Array | None, options: Options) -> Any:
    labels, live, weight = tokens
    shape, dtype = labels.shape, weight.dtype
    labels, live, weight = labels.ravel(), live.ravel(), weight.ravel()
    y, exists = label_index(labels, w.shape[how.layout == "dv"], how.axis_name)
    # As a factor nan reaches the gradient too.
    weight = jnp.where(live, jnp.where(exists, weight, jnp.nan), 0)
    given = _Operands(x.reshape(-1, x.shape[-1]), w, bias, options), _Tokens(y, live)
    loss: Array
    if reduction == "none" or how.extras:
        rows = _attached(how, *given, _sweep(how, lax.stop_gradient(given[0]), given[1])[0])
    if reduction == "none":
        loss = (rows.loss * weight).reshape(shape)
    else:
        share = jnp.ones((), dtype)
        if reduction == "mean":
            by_class = at_index(options.class_weight, y, how.axis_name)
            total = how.over_batch(jnp.sum(weight if by_class is None else jnp.where(live, weight * by_class, 0)))
            share = jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
        # The cotangents of the logits divided by the number of tokens could vanish in float16.
        late, early = (share, 1) if x.dtype == jnp.float16 else (1, share)
        loss = late * how.over_batch(_total(how._replace(extras=False), *given, early * weight))
    if not how.extras:
        return loss
    number = jnp.where(live, rows.predicted, -1)
    fields = (rows.lse, rows.entropy, number, live & exists & (number == labels))
    lse, spread, number, correct = (a.reshape(shape) for a in fields)
    return loss, Auxiliary(lse, spread, number, correct, how.over_batch(jnp.sum(live)))


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(how: _How, operands: _Operands, tokens: _Tokens, weight: Array) -> Array:
    """The weighted sum of the losses."""
    return _weighted(_sweep(how, operands, tokens)[0].loss, weight)


def _weighted(loss: Array, weight: Array) -> Array:
    return jnp.sum(jnp.where(weight == 0, 0, weight * loss))


def _total_fwd(how: _How, *arguments: Any) -> Any:
    # The cotangent of a loss is its weight, but for one factor. So the gradients can be formed here, where the logits
    # are at hand.
    moving, (operands, tokens, weight) = _asked_for(arguments[0]), _values(arguments)
    rows, gradients = _sweep(how, operands, tokens, _Rows(weight, jnp.zeros_like(weight)), moving)
    return _weighted(rows.loss, weight), (gradients, _samples(operands), rows.loss)


def _total_bwd(how: _How, residuals: Any, g: Array) -> Any:
    gradients, samples, loss = residuals
    return _cotangents(how, jax.tree.map(lambda a: g * a, gradients), samples), None, g * loss


_total.defvjp(_total_fwd, _total_bwd, symbolic_zeros=True)


@forward_mode
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attached(how: _How, operands: _Operands, tokens: _Tokens, rows: _Rows) -> _Rows:
    """What is known of the rows, with its derivatives."""
    return rows


def _attached_fwd(how: _How, *arguments: Any) -> Any:
    moving, (operands, tokens, rows) = _asked_for(arguments[0]), _values(arguments)
    # None tells what is asked for from what is not: a residual must be an array.
    asked = jax.tree.map(lambda a, m: a if m else None, operands, moving)
    return rows, (asked, operands, tokens)


def _attached_bwd(how: _How, residuals: Any, g: _Rows) -> Any:
    asked, operands, tokens = residuals
    tree: Any = jax.tree.structure(operands)
    moving = tree.unflatten([a is not None for a in tree.flatten_up_to(asked)])
    _, gradients = _sweep(how, operands, tokens, g._replace(predicted=None), moving)
    return _cotangents(how, gradients, _samples(operands)), None, None


_attached.defvjp(_attached_fwd, _attached_bwd, symbolic_zeros=True)


def _asked_for(arguments: Any) -> Any:
    """Which leaves are differentiated."""
    return jax.tree.map(lambda a: a.perturbed, arguments, is_leaf=_is_leaf)


def _values(arguments: Any) -> Any:
    return jax.tree.map(lambda a: a.value, arguments, is_leaf=_is_leaf)


def _is_leaf(a: Any) -> bool:
    return hasattr(a, "perturbed")


def _samples(operands: Any) -> Any:
    """Nothing of each operand, but for its type."""
    return jax.tree.map(lambda a: jnp.ravel(a)[:0], operands)


def _cotangents(how: _How, gradients: Any, samples: Any) -> Any:
    """The gradients in the types of their operands.

    They are summed over the devices that hold the same operand here: once, and not for each chunk.
    """
    tracked = how.axis_name is None or _varying(samples.w)

    def typed(g: Array | None, sample: Array, split: bool) -> Array | None:
        if g is None:
            return None
        # With check_vma=False, `shard_map` keeps no track. What is not split along with the classes is then the same.
        extra = tuple(_varying(g) - _varying(sample)) if tracked else () if split else how.axis_name
        return (lax.psum(g, extra) if extra else g).astype(sample.dtype)

    tree: Any = jax.tree.structure(samples)
    by_class = _Operands(False, True, True, Options(False, False, False, False, True))
    return tree.unflatten(
        map(typed, tree.flatten_up_to(gradients), jax.tree.leaves(samples), _along(by_class, samples))
    )


def _sweep(
    how: _How, operands: _Operands, tokens: _Tokens, g: _Rows | None = None, moving: Any = None
) -> tuple[_Rows, Any]:
    """The rows and, where their cotangents are given, the cotangents of the operands asked for, None for the others.

    Chunk i takes tokens i, i + count, i + 2·count, ...: where tokens are sharded over devices, each device then has its
    part of every chunk. What is left over makes a smaller chunk, so that no padding enters any sum.
    """
    n, vocabulary = operands.x.shape[0], operands.w.shape[how.layout == "dv"]
    size = min(how.chunk or max(1, CHUNK_BYTES // (4 * max(vocabulary, 1))), max(n, 1))
    count = n // size
    inputs = (operands.x, tokens, g)
    split = jax.tree.map(lambda a: a[: size * count].reshape(size, count, *a.shape[1:]).swapaxes(0, 1), inputs)
    rest = jax.tree.map(lambda a: a[size * count :], inputs)

    # Checkpointed, since what derivatives of higher order and transposition save of a step, they save for all steps.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(sums: Any, inputs: Any) -> Any:
        x, tokens, g = inputs
        return _chunk(how, operands._replace(x=x), tokens, g, moving, sums)

    sums = jax.tree.map(
        lambda a, m: jnp.zeros(jnp.shape(a), jnp.promote_types(how.accum_dtype, jnp.result_type(a))) if m else None,
        operands._replace(x=None),
        _nothing(operands) if moving is None else moving._replace(x=None),
    )
    axes = frozenset[Any]().union(*map(_varying, jax.tree.leaves((operands, tokens, g))))
    sums = jax.tree.map(lambda a: lax.pcast(a, tuple(axes), to="varying") if axes else a, sums)
    # Under checkpoint too: JAX 0.10 forgets custom rules, and with them second derivatives, in the part of a loop that it
    # takes to be known.
    loop = jax.checkpoint(functools.partial(lax.scan, step), prevent_cse=False)
    sums, (rows, x_bar) = loop(sums, split)
    rows, x_bar = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(size * count, *a.shape[2:]), (rows, x_bar))
    if size * count < n:
        sums, last = step(sums, rest)
        rows, x_bar = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (rows, x_bar), last)
    return rows, sums._replace(x=x_bar)


def _varying(a: Any) -> frozenset[Any]:
    """The mesh axes along which devices hold different values, inside `shard_map`."""
    return jax.typeof(a).mat.varying


def _nothing(operands: _Operands) -> Any:
    return jax.tree.map(lambda a: False, operands._replace(x=None))


def _chunk(how: _How, operands: _Operands, tokens: _Tokens, g: _Rows | None, moving: Any, sums: Any) -> Any:
    """One chunk: its rows and the cotangent of its x; the cotangents of the other operands are added to `sums`."""
    x, w, bias, options = operands
    x = jnp.where(tokens.live[:, None], x, 0)  # 0 times nan, otherwise, in the products
    # The axes of w that x is multiplied over, and the other.
    over, other = (0, 1) if how.layout == "dv" else (1, 0)
    z = how.product(x, w, 1, over)
    if bias is not None:
        z = z + bias.astype(z.dtype)

    weights = options.weights(z.shape[-1], z.dtype)
    spread, adjust = options.spread(weights, z.dtype), options.adjustment(z)
    adjusted, pull_adjust = jax.vjp(lambda z, adjust: adjust(z), z, adjust)
    losses, given = label_losses(how.classes, adjusted, tokens.y, tokens.live, spread, Adjustment(None, None))

    def loss_of(losses: Losses, options: Options) -> Array:
        by_class = at_index(options.weights(z.shape[-1], z.dtype), tokens.y, how.axis_name)
        return jnp.where(tokens.live, options.combine(losses, by_class), 0)

    loss, pull_loss = jax.vjp(loss_of, losses, options)
    rows = _Rows(loss, losses.lse)
    if how.extras:
        nats, pull_entropy = entropy(adjusted, given, how.classes)
        rows = _Rows(loss, losses.lse, jnp.where(tokens.live, nats, 0), predicted(adjusted, how.classes))
    if g is None:
        return sums, (rows, None)

    # By hand and not by `jax.vjp` of all this: JAX 0.10 forgets custom rules, and with them second derivatives, of what
    # it transposes inside a loop.
    losses_bar, options_bar = pull_loss(g.loss)
    losses_bar = losses_bar._replace(lse=losses_bar.lse + g.lse)
    z_bar, spread_bar = logit_cotangent(
        adjusted, tokens.y, tokens.live, spread, losses.nll, given, losses_bar, how.classes
    )
    if how.extras:
        z_bar = z_bar + jnp.where(tokens.live[:, None], pull_entropy(g.entropy), 0)
    z_bar, adjust_bar = pull_adjust(z_bar)
    if any(jax.tree.leaves(moving.options)):
        _, pull_options = jax.vjp(
            lambda o: (o.spread(o.weights(z.shape[-1], z.dtype), z.dtype), o.adjustment(z)), options
        )
        options_bar = jax.tree.map(jnp.add, options_bar, pull_options((spread_bar, adjust_bar))[0])
    bars = _Operands(None, None, z_bar.sum(0) if moving.bias else None, options_bar)
    z_bar = z_bar.astype(x.dtype)
    x_bar = how.product(z_bar, w, 1, other) if moving.x else None
    if moving.w:
        bars = bars._replace(w=how.product(x, z_bar, 0, 0) if how.layout == "dv" else how.product(z_bar, x, 0, 0))
    # The tree of the sums has None for what is not asked for.
    sums = jax.tree.map(lambda a, b: None if a is None else a + b, sums, bars, is_leaf=lambda a: a is None)
    return sums, (rows, x_bar)
