"""`values`: how far a function's values are off, over every input of a 16-bit type, or over any inputs."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxact.verify._jacobian import call
from jaxact.verify._report import INCONCLUSIVE, REFUTED, VERIFIED, Check, Report, as_code, name_of

BLOCK = 2**16  # inputs at a time: their float64 temporaries stay in the cache, and are not given back to the system
BINS = [0.5, 1, 2, 4, 8, 16]  # of the histogram: errors up to so many ulp
PER_OCTAVE, LOW, HIGH = 64, -32 * 64, 64 * 64  # what is counted while it runs: errors by their logarithm


def values(
    f: Callable[[Any], Any],
    reference: Callable[[Any], Any],
    *,
    dtype: Any,
    points: Any = None,
    bound: float = 1.0,
    progress: bool = False,
) -> Report:
    """Measures the error of an elementwise function in ulp, at every input of a 16-bit dtype or at the given ones.

    Args:
        f: a function of one array, element by element.
        reference: the same in float64 NumPy, or in mpmath for one number.
        dtype: float16, bfloat16, float32 or float64, of the inputs and the result.
        points: an array of inputs; "all" for every input of the dtype, 2³² of float32 in blocks; None for "all" of
            a 16-bit dtype.
        bound: refute if an error is larger, in ulp: units of the spacing of `dtype` at the exact result.
        progress: print a progress bar to stderr.

    Returns:
        A `Report` with the largest, the mean and the 99.9 % error, the worst input, counts for each region and a
        histogram in `facts`. Results below the smallest normal number are right if they are below it too, since XLA
        flushes them to 0, but not in float16, where it does not; nan must meet nan, and an infinity the same infinity.

    Raises:
        TypeError: if `dtype` is not a float type.
        ValueError: if `points` is None for more than 16 bits, or another string than "all", or `bound` is negative.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxact
        >>> from jaxact import verify
        >>> report = verify.values(jaxact.softplus, lambda x: np.logaddexp(x, 0), dtype=jnp.bfloat16, bound=0.51)
        >>> report.verdict, report.facts["inputs"]
        ('verified', 65536)
    """
    dtype = np.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a float type, got {dtype}.")
    if not 0 <= bound < math.inf:
        raise ValueError(f"bound must be finite and not negative, got {bound}.")
    if isinstance(points, str) and points != "all":
        raise ValueError(f'points must be an array or "all", got {points!r}.')
    if points is None and dtype.itemsize > 2:
        raise ValueError(f'points must be an array or "all" for {dtype}: only 16-bit types are visited by default.')
    everything = points is None or (isinstance(points, str) and points == "all")
    if everything and dtype.itemsize > 4:
        raise ValueError(f"{dtype} has too many values to visit: points must be an array.")
    total = 2 ** (8 * dtype.itemsize) if everything else np.size(points)
    blocks = _all(dtype) if everything else _given(np.asarray(points).astype(dtype).ravel())
    statistics = _Statistics(f, reference, dtype)
    for done, block in enumerate(_in_two_threads(statistics.of_block, blocks), start=1):
        statistics.add(*block)
        if progress:
            _show(done * BLOCK / max(total, 1), statistics.worst)
    return statistics.report(name_of(f), bound)


def _in_two_threads(f: Callable[[Any], Any], blocks: Iterator[Any]) -> Iterator[Any]:
    """`map(f, blocks)`, a few blocks ahead; the executor's own `map` would ask for all of them at once."""
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(2) as pool:  # NumPy and XLA release the interpreter's lock
        for block in blocks:
            pending.append(pool.submit(f, block))
            if len(pending) > 4:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _all(dtype: np.dtype) -> Iterator[np.ndarray]:
    count = 2 ** (8 * dtype.itemsize)
    for start in range(0, count, BLOCK):
        yield np.arange(start, min(start + BLOCK, count), dtype=np.int64).astype(f"u{dtype.itemsize}").view(dtype)


def _given(points: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, max(len(points), 1), BLOCK):
        yield points[start : start + BLOCK]


