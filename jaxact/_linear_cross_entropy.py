"""linear_cross_entropy: the last projection and its loss, over chunks of tokens, without ever holding all logits."""

import functools
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax.typing import ArrayLike

from jaxact._canonical import (
    as_float,
    broadcast,
    canonical_bool,
    canonical_int,
    canonical_mask,
    optional_array,
    require_array,
    require_labels,
    shown,
    wider,
)
from jaxact._chunk import How, Operands, Tokens
from jaxact._chunks import attached, sweep, weighted, weighted_total
from jaxact._classes import (
    AxisName,
    at_index,
    integer_labels,
    label_index,
    not_ignored,
    static_axis_name,
    vary,
    varying,
)
from jaxact._options import Options


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
    loss, in three matrix products (6NDV operations), with `return_aux` too; "none" forms the logits once more (8NDV).
    Where what `return_aux` returns is differentiated, that is three products more, but with "none" no more. An argument
    that is not differentiated costs no product, and an evaluation one alone.

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
        label_smoothing: ε in [0, 1], spread over the classes that exist: a bias of −inf removes one.
        z_loss: the coefficient of (log Σ e^z)².
        temperature: divides the logits; a scalar > 0.
        logit_softcap: a positive number C ≤ 1e37; logits become C·tanh(logits/C) first.
        reduction: "mean" divides the sum by that of the weights, of token and class, of tokens that count, and is 0
            where that is 0; "sum"; or "none" for the loss of each token.
        chunk: the number of tokens whose logits are held at a time; "auto" for 32 MiB of them, or somewhat less than
            the gradient of `w` takes if that is more. Second derivatives of "mean" and "sum" take a quarter of it.
            Where the entropy is differentiated there are up to six arrays of that size. Where shapes are symbolic it
            must be 1.
        accum_dtype: float32 or float64, what the products and the gradient of `w` are accumulated in; never narrower
            than `x`.
        precision: of the products, as for `jax.numpy.matmul`.
        axis_name: inside `shard_map`, the mesh axis over which V is split by hand: `w`, `bias` and `class_weight` are
            then this device's part, and labels count through all parts. With check_vma=False take gradients inside it;
            forward mode needs check_vma. What is on explicit axes of the same mesh is gathered.
        return_aux: also return an `Auxiliary`, a named tuple: of each token the `log_sum_exp` and the `entropy`, which
            are differentiable, the `predicted` class and whether it is `correct`; and `valid`, how many tokens count.
            Of others these are 0, 0, −1 and False.

    Returns:
        The loss, a scalar or with the shape of `labels`, in float32 (float64 if `x` or `accum_dtype` is); with
        `return_aux` the pair of it and the `Auxiliary`. nan for a label out of range.

    Raises:
        TypeError: if an argument has the wrong type or dtype, or `x` and `w` differ in dtype.
        ValueError: if shapes do not fit, or an option is out of its range.

    Derivative:
        With z̄ the cotangent of the logits, x̄ = z̄ wᵀ, w̄ = xᵀ z̄ and the bias's Σ z̄. Cotangents of 16-bit logits are
        rounded to 16 bits before the products. All options that are real numbers are differentiable too. Reverse mode
        of "mean" and "sum" keeps the gradients, that of "none" the arguments.

    Numerics:
        Products accumulate in `accum_dtype`; logits, their statistics and the loss are never rounded to 16 bits.
        Forward and backward pass form the logits by the same operations. A temperature divides them as they are, where
        the losses take off the maximum first: of logits near 10,000 that costs four digits. Held by
        `tests/test_linear_cross_entropy.py`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxact
        >>> x, w, labels = jnp.eye(3, 4), jnp.eye(4, 50_000), jnp.array([0, 1, -100])
        >>> print(f"{jaxact.linear_cross_entropy(x, w, labels):.4f}")
        9.8198
        >>> dx, dw = jax.grad(jaxact.linear_cross_entropy, argnums=(0, 1))(x, w, labels)

    References:
        jax issue 35906. Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2025); Hsu et al.,
        "Liger Kernel" (2024).
    """
    options = Options(temperature, label_smoothing, z_loss, logit_softcap, class_weight).checked()
    if w_layout not in ("dv", "vd"):
        raise ValueError(f'w_layout must be "dv" or "vd", got {w_layout!r}.')
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {shown(reduction)}.')
    try:
        accumulated = None if accum_dtype is None or isinstance(accum_dtype, Array) else jnp.dtype(accum_dtype)
    except TypeError:
        accumulated = None
    if accumulated is None or not jnp.issubdtype(accumulated, jnp.floating):
        raise TypeError(f"accum_dtype must be a float type, got {shown(accum_dtype)}.")
    if jnp.finfo(accumulated).bits < 32:
        raise ValueError(f"accum_dtype must have at least 32 bits, got {accumulated}.")
    if jax.dtypes.canonicalize_dtype(accumulated) != accumulated:
        raise ValueError(f"accum_dtype must be float32 where jax_enable_x64 is off, got {accumulated}.")
    precision = tuple(precision) if isinstance(precision, list) else precision
    if not isinstance(precision, Hashable):
        raise TypeError(f"precision must be one of jax.lax.Precision, a name of it, or a pair, got {precision!r}.")
    tokens = (
        None if isinstance(chunk, str) and chunk == "auto" else canonical_int("chunk", chunk, 1, 'an int or "auto"')
    )
    auxiliary = canonical_bool("return_aux", return_aux)
    how = How(int(w_layout == "dv"), tokens, accumulated, precision, static_axis_name(axis_name), auxiliary)
    ignored = None if ignore_index is None else canonical_int("ignore_index", ignore_index)
    x, w, labels = require_array("x", x), require_array("w", w), require_labels("labels", labels)
    bias, where, token_weight = (
        optional_array(name, a) for name, a in (("bias", bias), ("where", where), ("token_weight", token_weight))
    )
    return _of_any(how, reduction, ignored, x, w, labels, bias, where, token_weight, options)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _of_any(
    how: How,
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
    x, w = as_float("x", x), as_float("w", w)
    features, vocabulary = (w.shape if how.class_axis else w.shape[::-1]) if w.ndim == 2 else (-1, -1)
    if x.ndim == 0 or x.shape[-1] != features:
        wanted = "(D, V)" if how.class_axis else "(V, D)"
        raise ValueError(f"x must have shape (..., D) and w {wanted}, got {x.shape} and {w.shape}.")
    if x.dtype != w.dtype:
        raise TypeError(f"x and w must have one dtype, got {x.dtype} and {w.dtype}: cast the one you mean to.")
    if how.chunk != 1 and not all(isinstance(d, int) for d in (*x.shape[:-1], *(() if how.chunk else w.shape))):
        raise ValueError(
            f"chunk must be 1 where shapes are symbolic, got {how.chunk or 'auto'!r} with {x.shape} and {w.shape}."
        )
    shape = x.shape[:-1]
    labels = integer_labels(labels, shape, "x without its last axis")
    dtype = wider(how.accum_dtype, x.dtype)
    if bias is not None:
        bias = as_float("bias", bias)
        if bias.shape != (vocabulary,):
            raise ValueError(f"bias must have shape ({vocabulary},), got {bias.shape}.")
    live = jnp.ones(shape, bool) if where is None else canonical_mask(where, shape, "labels")
    if ignore_index is not None:
        live &= not_ignored(labels, ignore_index)
    weight = jnp.ones(shape, dtype)
    if token_weight is not None:
        weight = broadcast("token_weight", token_weight, shape, "labels").astype(dtype)
    options = options.in_dtype(dtype)._replace(class_weight=options.weights(vocabulary, dtype))
    return _on_mesh(how, reduction, x, w, (labels, live, weight), bias, options)


def _on_mesh(how: How, reduction: str, x: Array, w: Array, tokens: Any, bias: Array | None, options: Options) -> Any:
    """The loss; where the axes of the arrays' mesh are explicit, of each device's part, and then of all."""
    sharding = jax.typeof(x).sharding
    split = _names(jax.typeof(w).sharding.spec[how.class_axis])
    # A mesh axis that splits the classes cannot split the tokens too.
    batch = [tuple(name for name in _names(entry) if name not in split) for entry in sharding.spec[:-1]]
    names = tuple(name for entry in batch for name in entry)
    by_hand = AxisType.Manual in (sharding.mesh.axis_types or ())
    if by_hand or how.axis_name is not None or not (split or names):
        # What else may be divided, as the features, each device needs whole. And so it needs everything where it is in
        # a `shard_map` over other axes: of one in another JAX cannot compile the derivative.
        return _loss(how, reduction, *jax.tree.map(_undivided, (x, w, tokens, bias, options)))
    mesh = sharding.mesh if names else jax.typeof(w).sharding.mesh
    by_class, by_token = P(split or None), P(*(entry or None for entry in batch))
    of_options = Options(P(), P(), P(), P(), class_weight=by_class)
    of_w = P(None, *by_class) if how.class_axis else P(*by_class, None)
    specs = (P(*by_token, None), of_w, by_token, by_class, of_options)
    here = how._replace(axis_name=split or None, batch=names)
    out = P() if reduction != "none" else by_token
    of_device = jax.shard_map(
        functools.partial(_loss, here, reduction),
        mesh=mesh,
        in_specs=specs,
        out_specs=(out, cast(Any, Auxiliary)(by_token, by_token, by_token, by_token, P())) if how.extras else out,
    )
    arguments = (x, w, tokens, bias, options)
    placed = jax.tree.map(
        lambda a, spec: jax.sharding.reshard(a, NamedSharding(mesh, spec)),
        arguments,
        jax.tree.broadcast(specs, arguments),
    )
    return of_device(*placed)


def _undivided(a: Array) -> Array:
    sharding = jax.typeof(a).sharding
    return jax.sharding.reshard(a, NamedSharding(sharding.mesh, P())) if any(sharding.spec) else a


def _names(entry: Any) -> tuple[Any, ...]:
    """The mesh axes of one entry of a partition."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _loss(how: How, reduction: str, x: Array, w: Array, tokens: Any, bias: Array | None, options: Options) -> Any:
    # What differs between devices, by hand, makes each token's loss differ, and so the cotangent of its weight. But not
    # a part of the classes: over these it is summed.
    axes = frozenset[Any]().union(*map(varying, jax.tree.leaves((x, w, tokens, bias, options))))
    labels, live, weight = (vary(a, axes - {*_names(how.axis_name)}) for a in tokens)
    shape, dtype = labels.shape, weight.dtype
    labels, live, weight = labels.ravel(), live.ravel(), weight.ravel()
    y, exists = label_index(labels, w.shape[how.class_axis], how.axis_name)
    # As a factor nan reaches the gradient too.
    weight = jnp.where(live, jnp.where(exists, weight, jnp.nan), 0)
    given = Operands(x.reshape(labels.size, x.shape[-1]), w, bias, options), Tokens(y, live)
    loss: Any
    rows: Any
    if reduction == "none":
        rows, _ = sweep(how, lax.stop_gradient(given[0]), given[1])
    else:
        share = jnp.ones((), dtype)
        if reduction == "mean":
            by_class = at_index(options.class_weight, y, how.axis_name)
            total = how.over_batch(jnp.sum(weight if by_class is None else jnp.where(live, weight * by_class, 0)))
            share = jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
        # The cotangents of the logits divided by the number of tokens could vanish in float16.
        late, early = (share, 1) if x.dtype == jnp.float16 else (1, share)
        loss, rows = weighted_total(how, *given, early * weight)
        loss = late * how.over_batch(loss)
    if reduction == "none" or how.extras:
        rows = attached(how, *given, rows._replace(predicted=None))._replace(predicted=rows.predicted)
    if reduction == "none":
        loss = weighted(rows.loss, weight).reshape(shape)
    if not how.extras:
        return loss
    number = jnp.where(live, rows.predicted, -1)
    fields = (rows.lse, rows.entropy, number, live & exists & (number == labels))
    lse, entropy, predicted, correct = (a.reshape(shape) for a in fields)
    return loss, Auxiliary(lse, entropy, predicted, correct, how.over_batch(jnp.sum(live)))
