"""What the derivative is, in float64, and how far that can be trusted: the ladder of oracles.

From the top: an exact derivative that the user gives; a reference in mpmath; a reference in JAX, or what `f` computes
itself, its custom rules left out. The last two are differentiated by autodiff in float64, held against differences with
an error bar, and, where autodiff's own rounding is too large, by exact differences in mpmath. A reference in NumPy is
what the differences are taken of.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxact.verify._agreement import agreement
from jaxact.verify._jacobian import (
    FULL,
    Jacobian,
    Layout,
    Source,
    autodiff,
    exact,
    given,
    products_by_autodiff,
    slope_in_mpmath,
)
from jaxact.verify._primal import equations
from jaxact.verify._problem import Problem
from jaxact.verify._reference import Values, jax_values, kind_of, numpy_values
from jaxact.verify._report import name_of

SAMPLED = 64  # so many rows and columns of a Jacobian that is not looked at as a whole
# Inputs off by the bound, to see how far an entry moves: three by all of it, and others by any part, for what two of
# them do to an entry may cancel. That it moves by less than a tenth each time is a matter of one in 10⁷. In mpmath,
# where entries are few and each takes time, there are the three.
WHOLLY, PARTLY = 3, 7


@dataclasses.dataclass(frozen=True)
class Product:
    """Σⱼ Jᵢⱼ vⱼ for each row of vectors, what to measure an error by, and how far the oracle itself may be off."""

    want: np.ndarray
    size: np.ndarray  # Σⱼ |Jᵢⱼ||vⱼ|
    error: np.ndarray
    conditioning: np.ndarray  # how far the product moves with its inputs


Kind = Literal["derivative", "mpmath", "jax", "numpy", "f"]  # what it is made of: what the user gave, or f itself


@dataclasses.dataclass(frozen=True)
class Oracle:
    kind: Kind
    name: str  # for the report
    exact: bool
    layout: Layout
    jacobian: Jacobian
    error: Jacobian
    near: list[Jacobian]  # how the entries change when the inputs are off by the bound
    credible: np.ndarray  # outputs whose derivative the oracle knows
    doubt: str  # why not the others, for the report
    autodiff: bool = True  # whether autodiff of what was differentiated agrees with its differences
    infinite: np.ndarray | None = None  # inputs with an infinite derivative: times a cotangent of 0 that is nan
    another: bool = False  # whether in float64 f computes something else

    def index(self, mode: str) -> np.ndarray:
        return self.layout.rows if mode == "reverse" else self.layout.columns

    def product(self, mode: str, vectors: np.ndarray) -> Product:
        v = vectors[:, self.index(mode)]

        def times(v: np.ndarray, jacobian: Jacobian) -> np.ndarray:
            entries = getattr(jacobian, mode)
            return v * entries if entries.ndim == 1 else v @ entries

        with np.errstate(all="ignore"):
            size = self.jacobian.map(np.abs)
            moved = np.max([np.abs(times(v, d)) for d in self.near], axis=0)
            return Product(times(v, self.jacobian), times(np.abs(v), size), times(np.abs(v), self.error), moved)


def is_elementwise(problem: Problem, rng: np.random.Generator) -> bool:
    """Whether the Jacobian of what `f` computes is diagonal here."""
    with np.errstate(all="ignore"):
        return _layout(problem, problem.f, rng).elementwise


def find_oracle(
    problem: Problem, reference: Any, derivative: Any, bound: float, rng: np.random.Generator, elementwise: bool = False
) -> Oracle:
    """The best oracle that can be had. `elementwise`: a sweep, whose Jacobian is known to be diagonal."""
    with np.errstate(all="ignore"):
        oracle = _find_oracle(problem, reference, derivative, bound, rng, elementwise)
    finite = np.isfinite(problem.value())
    if finite.all() or derivative is not None:
        return oracle
    doubt = "f is not finite there" if (oracle.credible | ~finite).all() else oracle.doubt
    return dataclasses.replace(oracle, credible=oracle.credible & finite, doubt=doubt)


def _find_oracle(
    problem: Problem, reference: Any, derivative: Any, bound: float, rng: np.random.Generator, elementwise: bool
) -> Oracle:
    kind: Kind = "f" if reference is None else kind_of(problem, reference)
    program = functools.partial(reference) if kind == "jax" else problem.f
    layout = Layout.diagonal(problem.n) if elementwise else _layout(problem, program, rng)
    source = autodiff(problem, program, layout)
    # Twice, since what many inputs do adds up in the worst case, and at random it does not.
    moved = nearby(problem.x, (1 if layout.elementwise else 2) * bound * problem.unit, rng)
    if derivative is not None or kind == "mpmath":
        if derivative:
            kind, name = "derivative", f"exact derivative, {name_of(derivative)}"
        else:
            kind, name = "mpmath", f"reference in mpmath, {name_of(reference)}"
        by_autodiff, source = source, given(problem, derivative or slope_in_mpmath(reference), layout)
        oracle = _exactly(problem, kind, name, layout, source, moved)
        return dataclasses.replace(oracle, autodiff=kind == "mpmath" or _agree(by_autodiff, problem, oracle.jacobian))
    found, value = _of_program(problem, reference, kind, program, layout, source, bound, moved, rng)
    # In float64 a program may compute something else, as by an eps or by random numbers of another dtype.
    other = np.zeros(problem.m, bool) if kind != "f" or value is None else another(problem.value(), value, problem)
    if not other.any():
        return found
    # What is large shows it, and what is small may be something else too. Not so in a sweep of all magnitudes, where an
    # input may be rounded inside by more than what f does to it.
    credible = found.credible & ~other if elementwise else np.zeros(problem.m, bool)
    return dataclasses.replace(found, credible=credible, doubt="in float64 f computes something else", another=True)


def _of_program(
    problem: Problem, reference: Any, kind: Kind, program: Any, layout: Layout, source: Source, bound: float,
    moved: list[np.ndarray], rng: np.random.Generator,
) -> tuple[Oracle, np.ndarray | None]:  # fmt: skip
    """The oracle that is made of a program, and the program's value in float64, if it has one."""
    of_reference = f"reference in JAX, {name_of(reference)}"
    name = of_reference if kind == "jax" else "what f computes, in float64, by autodiff"
    try:
        jacobian = source(problem.x)
    except Exception as error:
        why = f"what f computes cannot be differentiated in float64 ({type(error).__name__})"
        nothing = layout.of_matrix(np.zeros((problem.m, problem.n)))
        unknown = np.zeros(problem.m, bool)
        # Without autodiff a reference in NumPy has not been looked at.
        of = "f" if kind == "numpy" else kind
        return Oracle(of, name, False, layout, nothing, nothing, [nothing], unknown, why), None
    doubted = _rounding(problem, program, layout, jacobian, rng)
    values = numpy_values(problem, reference) if kind == "numpy" else jax_values(problem, program)
    credible, zero_error, value = agreement(problem, layout, jacobian, doubted, values, rng)
    narrow = kind == "f" and _narrow_inside(problem)
    unsure = doubted.map(lambda e, j: 4 * e > bound * problem.unit * np.abs(j), jacobian)
    inexact = narrow or problem.wide or any(u.any() for u in unsure) or _zero_rows(layout, jacobian).any()
    if inexact or not credible.all():
        pattern = functools.partial(_pattern, problem, layout, jacobian, values)
        exactly = exact(problem, program, layout, _fewest_groups(layout, jacobian), pattern)
        if exactly is not None:
            name = f"{of_reference if kind == 'jax' else 'what f computes'}, in mpmath"
            oracle = _exactly(problem, kind, name, layout, exactly, moved)
            if kind == "numpy":  # what f computes need not be what it should
                agreed, *_ = agreement(problem, layout, oracle.jacobian, oracle.error, values, rng)
                known = oracle.credible & agreed
                doubt = oracle.doubt if known.all() else "what f computes and differences of the reference disagree"
                name = f"reference in NumPy, {name_of(reference)}, by differences, and {name}"
                oracle = dataclasses.replace(oracle, name=name, credible=known, doubt=doubt)
            right = oracle.jacobian.map(
                lambda j, k, e: np.abs(j - k) <= 2.0**-20 * np.abs(j) + 8 * e + 1e-300, jacobian, doubted
            )
            return dataclasses.replace(oracle, autodiff=all(r.all() for r in right)), value
    doubt = "" if credible.all() else "autodiff and differences of the oracle disagree, as at a kink or a jump"
    if narrow:
        doubt = "f computes in less than float64 inside, whatever its arguments"
        doubted = doubted.map(lambda e, j: e + 2.0**-20 * np.abs(j), jacobian)
    # A derivative that autodiff makes exactly 0 in all of a row may have cancelled: then differences are all there is.
    zero = _zero_rows(layout, jacobian)
    if layout.elementwise:
        doubted = layout.of_slopes(np.where(zero, zero_error, doubted.reverse))
    else:
        doubted = Jacobian(np.where(zero[layout.rows][:, None], zero_error[layout.rows][:, None], doubted.reverse),
                         np.where(zero[None, :], zero_error[None, :], doubted.forward))  # fmt: skip
    near = _changes(source, moved, jacobian)
    if kind == "numpy":
        name = f"reference in NumPy, {name_of(reference)}, by differences, and what f computes, by autodiff"
    return _finished(Oracle(kind, name, False, layout, jacobian, doubted, near, credible, doubt)), value


