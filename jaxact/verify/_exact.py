"""A program of JAX evaluated in mpmath, with as many digits as it takes to differentiate it by differences exactly."""

import functools
import importlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

# What moves numbers about and does nothing to them: done to their positions, by the primitive itself.
_MOVES = {
    "broadcast_in_dim",
    "reshape",
    "squeeze",
    "expand_dims",
    "transpose",
    "rev",
    "slice",
    "gather",
    "dynamic_slice",
}
_IDENTITIES = {"stop_gradient", "copy", "copy_p", "reduce_precision", "optimization_barrier", "pvary"}
# Reductions by a NumPy function and what an empty one gives; cumulative ones.
_REDUCTIONS: dict[str, tuple[Any, Any]] = {
    "reduce_sum": (np.add, 0),
    "reduce_prod": (np.multiply, 1),
    "reduce_and": (np.logical_and, True),
    "reduce_or": (np.logical_or, False),
}
_CUMULATIVE: dict[str, Any] = {"cumsum": np.add, "cumprod": np.multiply}
_STEPS = 256  # of a loop of unknown length; each takes as long as thousands in float64
_LARGE = 10**7  # beyond this an exponential is infinite, or 0


class NotSupported(Exception):
    """The program has an operation that is not here."""


def evaluate(closed: Any, args: Sequence[np.ndarray], digits: int) -> list[np.ndarray]:
    """The outputs of a jaxpr for arrays of mpmath numbers (or of integers and bools)."""
    mpmath = importlib.import_module("mpmath")
    with mpmath.workdps(digits), np.errstate(all="ignore"):
        return _run(closed.jaxpr, closed.consts, args, _operations(mpmath))


def numbers(x: np.ndarray) -> np.ndarray:
    """A float array as an object array of mpmath numbers; others as they are."""
    if np.issubdtype(x.dtype, np.integer) or x.dtype == bool:
        return x
    if np.issubdtype(x.dtype, np.complexfloating):
        raise NotSupported("complex numbers")
    mpmath = importlib.import_module("mpmath")
    return _elementwise(lambda a: mpmath.mpf(float(a)), 1)(np.asarray(x, np.float64))


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], table: dict[str, Callable[..., Any]]) -> list[Any]:
    values = dict(zip(jaxpr.invars, args, strict=True))
    values.update(zip(jaxpr.constvars, [numbers(np.asarray(c)) for c in consts], strict=True))

    def read(v: Any) -> Any:
        return numbers(np.asarray(v.val)) if isinstance(v, Literal) else values[v]

    for equation in jaxpr.eqns:
        outputs = _step(equation, [read(v) for v in equation.invars], table)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _step(equation: Any, inputs: list[Any], table: dict[str, Callable[..., Any]]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    called = next((params[k] for k in ("call_jaxpr", "fun_jaxpr", "call", "jaxpr") if k in params), None)
    run = functools.partial(_call, table=table)
    if name == "scan":
        return _scan(equation, inputs, run)
    if name == "while":
        c, b = params["cond_nconsts"], params["body_nconsts"]
        for_cond, for_body, carry = inputs[:c], inputs[c : c + b], inputs[c + b :]
        for _ in range(_STEPS):
            if not bool(run(params["cond_jaxpr"], [*for_cond, *carry])[0]):
                return carry
            carry = run(params["body_jaxpr"], [*for_body, *carry])
        raise NotSupported(f"a loop of more than {_STEPS} steps")
    if name == "cond":
        return run(params["branches"][int(np.clip(int(inputs[0]), 0, len(params["branches"]) - 1))], inputs[1:])
    if name == "platform_index":
        return [np.asarray(0)]
    if called is not None:
        return run(called, inputs)
    if name in _IDENTITIES:
        return inputs
    if name in _MOVES:
        return [_moved(equation, inputs)]
    if name in table:
        result, dtype = np.asarray(table[name](*inputs, **params)), equation.outvars[0].aval.dtype
        # Integers have their width, and are no objects.
        return [result.astype(dtype) if dtype.kind in "biu" else result]
    raise NotSupported(name)


def _call(jaxpr: Any, inputs: list[Any], table: Any) -> list[Any]:
    return _run(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()), inputs, table)


