"""Rows of a large batch, for which XLA has other kernels than for small ones, and kernels that may lose a nan."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxact.verify import _exact
from jaxact.verify._compare import Comparison, close
from jaxact.verify._oracle import another
from jaxact.verify._other_values import allowed
from jaxact.verify._problem import Leaves, Problem, Spec, product_along, ravel, unravel
from jaxact.verify._report import REFUTED, VERIFIED, Check, apart, first_line

# The fewest rows that show what is known of XLA for CPU: it finds the maximum of 4096 numbers or more, and the minimum
# of numbers and 4096 maxima or more, by kernels that pass over nan.
ROWS = 4096
# What one element of a row is replaced by, in turn; None for the arguments as they are.
SPECIAL = (None, np.nan, np.inf, -np.inf)
AS_GIVEN = slice(None, None, 2 * len(SPECIAL))
ELSEWHERE = slice(len(SPECIAL), None, 2 * len(SPECIAL))  # rows of other arguments: those as given are all the same
DIFFERENT = 16 * len(SPECIAL)  # rows; the others are copies of them
WORK = 2**24  # operations on single numbers that the batch may take: about a tenth of a second, and some 100 MB


def in_a_batch(comparison: Comparison, vectors: dict[str, np.ndarray], rng: np.random.Generator) -> tuple[Check, str]:
    """Value, and products with `vectors` in each mode, under jit: of rows one after another, and of all under vmap.

    Rows as given must be right within the bound. Of others the oracle knows nothing: those of other arguments must be
    what they are alone, and not what another row is. That the same elements of the rest are nan or infinite is said of
    them, or which is not. It is no mistake of a rule if XLA loses a nan.
    """
    problem, turn = comparison.problem, np.arange(DIFFERENT) // len(SPECIAL)
    rows, places = _rows(problem, rng)
    copies = copies_of(problem)
    size, lost = f"a batch of {copies * DIFFERENT}", ""
    for what, given in {"value": np.zeros((1, problem.m)), **vectors}.items():
        directions = given[turn % len(given)]
        try:
            due, among = _alone_and_among(problem, what, rows, directions, copies)
        except Exception as error:
            why = f"{type(error).__name__} in {size}: {first_line(error)}"
            return Check("vmap", REFUTED, f"{_NAMES[what]} raises {why}"), ""
        got = _farthest(among, due)
        wrong = np.zeros(got.shape, bool)
        wrong[AS_GIVEN] = ~_right(comparison, what, directions[AS_GIVEN], got[AS_GIVEN])
        wrong[ELSEWHERE] = [another(*pair, problem) for pair in zip(got[ELSEWHERE], due[ELSEWHERE], strict=True)]
        other = _kind(got) != _kind(due)
        if wrong.any() or (other.any() and not lost):
            row, i = divmod(int(np.argmax(wrong if wrong.any() else other)), got.shape[1])
            came, expected = apart(got[row, i], due[row, i])
            special = SPECIAL[row % len(SPECIAL)]
            where = f"element {i}" + ("" if special is None else f", where input {places[turn[row]]} is {special}")
            right = (
                row in range(DIFFERENT)[AS_GIVEN]
                and wrong.any()
                and _right(comparison, what, directions[[row]], due[[row]])[0, i]
            )
            alone = "alone, which is right" if right else "alone"
            lost = f"{_NAMES[what]} is {came} in {size}, {expected} {alone} ({where})"
            if wrong.any():
                return Check("vmap", REFUTED, lost), ""
    return Check("vmap", VERIFIED, f"rows in {size}"), lost or "as alone"


def one_array_in_a_batch(comparison: Comparison, vectors: dict[str, np.ndarray]) -> str:
    """What is wrong where one array alone is batched, as examples are and weights are not; of several arrays."""
    problem = comparison.problem
    for i in range(len(problem.floats) if len(problem.floats) > 1 else 0):
        for mode, given in vectors.items():
            vector = tuple(part[0] for part in unravel(given[:1], problem.vector_shapes(mode)))
            try:
                with problem.precision():
                    batched = problem.compiled(_one_batched, problem.f, problem.spec, mode, i)
                    value, product = batched(problem.floats, problem.others, vector)
            except Exception as error:
                return f"f raises {type(error).__name__} where array {i} alone is batched: {first_line(error)}"
            if not _right(comparison, "value", given[:1], ravel(value)).all():
                return f"f is wrong where array {i} alone is batched"
            if not _right(comparison, mode, given[:1], ravel(product)).all():
                return f"{_NAMES[mode]} is wrong where array {i} alone is batched"
    return ""


def _one_batched(f: Any, spec: Spec, mode: str, i: int, floats: Leaves, others: Leaves, vector: Leaves) -> Any:
    flat = spec.of_floats(f, others)

    def of_leaf(leaf: Any) -> Any:
        moved = (*floats[:i], leaf, *floats[i + 1 :])
        return flat(*moved), product_along(flat, mode, moved, vector)

    return jax.vmap(of_leaf)(jnp.stack([floats[i]] * 3))


def _right(comparison: Comparison, what: str, vectors: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Which elements of values, or of products with the vectors, will do."""
    if what == "value":
        return close(got, comparison.problem.value(), allowed(comparison))
    return ~comparison.products(what, vectors, got).wrong


