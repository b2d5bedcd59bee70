"""What `bench` measures with: calls in turns, the memory of compiled programs, and the cost of importing and compiling.

A ratio is the median over rounds of one call's time over another's in the same round, so that what slows the machine
down for a while slows both. Its spread is half the distance between the quartiles, relative to it.
"""

import contextlib
import functools
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxact import verify
from jaxact._cli._bench_subjects import SUBJECTS, Shape, Subject

ROUNDS = (5, 400)  # at least and at most
LEAST = 3e-4  # seconds of one measurement: shorter calls are repeated
UNCERTAIN = 0.1  # a spread above which a ratio means little
SMALL, LARGE = 2**10, 2**16  # bytes of the arguments: eager calls up to, the limit and the summary from
LENGTHY = 0.2  # seconds of compiling
BOTH = ("ours", "peer")


Calls = dict[str, Callable[[], Any]]


class Ratio(NamedTuple):
    ratio: float
    spread: float

    @property
    def certain(self) -> bool:
        return self.spread <= UNCERTAIN


class Cell(NamedTuple):
    """One function at one shape, beside its peer and the limit, and what it costs. Pairs are ours and the peer's."""

    function: str
    peer: str
    dtype: str
    shape: Shape
    bytes: int  # of the arguments
    mode: str  # "jit" or "eager"
    what: str  # "value" or "value+gradient"
    seconds: dict[str, float]  # medians, of "ours", the "peer" and the "limit"
    of_peer: Ratio
    of_limit: Ratio | None = None  # None where dispatching outweighs the bytes
    compiling: tuple[float, float] | None = None  # seconds
    temporary: tuple[int, int] | None = None  # bytes
    kept: tuple[int, int] | None = None  # bytes from the forward to the backward pass


def cells(name: str, subject: Subject, dtype: str, shape: Shape, seconds: float) -> list[Cell]:
    """The cells of one function at one shape, in a few times the given time and what compiling takes."""
    arguments = subject.arguments(shape, dtype)
    size = sum(a.nbytes for a in arguments)
    cell = functools.partial(Cell, name, subject.peer_name, dtype, shape, size)
    found = []
    for what, of in (("value", _value), ("value+gradient", _with_gradient)):
        given = arguments if of is _value else (_cotangent(subject, arguments), *arguments)
        compiled, compiling = _compiled(of, subject, given)
        calls: Calls = {who: functools.partial(c, *given) for who, c in compiled.items()}
        if size >= LARGE:
            results = jax.eval_shape(of(subject.ours, subject.count), *given)
            calls["limit"] = _limit(subject, what, given, results)
        times = in_turns(calls, seconds)
        limit = ratio(times["ours"], times["limit"]) if "limit" in times else None
        memory, kept = _temporary(compiled), _kept(subject, arguments) if of is _with_gradient else None
        found.append(cell("jit", what, _medians(times), _of_peer(times), limit, compiling, memory, kept))
        if size < SMALL:
            times = in_turns(
                {who: functools.partial(of(getattr(subject, who), subject.count), *given) for who in BOTH}, seconds
            )
            found.append(cell("eager", what, _medians(times), _of_peer(times)))
    return found


def _medians(times: dict[str, np.ndarray]) -> dict[str, float]:
    return {who: float(np.median(of)) for who, of in times.items()}


def _of_peer(times: dict[str, np.ndarray]) -> Ratio:
    return ratio(times["ours"], times["peer"])


def _temporary(compiled: dict[str, Any]) -> tuple[int, int]:
    ours, peer = (compiled[who].memory_analysis().temp_size_in_bytes for who in BOTH)
    return ours, peer


def _kept(subject: Subject, arguments: tuple[Array, ...]) -> tuple[int, int]:
    def of(f: Callable[..., Any]) -> int:
        rest = arguments[subject.count :]
        return verify.residuals(lambda *first: f(*first, *rest), *arguments[: subject.count]).facts["bytes"]

    return of(subject.ours), of(subject.peer)