def _scan(equation: Any, inputs: list[Any], run: Any) -> list[Any]:
    # How many inputs are constants and how many are carried is read off the shapes: what is scanned has one axis more.
    params, body = equation.params, getattr(equation.params["jaxpr"], "jaxpr", equation.params["jaxpr"])
    k = sum(v.aval.ndim == w.aval.ndim for v, w in zip(equation.outvars, body.outvars, strict=True))
    c = sum(v.aval.ndim == w.aval.ndim for v, w in zip(equation.invars, body.invars, strict=True)) - k
    consts, carry, xs = inputs[:c], inputs[c : c + k], inputs[c + k :]
    steps = range(params["length"])
    stacked: list[Any] = []
    for i in reversed(steps) if params["reverse"] else steps:
        out = run(params["jaxpr"], [*consts, *carry, *(x[i] for x in xs)])
        carry = out[:k]
        stacked.append(out[k:])
    if params["reverse"]:
        stacked.reverse()
    return [*carry, *(np.stack([np.asarray(s[j]) for s in stacked]) for j in range(len(stacked[0]) if stacked else 0))]


def _moved(equation: Any, inputs: list[Any]) -> np.ndarray:
    positions = np.arange(inputs[0].size, dtype=np.int32).reshape(inputs[0].shape)
    params = dict(equation.params)
    if equation.primitive.name == "gather":
        params["fill_value"] = -1
    moved = np.asarray(equation.primitive.bind(positions, *[np.asarray(i) for i in inputs[1:]], **params))
    if (moved < 0).any():
        raise NotSupported("gather out of bounds")
    return np.asarray(np.asarray(inputs[0]).ravel()[moved])  # also of a single number


