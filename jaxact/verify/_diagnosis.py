"""From a wrong element to a sentence for the author, and to lines that show it."""

import itertools
from typing import Any

import jax
import numpy as np

from jaxact.verify._compare import Verdicts, close
from jaxact.verify._oracle import Oracle
from jaxact.verify._primal import without_rules
from jaxact.verify._problem import Problem, Static, product_along, unravel
from jaxact.verify._report import apart, as_code, name_of, off


def explain(
    problem: Problem, oracle: Oracle, mode: str, vectors: np.ndarray, verdicts: Verdicts, c: int, i: int
) -> str:
    """What an author should look at, guessed from how the products differ."""
    got, want = verdicts.got, verdicts.product.want
    which, vector = rule_and_vector(mode)
    at = f"x = {problem.x[i]:.6g}" if oracle.layout.elementwise else element(problem, mode, i)
    g, w = got[c, i], want[c, i]
    known = ~verdicts.unresolved
    zero = ~vectors.any(1)
    if np.any(got[zero] != 0) and not np.isnan(got[zero]).any():
        return f"the {which} rule is not linear: for a {vector} of 0 it returns {np.max(np.abs(got[zero])):.4g}"
    came, due = apart(g, w)
    # A product with a unit vector is a derivative, and with others it is not.
    if oracle.layout.elementwise and vectors[c, i] != 1:
        at = f"{vector} {vectors[c, i]:.6g}, {at}"
    unit = vectors[c, i] == 1 if oracle.layout.elementwise else np.count_nonzero(vectors[c]) == 1 == vectors[c].max()
    where = f"where the {'derivative' if unit else 'product'} is"
    if np.isnan(g):
        return f"the {which} rule returns nan {where} {w:.4g} ({at})"
    live = known & (np.abs(want) > 4 * verdicts.allowed) & np.isfinite(got)
    if live.any() and not got[live].any():
        return f"the {which} rule returns 0 everywhere"
    with np.errstate(all="ignore"):
        ratio = got[live] / want[live]
    blurred = max(1e-4, 64 * problem.unit)
    if live.any() and abs(ratio[0] - 1) > 4 * blurred and np.allclose(ratio, ratio[0], rtol=blurred):
        return (
            f"the {which} rule has the wrong sign"
            if abs(ratio[0] + 1) < 0.01
            else f"the {which} rule is off by the factor {ratio[0]:.5g}"
        )
    if oracle.layout.whole and not oracle.layout.elementwise and problem.n == problem.m:
        whole = oracle.jacobian.reverse
        other = vectors @ (whole.T if mode == "reverse" else whole)
        if _same(got, other, verdicts) and not _same(want, other, verdicts):
            return f"the {which} rule applies the transposed Jacobian"
        if _same(got, vectors * np.diag(whole), verdicts):
            return f"the {which} rule has only the diagonal of the Jacobian: a sum is missing"
    dense = np.flatnonzero((vectors != 0).sum(1) > 1)
    if len(dense) > 1 and _nonlinear(vectors, got, verdicts, dense):
        return f"the {which} rule is not linear in the {vector}"
    if g == 0:
        reason = f"the {which} rule returns 0 {where} {w:.4g} ({at})"
        small = oracle.layout.elementwise and abs(w) < 64 * problem.unit * abs(vectors[c, i])
        if small and abs(abs(problem.value()[i]) - 1) < 1e-6:
            reason += "; 1 − f(x) has cancelled"
        return reason
    return f"the {which} rule returns {came} {where} {due} ({at}; {_fraction(verdicts)})"


def rule_and_vector(mode: str) -> tuple[str, str]:
    """What the rule of a mode is called, and what it is given."""
    return ("backward", "cotangent") if mode == "reverse" else ("forward", "tangent")


def _same(got: np.ndarray, other: np.ndarray, verdicts: Verdicts) -> bool:
    return bool(np.all((np.abs(got - other) <= 4 * verdicts.allowed) | verdicts.unresolved))


def _nonlinear(vectors: np.ndarray, got: np.ndarray, verdicts: Verdicts, dense: np.ndarray) -> bool:
    """Whether the products of v and −v, both among the vectors, are not each other's negatives."""
    for a in dense:
        for b in dense:
            if b > a and np.array_equal(vectors[a], -vectors[b]):
                return bool(np.any(np.abs(got[a] + got[b]) > verdicts.allowed[a] + verdicts.allowed[b]))
    return False


def _fraction(verdicts: Verdicts) -> str:
    return off(int(verdicts.wrong.any(0).sum()), verdicts.wrong.shape[1])


IMPORTS = "import jax, jax.numpy as jnp"


def witness_at(problem: Problem, mode: str, x: float, v: float, came: str, due: str) -> str:
    """Lines for a REPL that show an elementwise function at one input, times one number."""
    of_x, of_v = problem.in_shapes[0][1], problem.vector_shapes(mode)[0][1]
    at, vector = (f"jnp.array([{as_code(a)}], jnp.{dtype.name})" for a, dtype in ((x, of_x), (v, of_v)))
    call = f"jax.vjp(f, {at})[1]({vector})[0]" if mode == "reverse" else f"jax.jvp(f, ({at},), ({vector},))[1]"
    return "\n".join([*_setup(problem), f"{call}  # {came}, should be {due}"])