_NAMES = {"value": "f", "reverse": "reverse mode", "forward": "forward mode"}


def copies_of(problem: Problem) -> int:
    """How many times over the rows are in the batch."""
    with problem.precision():
        program = jax.make_jaxpr(problem.spec.of_floats(problem.f, problem.others))(*problem.floats)
    work = problem.n + problem.m + _exact.work(program.jaxpr)
    return max(1, min(ROWS, WORK // work) // DIFFERENT)


def _rows(problem: Problem, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Arguments, and which element of theirs is special: one of each array in turn, however small."""
    sizes = np.array([int(np.prod(shape)) for shape, _ in problem.in_shapes])
    starts, sizes = (np.cumsum(sizes) - sizes)[sizes > 0], sizes[sizes > 0]
    array = np.arange(DIFFERENT // len(SPECIAL)) % len(sizes)
    places = starts[array] + rng.integers(sizes[array])
    rows = np.tile(problem.x, (DIFFERENT, 1))
    for offset, special in enumerate(SPECIAL):
        if special is not None:
            rows[np.arange(offset, DIFFERENT, len(SPECIAL)), places] = special
    rows[ELSEWHERE] *= 1 + rng.choice([-1.0, 1.0], rows[ELSEWHERE].shape) / 8
    return rows, places


def _alone_and_among(
    problem: Problem, what: str, rows: np.ndarray, directions: np.ndarray, copies: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each row what comes of it alone, and as (copies, rows, elements) what comes of the copies in the batch."""
    shapes = problem.in_shapes if what == "forward" else problem.out_shapes
    one_by_one = tuple(unravel(rows, problem.in_shapes)), tuple(unravel(directions, shapes))
    # Copied here, where XLA does not see that they are copies.
    batch = jax.tree.map(lambda a: np.tile(a, (copies, *[1] * (a.ndim - 1))), one_by_one)
    with problem.precision():
        alone, among = problem.compiled(_both, problem.f, problem.spec, what)(problem.others, one_by_one, batch)
    return ravel(alone), ravel(among).reshape(copies, len(rows), -1)


# Only one thing at a time: beside others XLA may compute it by other kernels.
def _both(f: Any, spec: Spec, what: str, others: Leaves, one_by_one: Any, batch: Any) -> Any:
    def result(floats: Leaves, vector: Leaves) -> Leaves:
        flat = spec.of_floats(f, others)
        return flat(*floats) if what == "value" else product_along(flat, what, floats, vector)

    return lax.map(lambda row: result(*row), one_by_one), jax.vmap(result)(*batch)


def _farthest(among: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """For each row and element, the copy that is farthest from the row alone."""
    with np.errstate(all="ignore"):
        distance = np.where(_kind(among) == _kind(alone), np.nan_to_num(np.abs(among - alone)), np.inf)
    return np.take_along_axis(among, np.argmax(distance, axis=0)[None], axis=0)[0]


def _kind(y: np.ndarray) -> np.ndarray:
    """What rounding does not change: 0 for a finite number, ±1 for an infinity, 2 for nan."""
    return np.where(np.isnan(y), 2, np.where(np.isinf(y), np.sign(y), 0))