def _rounding(problem: Problem, program: Any, layout: Layout, jacobian: Jacobian, rng: np.random.Generator) -> Jacobian:
    """How far autodiff's own rounding may have moved each entry: four times what other roundings move it."""
    doubted = jacobian.map(lambda j: 2.0**-50 * np.abs(j))
    for _ in range(3):
        noisy = autodiff(problem, program, layout, rng.choice([-1.0, 1.0], 61))
        doubted = doubted.map(lambda e, j, k: np.maximum(e, 4 * np.abs(k - j)), jacobian, noisy(problem.x))
    return doubted


def another(narrow: np.ndarray, wide: np.ndarray, problem: Problem) -> np.ndarray:
    """Which outputs differ by more than an inaccurate f might: 1/64 of the largest, 32 units, or what is lost."""
    with np.errstate(all="ignore"):
        apart, size = np.abs(narrow - wide), np.maximum(np.abs(narrow), np.abs(wide))
        largest = np.max(size, initial=0, where=np.isfinite(size))
        allowed = max(2.0**-6, 32 * problem.unit) * largest + problem.lost
        return np.isfinite(apart) & (apart > allowed)


def _agree(source: Source, problem: Problem, jacobian: Jacobian) -> bool:
    """Whether a source has the Jacobian to the digits that a second derivative needs."""
    try:
        other = source(problem.x)
    except Exception:
        return False
    return all(a.all() for a in jacobian.map(lambda j, k: np.abs(j - k) <= 2.0**-20 * np.abs(j) + 1e-300, other))


