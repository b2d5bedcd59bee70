"""What `bench` measures with: calls in turns, the memory of compiled programs, and the cost of importing and compiling.

A ratio is the median over rounds of one call's time over another's in the same round, so that what slows the machine
down for a while slows both. Its spread is half the distance between the quartiles, relative to it.
"""

import functools
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxact import verify
from jaxact._cli._bench_subjects import SUBJECTS, Shape, Subject

ROUNDS = (5, 400)  # at least and at most
LEAST = 3e-4  # seconds of one measurement: shorter calls are repeated
UNCERTAIN = 0.1  # a spread from which a ratio means little


class Ratio(NamedTuple):
    ratio: float
    spread: float


class Cell(NamedTuple):
    """One function at one shape: ratios to the peer's time and to the limit's, and what else it costs."""

    function: str
    peer: str
    dtype: str
    shape: Shape
    mode: str  # "jit" or "eager"
    what: str  # "value" or "value+gradient"
    seconds: float
    of_peer: Ratio
    of_limit: Ratio | None  # None where dispatching outweighs the bytes
    compiling: float | None  # the ratio to the peer
    temporary: tuple[int, int] | None  # bytes, ours and the peer's
    kept: tuple[int, int] | None  # of what reverse mode keeps


def cells(name: str, dtype: str, shape: Shape, seconds: float) -> list[Cell]:
    """The cells of one function at one shape, each in about the given time."""
    subject = SUBJECTS[name]
    arguments = subject.arguments(shape, dtype)
    size = sum(a.nbytes for a in arguments)
    found = []
    for what, of in (("value", _value), ("value+gradient", _with_gradient)):
        given = arguments if of is _value else (_cotangent(subject, arguments), *arguments)
        compiled = {}
        compiling = {}
        for who, f in (("ours", subject.ours), ("peer", subject.peer)):
            start = time.perf_counter()
            compiled[who] = jax.jit(of(f)).lower(*given).compile()
            compiling[who] = time.perf_counter() - start
        limit = functools.partial(*_limit(subject, what, given, jax.eval_shape(of(subject.ours), *given)))
        calls = {who: functools.partial(c, *given) for who, c in compiled.items()} | {"limit": limit}
        times = in_turns(calls, seconds)
        cell = functools.partial(Cell, name, subject.peer_name, dtype, shape)
        memory = kept = None
        if of is _with_gradient:
            memory = _both(lambda c: c.memory_analysis().temp_size_in_bytes, compiled["ours"], compiled["peer"])
            kept = _both(lambda f: verify.residuals(f, *arguments).facts["bytes"], subject.ours, subject.peer)
        found.append(
            cell(
                "jit",
                what,
                float(np.median(times["ours"])),
                ratio(times["ours"], times["peer"]),
                ratio(times["ours"], times["limit"]) if size >= 2**16 else None,
                compiling["ours"] / compiling["peer"],
                memory,
                kept,
            )
        )
        if size < 2**10:
            eager = {
                who: functools.partial(of(f), *given) for who, f in (("ours", subject.ours), ("peer", subject.peer))
            }
            times = in_turns(eager, seconds)
            median = float(np.median(times["ours"]))
            found.append(cell("eager", what, median, ratio(times["ours"], times["peer"]), None, None, None, None))
    return found


def _both(measure: Callable[[Any], int], ours: Any, peer: Any) -> tuple[int, int]:
    return measure(ours), measure(peer)


def _value(f: Callable[..., Any]) -> Callable[..., Any]:
    return f


def _with_gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    """The value and the cotangents of the floats among the arguments, for a cotangent of the value given first."""

    def run(g: Array, *arguments: Array) -> Any:
        floats = [i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating)]

        def of_floats(*values: Array) -> Array:
            whole = list(arguments)
            for i, value in zip(floats, values, strict=True):
                whole[i] = value
            return f(*whole)

        value, pull = jax.vjp(of_floats, *(arguments[i] for i in floats))
        return value, pull(g.astype(value.dtype))

    return run


def _cotangent(subject: Subject, arguments: tuple[Array, ...]) -> Array:
    value = jax.eval_shape(subject.ours, *arguments)
    return jnp.asarray(np.random.default_rng(2).normal(size=value.shape), value.dtype)


def _limit(subject: Subject, what: str, given: tuple[Array, ...], results: Any) -> tuple[Any, ...]:
    """A call that takes as long as is possible at best."""
    if subject.limit is not None:
        x, w, labels = given[-3:]
        whole = jax.jit(subject.limit) if what != "value" else jax.jit(lambda x, w, labels: x @ w)
        return whole, x, w, labels
    # Half of the bytes that are read and written, read and written.
    size = (sum(a.nbytes for a in given) + sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(results))) // 8
    return jax.jit(jnp.negative), jnp.zeros(max(size, 1), jnp.float32)


def in_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, np.ndarray]:
    """The time of each call in each round, in seconds, for about so long."""
    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        repeats[name] = max(1, round(LEAST / max(_time(call, 1), 1e-7)))
    begin, rounds = time.perf_counter(), []
    while len(rounds) < ROUNDS[0] or (len(rounds) < ROUNDS[1] and time.perf_counter() - begin < seconds):
        # Who comes first changes, since what a call leaves in the cache is of use to the next.
        order = list(calls) if len(rounds) % 2 else list(calls)[::-1]
        times = {name: _time(calls[name], repeats[name]) for name in order}
        rounds.append([times[name] for name in calls])
    return dict(zip(calls, np.array(rounds).T, strict=True))


def _time(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def ratio(ours: np.ndarray, theirs: np.ndarray) -> Ratio:
    low, middle, high = np.percentile(ours / theirs, [25, 50, 75])
    return Ratio(float(middle), float((high - low) / 2 / middle))


def importing(repeats: int) -> float:
    """What `import jaxact` adds to `import jax`, in seconds: the median difference of new processes, in turns."""
    program = "import time, jax; start = time.perf_counter(); import jaxact; print(time.perf_counter() - start)"
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, check=True) for _ in range(repeats)]
    return float(np.median([float(run.stdout) for run in runs]))


def seconds_of(name: str, shape: Shape, seconds: float) -> float:
    """The time of value and gradient in float32, to compare between processes with more and fewer cores."""
    subject = SUBJECTS[name]
    arguments = subject.arguments(shape, "float32")
    call = functools.partial(jax.jit(_with_gradient(subject.ours)), _cotangent(subject, arguments), *arguments)
    return float(np.median(in_turns({"ours": call}, seconds)["ours"]))