def _elementwise(f: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`f` over object arrays; a single number as an array of no dimensions."""
    ufunc = np.frompyfunc(f, count, 1)
    return lambda *arrays, **_: np.asarray(ufunc(*arrays))


def _operations(mp: Any) -> dict[str, Callable[..., Any]]:
    """The primitives that compute, by name."""
    nan, inf = mp.nan, mp.inf

    def real(f: Any) -> Any:
        def guarded(*args: Any) -> Any:
            if any(isinstance(a, mp.mpf) and mp.isnan(a) for a in args):
                return nan
            try:
                y = f(*args)
            except (ZeroDivisionError, ValueError):
                return nan
            return nan if isinstance(y, mp.mpc) else y

        return guarded

    def divide(a: Any, b: Any) -> Any:
        if not isinstance(a, mp.mpf):
            return int(a / b)
        return a / b if b != 0 else (nan if a == 0 else mp.sign(a) * inf)

    def exponential(f: Any, low: int) -> Any:
        return lambda x: mp.mpf(low) if x < -_LARGE else inf if x > _LARGE else f(x)

    elementary = ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erf", "erfc")
    unary = {name: getattr(mp, name) for name in elementary} | {
        "exp": exponential(mp.exp, 0),
        "exp2": exponential(lambda x: mp.mpf(2) ** x, 0),
        "expm1": exponential(mp.expm1, -1),
        "log": lambda x: -inf if x == 0 else mp.log(x),
        "log1p": lambda x: -inf if x == -1 else mp.log1p(x),
        "logistic": lambda x: 1 / (1 + mp.exp(-x)) if abs(x) < _LARGE else mp.mpf(x > 0),
        "tanh": lambda x: mp.tanh(x) if abs(x) < _LARGE else mp.sign(x),
        "sqrt": mp.sqrt,
        "rsqrt": lambda x: 1 / mp.sqrt(x),
        "cbrt": lambda x: mp.sign(x) * mp.cbrt(abs(x)),
        "neg": lambda x: -x,
        "sign": mp.sign,
        "abs": abs,
        "square": lambda x: x * x,
        "floor": lambda x: x if mp.isinf(x) else mp.floor(x),
        "ceil": lambda x: x if mp.isinf(x) else mp.ceil(x),
        "lgamma": lambda x: mp.re(mp.loggamma(x)),
        "digamma": mp.digamma,
    }
    binary = {
        "add": operator.add,
        "add_any": operator.add,
        "sub": operator.sub,
        "mul": operator.mul,
        "div": divide,
        "max": max,
        "min": min,
        "pow": mp.power,
        "atan2": mp.atan2,
        "rem": lambda a, b: mp.sign(a) * (abs(a) % abs(b)),
    }
    compare = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    logic = {"and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert}

    def ignoring_parameters(f: Any) -> Any:
        return lambda *arrays, **_: f(*arrays)

    table: dict[str, Any] = {name: _elementwise(real(f), 1) for name, f in unary.items()}
    table |= {name: _elementwise(real(f), 2) for name, f in binary.items()}
    table |= {name: lambda a, b, f=f, **_: np.asarray(f(a, b), bool) for name, f in compare.items()}
    table |= {name: ignoring_parameters(f) for name, f in logic.items()}
    table |= {
        name: lambda a, axes, u=ufunc, start=start, **_: _reduce(u, start, a, axes)
        for name, (ufunc, start) in _REDUCTIONS.items()
    }
    table |= {
        name: lambda a, axis, reverse, u=u, **_: _accumulate(u, a, axis, reverse) for name, u in _CUMULATIVE.items()
    }
    return table | {
        "reduce_max": lambda a, axes, **_: _fold(table["max"], -inf, a, axes),
        "reduce_min": lambda a, axes, **_: _fold(table["min"], inf, a, axes),
        "is_finite": lambda a, **_: np.asarray(np.frompyfunc(mp.isfinite, 1, 1)(a), bool),
        "integer_pow": lambda a, y, **_: _elementwise(real(lambda x: divide(mp.mpf(1), x**-y) if y < 0 else x**y), 1)(
            a
        ),
        "select_n": _select,
        "clamp": lambda low, x, high, **_: table["max"](low, table["min"](x, high)),
        "convert_element_type": _convert,
        "concatenate": lambda *parts, dimension, **_: np.concatenate(parts, dimension),
        "iota": lambda *, dtype, shape, dimension, **_: numbers(
            np.indices(shape, sparse=True)[dimension].astype(dtype) + np.zeros(shape, dtype)
        ),
        "dot_general": _dot,
        "argmax": lambda a, axes, **_: np.argmax(a, axes[0]),
        "argmin": lambda a, axes, **_: np.argmin(a, axes[0]),
    }


def _select(which: np.ndarray, *cases: np.ndarray, **_: Any) -> np.ndarray:
    if not cases[0].ndim:
        return cases[int(which)]
    which = np.broadcast_to(which.astype(int), cases[0].shape)
    return np.where(which == 0, cases[0], cases[1]) if len(cases) == 2 else np.choose(which, cases)


def _accumulate(ufunc: Any, a: np.ndarray, axis: int, reverse: bool) -> np.ndarray:
    return np.flip(ufunc.accumulate(np.flip(a, axis), axis), axis) if reverse else ufunc.accumulate(a, axis)


def _convert(a: np.ndarray, new_dtype: Any, **_: Any) -> np.ndarray:
    if np.issubdtype(new_dtype, np.integer) or new_dtype == np.bool_:
        return a.astype(float).astype(new_dtype) if a.dtype == object else a.astype(new_dtype)
    return a if a.dtype == object else numbers(a.astype(np.float64))


def _reduce(ufunc: Any, start: Any, a: np.ndarray, axes: Any) -> Any:
    return (
        ufunc.reduce(a, axis=tuple(axes), initial=start)
        if a.size
        else np.full(np.delete(a.shape, axes), start, a.dtype)
    )


def _fold(pick: Any, start: Any, a: np.ndarray, axes: Any) -> Any:
    rest = [i for i in range(a.ndim) if i not in axes]
    moved = a.transpose([*axes, *rest]).reshape(-1, *[a.shape[i] for i in rest])
    return functools.reduce(pick, moved, np.full(moved.shape[1:], start, object))


def _dot(a: np.ndarray, b: np.ndarray, dimension_numbers: Any, **_: Any) -> np.ndarray:
    (contract_a, contract_b), (batch_a, batch_b) = dimension_numbers
    free_a = [i for i in range(a.ndim) if i not in (*contract_a, *batch_a)]
    free_b = [i for i in range(b.ndim) if i not in (*contract_b, *batch_b)]
    shape = [a.shape[i] for i in (*batch_a, *free_a)] + [b.shape[i] for i in free_b]
    batch = int(np.prod([a.shape[i] for i in batch_a]))
    inner = int(np.prod([a.shape[i] for i in contract_a]))
    left = a.transpose([*batch_a, *free_a, *contract_a]).reshape(batch, -1, inner)
    right = b.transpose([*batch_b, *contract_b, *free_b]).reshape(batch, inner, -1)
    return np.stack([x @ y for x, y in zip(left, right, strict=True)]).reshape(shape)


def work(jaxpr: Any) -> int:
    """The number of operations on single numbers that evaluating a jaxpr takes, roughly."""
    total = 0
    for equation in jaxpr.eqns:
        inner = jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns"))
        inner = [getattr(p, "jaxpr", p) for p in inner if hasattr(p, "eqns")]
        if inner:
            total += equation.params.get("length", 32 if equation.primitive.name == "while" else 1) * max(
                map(work, inner)
            )
        elif equation.primitive.name not in _MOVES | _IDENTITIES:
            sizes = [v.aval.size for v in (*equation.invars, *equation.outvars)]
            total += max(sizes) if equation.primitive.name != "dot_general" else int(np.prod(sizes, dtype=float) ** 0.5)
    return total