def _setup(problem: Problem) -> list[str]:
    return [IMPORTS, *(['jax.config.update("jax_enable_x64", True)'] if problem.wide else [])]


def witness(problem: Problem, oracle: Oracle, mode: str, vector: np.ndarray, verdicts: Verdicts, c: int, i: int) -> str:
    """Lines for a REPL. An elementwise function is shown at the one input, others at the arguments as given."""
    got, want = verdicts.got[c, i], verdicts.product.want[c, i]
    came, due = apart(got, want)
    if oracle.layout.elementwise and _shows(problem, mode, i, vector[i], got, want):
        return witness_at(problem, mode, problem.x[i], vector[i], came, due)
    lines, shapes = _setup(problem), problem.vector_shapes(mode)
    roles = problem.spec.roles
    f, args = "f", "args"
    if any(isinstance(role, Static) for role in roles):  # which JAX does not take as an argument
        numbers = itertools.count()
        leaves = [f"floats[{next(numbers)}]" if role == "float" else f"leaves[{k}]" for k, role in enumerate(roles)]
        lines.append("leaves, tree = jax.tree.flatten(args)")
        lines.append(f"of_floats = lambda *floats: f(*tree.unflatten([{', '.join(leaves)}]))")
        f, args = "of_floats", f"[leaves[i] for i in {[k for k, role in enumerate(roles) if role == 'float']}]"
        roles = tuple(role for role in roles if role == "float")
    parts = [_array_as_code(part[0]) for part in unravel(vector[None], shapes)]
    as_is = f"{f}(*{args})" if mode == "reverse" else args
    if None in parts:
        v = f"jax.tree.map(jnp.ones_like, {as_is})"
        lines.append("# seen with a random vector; with ones, other numbers:")
    elif problem.bare(mode):
        v = str(parts[0]) if mode == "reverse" else f"({parts[0]},)"
    else:
        v = f"jax.tree.unflatten(jax.tree.structure({as_is}), [{', '.join(map(str, parts))}])"
    leaf, place = _place(problem.in_shapes if mode == "reverse" else problem.out_shapes, i)
    if mode == "reverse":  # of integers too there is something there
        leaf = [k for k, role in enumerate(roles) if role == "float"][leaf]
    product = f"jax.vjp({f}, *{args})[1]({v})" if mode == "reverse" else f"jax.jvp({f}, {args}, {v})[1]"
    lines.append(f"product = {product}")
    lines.append(f"jax.tree.leaves(product)[{leaf}].ravel()[{place}]  # {came}, should be {due}")
    return "\n".join(lines)


def _shows(problem: Problem, mode: str, i: int, v: float, got: float, want: float) -> bool:
    """Whether what is wrong at one of many inputs is so at that input alone."""
    if v == 0 or not (problem.bare("reverse") and problem.bare("forward")):
        return False
    try:
        alone = Problem(problem.f, (problem.x[i : i + 1].astype(problem.in_shapes[0][1]),))
        again = alone.products(mode, "eager", np.array([[v]]))
    except Exception:  # it need not take another shape
        return False
    return again.shape == (1, 1) and bool(close(again[0], np.array([got]), abs(got - want) / 4).all())


def _array_as_code(part: np.ndarray) -> str | None:
    """An array as an expression; None if it is too long to be written."""
    dtype, places = part.dtype.name, np.argwhere(part)
    if part.ndim == 0:
        return f"jnp.{dtype}({float(part)!r})"
    if not len(places):
        return f"jnp.zeros({part.shape}, jnp.{dtype})"
    if len(places) == 1:
        place = ", ".join(map(str, places[0]))
        return f"jnp.zeros({part.shape}, jnp.{dtype}).at[{place}].set({float(part[tuple(places[0])])!r})"
    return f"jnp.array({part.astype(np.float64).tolist()}, jnp.{dtype})" if part.size <= 32 else None


def element(problem: Problem, mode: str, i: int) -> str:
    """Which element of what a mode returns; of several arrays, of which."""
    shapes = problem.in_shapes if mode == "reverse" else problem.out_shapes
    leaf, place = _place(shapes, i)
    return f"element {i}" if len(shapes) == 1 else f"element {place} of array {leaf}"


def _place(shapes: Any, i: int) -> tuple[int, int]:
    for leaf, (shape, _) in enumerate(shapes):
        size = int(np.prod(shape))
        if i < size:
            return leaf, i
        i -= size
    raise IndexError(i)


def slopes_along(problem: Problem, derivative: Any, vector: np.ndarray) -> Any:
    """What `derivative_along` should be, of the slopes of an elementwise function."""
    (part,) = unravel(vector, problem.out_shapes, np.float64)
    return lambda *args: derivative(*args) * part[0]


def derivative_along(problem: Problem, f: Any, mode: str, vector: np.ndarray, dtype: Any) -> Any:
    """The product of f's derivative with a fixed vector, as a function of f's arguments.

    With a `dtype`, in which the vector then is, that of f without its custom rules.
    """
    shapes = problem.vector_shapes(mode)
    parts = tuple(p[0] for p in unravel(vector, shapes, dtype))

    def product(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        floats, others = problem.spec.split(leaves)
        flat = problem.spec.of_floats(f, others)
        return product_along(flat if dtype is None else without_rules(flat), mode, floats, parts)

    product.__name__ = f"derivative of {name_of(f)}"
    return product