def _exactly(
    problem: Problem, kind: Kind, name: str, layout: Layout, source: Source, moved: list[np.ndarray]
) -> Oracle:
    jacobian = source(problem.x)
    near, error = _changes(source, moved[:WHOLLY], jacobian), jacobian.map(lambda j: 2.0**-52 * np.abs(j))
    return _finished(Oracle(kind, name, True, layout, jacobian, error, near, np.ones(problem.m, bool), ""))


def _changes(source: Source, moved: list[np.ndarray], jacobian: Jacobian) -> list[Jacobian]:
    """By how much the entries change at the moved inputs."""
    return [source(x).map(lambda a, b: _finite(a - b), jacobian) for x in moved]


def _finite(a: np.ndarray) -> np.ndarray:
    return np.nan_to_num(a, nan=0, posinf=0, neginf=0)


def _finished(oracle: Oracle) -> Oracle:
    """Outputs without a finite derivative are not credible, and their entries 0."""
    layout, rows = oracle.layout, oracle.jacobian.reverse
    credible = oracle.credible.copy()
    finite = np.isfinite(rows) if layout.elementwise else np.isfinite(rows).all(1)
    credible[layout.rows] &= finite
    infinite = ~finite
    if not layout.elementwise:
        columns = np.isfinite(oracle.jacobian.forward)
        credible &= columns.all(0)
        infinite = ~np.isfinite(rows).all(0)
        infinite[layout.columns] |= ~columns.all(1)
    doubt = oracle.doubt or ("" if credible.all() else "it is not differentiable there, or not finite")
    clean, error = oracle.jacobian.map(_finite), oracle.error.map(_finite)
    return dataclasses.replace(oracle, jacobian=clean, error=error, credible=credible, infinite=infinite, doubt=doubt)