def _compiled(of: Callable[..., Any], subject: Subject, given: tuple[Array, ...]) -> tuple[dict[str, Any], Any]:
    """Both compiled, and the seconds it took from the first trace on."""
    compiled: dict[str, Any] = {}
    times = dict.fromkeys(BOTH, math.inf)
    for who in (*BOTH, *BOTH[::-1]):
        # The smaller of two times, in turns; a long one varies less, relatively, and is too long to repeat.
        if LENGTHY < times[who] < math.inf:
            continue
        jax.clear_caches()  # or what one of them has traced would be of use to the other, and to the second time
        start = time.perf_counter()
        compiled[who] = jax.jit(of(getattr(subject, who), subject.count)).lower(*given).compile()
        times[who] = min(times[who], time.perf_counter() - start)
    return compiled, (times["ours"], times["peer"])


def _value(f: Callable[..., Any], count: int) -> Callable[..., Any]:
    return f


def _with_gradient(f: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The value, and the cotangents of the first arguments, for a cotangent of the value given before them."""

    def run(g: Array, *arguments: Array) -> Any:
        value, pull = jax.vjp(lambda *first: f(*first, *arguments[count:]), *arguments[:count])
        return value, pull(g if g.dtype == value.dtype else g.astype(value.dtype))

    return run


def _cotangent(subject: Subject, arguments: tuple[Array, ...]) -> Array:
    value = jax.eval_shape(subject.ours, *arguments)
    return jnp.asarray(np.random.default_rng(2).normal(size=value.shape), value.dtype)


def _limit(subject: Subject, what: str, given: tuple[Array, ...], results: Any) -> Callable[[], Any]:
    """A call that takes as long as is possible at best."""
    if subject.limit is not None:
        x, w, labels = given[-3:]
        whole = jax.jit(subject.limit) if what != "value" else jax.jit(lambda x, w, labels: x @ w)
        return functools.partial(whole, x, w, labels)
    # Half of the bytes that are read and written, read and written.
    size = (sum(a.nbytes for a in given) + sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(results))) // 8
    return functools.partial(jax.jit(jnp.negative), jnp.zeros(size, jnp.float32))


def in_turns(calls: Calls, seconds: float) -> dict[str, np.ndarray]:
    """The time of each call in each round, in seconds, for about so long."""
    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        repeats[name] = max(1, round(LEAST / max(_time(call, 1), 1e-7)))
    # What a call leaves in the caches and in the allocator is of use to the next: each follows each as often.
    orders = list(itertools.permutations(calls))
    np.random.default_rng(0).shuffle(orders)
    begin = time.perf_counter()
    rounds: list[list[float]] = []
    while len(rounds) < ROUNDS[0] or (len(rounds) < ROUNDS[1] and time.perf_counter() - begin < seconds):
        times = {name: _time(calls[name], repeats[name]) for name in orders[len(rounds) % len(orders)]}
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


def importing(repeats: int) -> tuple[float, float]:
    """The seconds of `import jax`, and of `import jaxact` after it: medians over new processes."""
    program = (
        "import sys, time; sys.path[:] = sys.argv[1:]; a = time.perf_counter(); import jax; b = time.perf_counter(); "
        "import jaxact; print(b - a, time.perf_counter() - b)"
    )
    command = [sys.executable, "-c", program, *sys.path]
    runs = [subprocess.run(command, capture_output=True, check=True, text=True).stdout for _ in range(repeats)]
    jax_alone, more = np.median([[float(number) for number in run.split()] for run in runs], axis=0)
    return float(jax_alone), float(more)


def speedup(name: str, shape: Shape, seconds: float) -> float | None:
    """By how much all cores are faster than one, at value and gradient in float32; None where that is not known."""
    threads = Path("/proc/self/task")  # of Linux, where each thread of the process has a number
    if not threads.exists() or len(every := os.sched_getaffinity(0)) == 1:
        return None
    subject = SUBJECTS[name]
    arguments = subject.arguments(shape, "float32")
    compiled = jax.jit(_with_gradient(subject.ours, subject.count))
    call = functools.partial(compiled, _cotangent(subject, arguments), *arguments)

    def on(cores: set[int]) -> Any:
        for thread in threads.iterdir():
            with contextlib.suppress(ProcessLookupError):  # it may have ended
                os.sched_setaffinity(int(thread.name), cores)
        return call()

    try:
        times = in_turns({"one": lambda: on({min(every)}), "every": lambda: on(every)}, seconds)
    finally:
        on(every)
    return ratio(times["one"], times["every"]).ratio
