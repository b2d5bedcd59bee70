"""Jacobians in float64: by autodiff of a program, by exact differences of it in mpmath, or as the user gives them."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxact.verify import _exact
from jaxact.verify._problem import Problem, plain_products, ravel, unravel
from jaxact.verify._report import name_of

FULL = 2**21  # entries up to which a Jacobian is looked at as a whole
WORK = 600_000  # operations in mpmath that a Jacobian may take: a few seconds


class Jacobian(NamedTuple):
    """What products with rows and with columns need; of an elementwise function, its slopes twice."""

    reverse: np.ndarray  # the rows that are known, (rows, n), or slopes (n,)
    forward: np.ndarray  # the columns that are known, one a row, (columns, m), or slopes (n,)

    def map(self, f: Callable[..., np.ndarray], *others: "Jacobian") -> "Jacobian":
        return Jacobian(*(f(*parts) for parts in zip(self, *others, strict=True)))


class Layout(NamedTuple):
    """Which part of the Jacobian is looked at."""

    rows: np.ndarray
    columns: np.ndarray
    whole: bool
    elementwise: bool

    @classmethod
    def diagonal(cls, size: int) -> "Layout":
        return cls(np.arange(size), np.arange(size), True, True)

    def extent(self, problem: Problem) -> str:
        return f"{len(self.rows)} of {problem.m} outputs, {len(self.columns)} of {problem.n} inputs"

    def of_slopes(self, slopes: np.ndarray) -> Jacobian:
        return Jacobian(slopes, slopes)

    def of_matrix(self, matrix: np.ndarray) -> Jacobian:
        return Jacobian(matrix[self.rows], matrix.T[self.columns])


Source = Callable[[np.ndarray], Jacobian]


def products_by_autodiff(
    problem: Problem, f: Any, mode: str, vectors: np.ndarray, x: np.ndarray, signs: np.ndarray | None = None
) -> np.ndarray:
    shapes = problem.vector_shapes(mode)
    with jax.enable_x64(True):
        parts, floats = tuple(unravel(vectors, shapes, np.float64)), problem.leaves(x, np.float64)
        return ravel(problem.compiled(plain_products, f, problem.spec, mode)(floats, problem.others, parts, signs))


def autodiff(problem: Problem, f: Any, layout: Layout, signs: np.ndarray | None = None) -> Source:
    """Autodiff in float64 of what `f` computes, its custom rules left out; with `signs`, rounded otherwise."""

    products = functools.partial(products_by_autodiff, problem, f, signs=signs)

    def at(x: np.ndarray) -> Jacobian:
        if layout.elementwise:
            return layout.of_slopes(products("forward", np.ones((1, problem.n)), x)[0])
        if layout.whole and problem.n > problem.m:
            try:
                return layout.of_matrix(products("reverse", np.eye(problem.m), x))
            except Exception:  # a while loop, say, has no reverse mode
                pass
        if layout.whole:
            return layout.of_matrix(products("forward", np.eye(problem.n), x).T)
        rows, columns = np.zeros((len(layout.rows), problem.m)), np.zeros((len(layout.columns), problem.n))
        rows[np.arange(len(rows)), layout.rows] = 1
        columns[np.arange(len(columns)), layout.columns] = 1
        return Jacobian(products("reverse", rows, x), products("forward", columns, x))

    return at


def exact(
    problem: Problem, f: Any, layout: Layout, fewest: int, find_pattern: Callable[[], np.ndarray | None]
) -> Source | None:
    """Differences in mpmath of what `f` computes: exact, where the program can be evaluated there and is not too long.

    The pattern says which entries may not be 0: columns without a row in common are found at once, in no fewer groups
    than `fewest`. To find it takes long. The source gives nan where the function has a kink or a jump.
    """
    program = _program(problem, f)
    if not layout.elementwise and problem.n**2 > FULL:  # the pattern is found by so many numbers
        return None
    if not layout.whole or program is None or 5 * fewest * _exact.work(program.jaxpr) > WORK:
        return None
    pattern = find_pattern()
    groups = [np.arange(problem.n)] if pattern is None else _independent_columns(pattern)
    if 5 * len(groups) * _exact.work(program.jaxpr) > WORK:
        return None
    digits = _DIGITS[problem.wide]

    def at(x: np.ndarray) -> Jacobian:
        import mpmath

        with mpmath.workdps(digits):
            numbers = _exact.numbers(x)
            widths = np.array([_step(mpmath, a) for a in numbers], object)
            middle = _values(problem, program, numbers, digits)
            matrix = np.zeros((problem.m, problem.n))
            slopes = np.zeros(problem.n)
            for group in groups:
                moved = np.zeros(problem.n, object)
                moved[group] = widths[group]
                half = moved / 2
                steps = [_values(problem, program, numbers + v, digits) - middle for v in (moved, -moved, half, -half)]
                for i in range(problem.m):
                    for j in [i] if pattern is None else group[pattern[i, group]]:
                        rounding = (1 + abs(middle[i])) * mpmath.mpf(10) ** (20 - digits)
                        changes = [step[i] for step in steps]
                        slopes[j] = _slope(mpmath, changes, widths[j], rounding)
                        if pattern is not None:
                            matrix[i, j] = slopes[j]
        return layout.of_slopes(slopes) if pattern is None else layout.of_matrix(matrix)

    try:
        here = at(problem.x)
    except Exception:  # what cannot be evaluated there, or overflows
        return None

    def near(x: np.ndarray) -> Jacobian:
        try:
            return at(x)
        except Exception:  # the other branch of a condition, say
            return here.map(lambda j: np.full_like(j, np.nan))

    return lambda x: here if x is problem.x else near(x)


def exact_value(problem: Problem, f: Any) -> np.ndarray | None:
    """What `f` computes, in mpmath; None where that is not possible."""
    program = _program(problem, f)
    if program is None or _exact.work(program.jaxpr) > WORK:
        return None
    try:
        values = _values(problem, program, _exact.numbers(problem.x), _DIGITS[problem.wide])
    except Exception:
        return None
    return np.array([float(y) for y in values])


def _program(problem: Problem, f: Any) -> Any:
    if importlib.util.find_spec("mpmath") is None:
        return None
    with jax.enable_x64(True):
        return jax.make_jaxpr(problem.spec.of_floats(f, problem.others))(*problem.leaves(problem.x, np.float64))


# Digits enough for the range of the arguments, the step, and derivatives down to the smallest number.
_DIGITS = {False: 180, True: 720}


def _step(mpmath: Any, x: Any) -> Any:
    return mpmath.mpf(10) ** -40 * (abs(x) if 0 < abs(x) < 1 else 1)


def _slope(mpmath: Any, changes: list[Any], width: Any, rounding: Any) -> float:
    """The slope, from what f changes by over a step and over half of it to both sides; nan at a kink or a jump."""
    above, below, half_above, half_below = changes
    if not all(map(mpmath.isfinite, changes)):
        return _one_sided(mpmath, changes, width, rounding)
    odd, even, small = (above - below) / 2, (above + below) / 2, mpmath.mpf(10) ** -15
    half_odd, half_even = half_above - half_below, (half_above + half_below) / 2
    # Of a smooth function the even part is curvature, and falls to a quarter; at a kink it falls to a half.
    if abs(even) > small * abs(odd) and abs(even) > rounding and abs(half_even) > 0.3 * abs(even):
        return float("nan")
    if abs(half_odd - odd) <= small * abs(odd):
        return float(odd / width)
    # Here `half_odd` is twice the odd part over half the step. At an extremum the odd part is of third order, or of
    # second, as that of x·|x|, or rounding; that of a jump does not fall at all, and that of a root not by half.
    return 0.0 if abs(odd) <= rounding or abs(half_odd) <= 0.6 * abs(odd) else float("nan")


def _one_sided(mpmath: Any, changes: list[Any], width: Any, rounding: Any) -> float:
    """The slope at the end of where f is finite; nan at a jump, or if it is finite on neither side."""
    above, below, half_above, half_below = changes
    for whole, half, step in (above, half_above, width), (below, half_below, -width):
        if mpmath.isfinite(whole) and mpmath.isfinite(half):
            slope, finer = whole / step, 2 * half / step
            if abs(finer - slope) <= mpmath.mpf(10) ** -15 * abs(finer):
                return float(2 * finer - slope)
            return 0.0 if abs(whole) <= rounding else float("nan")
    return float("nan")


def _values(problem: Problem, program: Any, x: np.ndarray, digits: int) -> np.ndarray:
    sizes = [int(np.prod(shape)) for shape, _ in problem.in_shapes]
    parts = np.split(x, np.cumsum(sizes)[:-1])
    leaves = [part.reshape(shape) for part, (shape, _) in zip(parts, problem.in_shapes, strict=True)]
    return np.concatenate([np.ravel(y) for y in _exact.evaluate(program, leaves, digits)])


def _independent_columns(pattern: np.ndarray) -> list[np.ndarray]:
    """Columns in groups in which no two have a row in common, first fit."""
    groups: list[list[int]] = []
    taken: list[np.ndarray] = []
    for j in range(pattern.shape[1]):
        for group, rows in zip(groups, taken, strict=True):
            if not (rows & pattern[:, j]).any():
                group.append(j)
                rows |= pattern[:, j]
                break
        else:
            groups.append([j])
            taken.append(pattern[:, j].copy())
    return [np.array(g) for g in groups]


def given(problem: Problem, derivative: Any, layout: Layout) -> Source:
    """What the user says: slopes of an elementwise function, or the Jacobian as `jax.jacobian` lays it out."""

    def at(x: np.ndarray) -> Jacobian:
        args = problem.spec.arguments(problem.leaves(x, np.float64), problem.others)
        parts = [np.asarray(p, np.float64) for p in jax.tree.leaves(call(derivative, args))]
        shapes = [o + i for o, _ in problem.out_shapes for i, _ in problem.in_shapes]
        if layout.elementwise and len(parts) == 1 and parts[0].size == problem.n:
            return layout.of_slopes(parts[0].ravel())
        if [p.shape for p in parts] != shapes:
            raise ValueError(
                f"derivative must return the slopes of an elementwise f, of shape {problem.out_shapes[0][0]}, or "
                f"Jacobians of shapes {shapes}, got {[p.shape for p in parts]}."
            )
        sizes_in = [int(np.prod(shape)) for shape, _ in problem.in_shapes]
        sizes_out = [int(np.prod(shape)) for shape, _ in problem.out_shapes]
        grid = iter(parts)
        matrix = np.block([[next(grid).reshape(o, i) for i in sizes_in] for o in sizes_out])
        return layout.of_slopes(np.diag(matrix)) if layout.elementwise else layout.of_matrix(matrix)

    return at


def call(f: Any, args: Any) -> Any:
    """`f` of float64 arguments, in NumPy or JAX, or in mpmath, which takes one number at a time."""
    leaves = jax.tree.leaves(args)
    of_array: Exception | None = None
    with jax.enable_x64(True), np.errstate(all="ignore"):
        try:
            out = f(*jax.tree.map(_in_numpy, args))
            if all(np.asarray(y).dtype != object for y in jax.tree.leaves(out)):
                return jax.tree.map(np.asarray, out)
        except (TypeError, ValueError, AttributeError) as error:
            if len(leaves) != 1:
                raise
            of_array = error
    try:
        return in_mpmath(f, np.asarray(leaves[0], np.float64))
    except (TypeError, ValueError, AttributeError) as of_number:
        raise of_array or of_number from None  # the former says what is wrong with what is not meant for mpmath


def _in_numpy(a: Any) -> Any:
    """An array as one of NumPy; but a key of random numbers, which NumPy has not, as it is."""
    if not hasattr(a, "dtype") or jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        return a
    return np.asarray(a)


def in_mpmath(f: Any, x: np.ndarray) -> np.ndarray:
    """A function of one mpmath number, at each of `x`."""
    import mpmath

    with mpmath.workdps(400 if x.size < 64 else 60):
        numbers = [f(mpmath.mpf(float(a))) for a in x.ravel()]
    return np.reshape([float("nan") if isinstance(y, mpmath.mpc) else float(y) for y in numbers], x.shape)


def slope_in_mpmath(reference: Any) -> Any:
    """The derivative of a function of one mpmath number, at each of an array."""

    def slope(x: Any) -> Any:
        import mpmath

        with mpmath.workdps(_DIGITS[True]):
            h = _step(mpmath, x)
            above, below = reference(x + h), reference(x - h)
        if any(isinstance(y, float) for y in (above, below)):
            raise TypeError(f"reference must compute in mpmath, NumPy or JAX, got a float of {name_of(reference)}.")
        return (above - below) / (2 * h)

    return lambda *args: in_mpmath(slope, np.asarray(*jax.tree.leaves(args)))