def _layout(problem: Problem, f: Any, rng: np.random.Generator) -> Layout:
    """The whole Jacobian, or so many of its rows and columns; or only slopes, where it is diagonal."""

    def some(size: int) -> np.ndarray:
        return np.arange(size) if whole or size <= SAMPLED else np.sort(rng.choice(size, SAMPLED, replace=False))

    whole = problem.n * problem.m <= FULL
    layout = Layout(some(problem.m), some(problem.n), whole, False)
    if [s for s, _ in problem.in_shapes] != [s for s, _ in problem.out_shapes] or len(problem.in_shapes) != 1:
        return layout
    try:
        rows = autodiff(problem, f, layout)(problem.x).reverse.copy()
    except Exception:
        return layout
    diagonal = rows[np.arange(len(rows)), layout.rows]
    rows[np.arange(len(rows)), layout.rows] = 0
    rows = rows[np.isfinite(diagonal)]  # an infinite slope times 0 is nan
    diagonal_here = len(rows) and not rows.any() and (whole or _scales(problem, f, rng))
    return Layout.diagonal(problem.n) if diagonal_here else layout


def _scales(problem: Problem, f: Any, rng: np.random.Generator) -> bool:
    """Whether J v is v times J 1, as of a diagonal J: an entry beside it may be in a row that is not looked at."""
    v = rng.uniform(0.5, 1, problem.n)
    ones, along = products_by_autodiff(problem, f, "forward", np.stack([np.ones(problem.n), v]), problem.x)
    # Roundings of float64, also of what has cancelled in the tails. Of nan nothing is known.
    rounding = 2.0**-30 * np.abs(ones) + 2.0**-45 * np.max(np.abs(ones), initial=0, where=np.isfinite(ones))
    return not (np.abs(along - v * ones) > rounding).any()


def _fewest_groups(layout: Layout, jacobian: Jacobian) -> int:
    """No two columns with an entry in one row are found at once."""
    return 1 if layout.elementwise else int((jacobian.reverse != 0).sum(1).max(initial=1))


def _pattern(problem: Problem, layout: Layout, jacobian: Jacobian, values: Values) -> np.ndarray | None:
    """Which entries may not be 0; None where the Jacobian is diagonal."""
    if layout.elementwise or not layout.whole:
        return None
    pattern = (jacobian.reverse != 0) | _zero_rows(layout, jacobian)[:, None]
    # Autodiff may have cancelled to 0, or be wrong: which outputs does a nan in an input reach?
    spoilt = np.repeat(problem.x[None], problem.n, axis=0)
    np.fill_diagonal(spoilt, np.nan)
    return pattern | np.isnan(values(spoilt)).T


def _zero_rows(layout: Layout, jacobian: Jacobian) -> np.ndarray:
    """Which outputs have a derivative of 0, as far as is known."""
    columns = jacobian.forward
    if columns.ndim == 1:
        return columns == 0
    zero = (columns == 0).all(0)
    zero[layout.rows] &= (jacobian.reverse == 0).all(1)  # in columns that are not looked at, it may not be 0
    return zero


def nearby(x: np.ndarray, relative: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Inputs off by up to so much."""
    shifts = np.concatenate([rng.choice([-1.0, 1.0], (WHOLLY, len(x))), rng.uniform(-1, 1, (PARTLY, len(x)))])
    return [x * (1 + relative * shift) for shift in shifts]


def _narrow_inside(problem: Problem) -> bool:
    """Whether `f`, given float64, computes anything in a narrower type."""

    with jax.enable_x64(True):
        flat = problem.spec.of_floats(problem.f, problem.others)
        program = jax.make_jaxpr(flat)(*problem.leaves(problem.x, np.float64))
    dtypes = [getattr(v.aval, "dtype", None) for equation in equations(program.jaxpr) for v in equation.outvars]
    return any(d is not None and jnp.issubdtype(d, jnp.floating) and d != np.float64 for d in dtypes)