class _Statistics:
    """Errors so far."""

    def __init__(self, f: Any, reference: Any, dtype: np.dtype):
        self.f, self.reference, self.dtype = jax.jit(f), reference, dtype
        self.worst, self.sum = -1.0, 0.0
        self.at: dict[str, float] = {}
        self.regions = {"normal": 0, "below normal": 0, "special": 0}
        self.counts = np.zeros(HIGH - LOW + 1, int)  # of errors in (2^((k−1)/64), 2^(k/64)] ulp
        self.infinite = 0

    def of_block(self, x: np.ndarray) -> Any:
        with jax.enable_x64(self.dtype.itemsize > 4):  # here: the setting belongs to a thread
            got = np.asarray(self.f(x))
        if got.dtype != self.dtype or got.shape != x.shape:
            raise TypeError(f"f must be elementwise and keep the dtype {self.dtype}, got {got.dtype}{list(got.shape)}.")
        with np.errstate(all="ignore"):
            want = np.asarray(call(self.reference, (x.astype(np.float64),)), np.float64)
        if want.shape != x.shape:
            raise TypeError(f"reference must be elementwise, got {list(want.shape)} of an array of {list(x.shape)}.")
        error, region = ulp_errors(got, want, self.dtype)
        return x, got, want, error, region

    def add(self, x: Any, got: Any, want: Any, error: Any, region: Any) -> None:
        if not len(x):
            return
        i = int(np.argmax(error))
        if error[i] > self.worst:
            self.worst, self.at = (
                float(error[i]),
                {"input": float(x[i]), "got": float(got[i]), "expected": float(want[i])},
            )
        for name, number in zip(self.regions, np.bincount(region, minlength=3), strict=True):
            self.regions[name] += int(number)
        finite = error if error[i] < np.inf else error[error < np.inf]
        self.infinite += len(error) - len(finite)
        self.sum += float(finite.sum())
        with np.errstate(divide="ignore"):
            octaves = np.log2(finite.astype(np.float32))
        place = np.clip(np.ceil(octaves * PER_OCTAVE), LOW, HIGH).astype(int) - LOW
        self.counts += np.bincount(place, minlength=HIGH - LOW + 1)

    def report(self, name: str, bound: float) -> Report:
        count = sum(self.regions.values())
        below = np.cumsum(self.counts)
        place = int(np.searchsorted(below, 0.999 * count))
        quantile = 2.0 ** ((place + LOW) / PER_OCTAVE) if 0 < place < len(below) else math.inf if place else 0.0
        upto = [int(below[int(np.log2(b) * PER_OCTAVE) - LOW]) for b in BINS]
        numbers = np.diff([0, *upto, count]).tolist()
        histogram = dict(zip([f"≤ {b:g} ulp" for b in BINS] + ["more"], numbers, strict=True))
        facts = {
            "inputs": count,
            "max ulp": self.worst,
            "mean ulp": self.sum / max(1, count - self.infinite),
            "99.9 % ulp": min(float(quantile), self.worst),  # of a bin the upper end is counted
            "worst": self.at,
            "regions": self.regions,
            "histogram": histogram,
            "bound": f"{bound:g} ulp ({self.dtype})",
        }
        if not count:
            return Report(name, INCONCLUSIVE, reasons=("there is no input to check",), facts=facts)
        detail = f"max {self.worst:.4g}, mean {facts['mean ulp']:.3g} ulp over {count} inputs"
        if self.worst <= bound:
            return Report(name, VERIFIED, (Check("values", VERIFIED, detail),), facts=facts)
        x, got, exact = (self.at[k] for k in ("input", "got", "expected"))
        reason = f"at x = {x!r} f is {got:.9g} where {exact:.9g} is exact: {self.worst:.4g} ulp"
        call = f"jax.jit(f)(jnp.array({as_code(x)}, jnp.{self.dtype.name}))  # {got:.9g}, should be {exact:.9g}"
        witness = f"import jax, jax.numpy as jnp\n{call}"
        return Report(name, REFUTED, (Check("values", REFUTED, detail),), (reason,), facts, witness)


def ulp_errors(got: np.ndarray, want: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """|got − want| in spacings of the dtype at `want`, and the region of `want`: 0 normal, 1 below, 2 special."""
    info = ml_dtypes.finfo(dtype)
    with np.errstate(all="ignore"):
        got = got.astype(np.float64)
        # The exponent's bits give it sooner than `frexp`. In float64 one over the spacing may be too large a number.
        exponent = np.clip(((want.view(np.int64) >> 52) & 0x7FF) - 1023, info.minexp, 1023)
        error = np.ldexp(np.abs(got - want), (info.nmant - exponent).astype(np.int32))
        size = np.abs(want)
        outside = ~((size >= float(info.smallest_normal)) & (size <= float(info.max)) & (error < np.inf))
        region = np.zeros(want.shape, np.int8)
        if outside.any():
            error[outside], region[outside] = _outside(got[outside], want[outside], error[outside], info, dtype)
    return error, region


def _outside(got: np.ndarray, want: np.ndarray, error: np.ndarray, info: Any, dtype: Any) -> tuple[Any, Any]:
    """The same where the exact result is not a normal number, or nan has come."""
    tiny, size = float(info.smallest_normal), np.abs(want)
    subnormal, special = size < tiny, ~(size <= float(info.max))
    rounded = want.astype(dtype).astype(np.float64)
    flushed = subnormal & (dtype != np.float16)
    same = (got == rounded) | (np.isnan(got) & np.isnan(want)) | (flushed & (np.abs(got) <= tiny))
    error = np.where(same, 0.0, np.where(flushed | special | ~(error < np.inf), np.inf, error))
    return error, np.where(special, 2, np.where(subnormal, 1, 0))


def _show(done: float, worst: float) -> None:
    filled = int(30 * min(done, 1.0))
    end = "\n" if done >= 1 else ""
    sys.stderr.write(f"\r[{'#' * filled}{'.' * (30 - filled)}] {min(done, 1.0):4.0%}  max {worst:.3f} ulp{end}")
    sys.stderr.flush()
