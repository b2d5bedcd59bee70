"""Products in one mode, called in every way, held against the oracle; and those of both against each other."""

import functools
from typing import Any

import numpy as np

from jaxact.verify import _diagnosis as diagnosis
from jaxact.verify._compare import Comparison, Verdicts, close
from jaxact.verify._contract import is_missing_mode
from jaxact.verify._jacobian import FULL, products_by_autodiff
from jaxact.verify._oracle import nearby
from jaxact.verify._report import INCONCLUSIVE, REFUTED, UNKNOWN, VERIFIED, Findings, apart, counted, first_line, off

ONE_HOT = 1024  # one-hot vectors at most

# Of each mode, the vectors and what was found of the products with them.
Results = dict[str, tuple[np.ndarray, Verdicts]]


def products(
    comparison: Comparison,
    mode: str,
    transforms: tuple[str, ...],
    directions: int,
    rng: np.random.Generator,
    findings: Findings,
) -> tuple[np.ndarray, Verdicts]:
    """Checks a mode, called plainly and under the transformations; returns all vectors, with what was found of them."""
    problem = comparison.problem
    dense, one_hot = _vectors(comparison, mode, directions, rng)
    every = np.concatenate([dense, one_hot])
    found: dict[str, Verdicts] = {}
    for variant in ("eager", *(t for t in transforms if t != "vmap")):
        vectors = every if variant == "jit" else dense
        try:
            got = problem.products(mode, variant, vectors)
        except Exception as error:
            detail = f"{type(error).__name__}: {first_line(error)}"
            reason = f"{mode} mode raises {type(error).__name__} {_under(variant)}"
            findings.add(f"{mode}, {variant}", REFUTED, detail, reason)
            continue
        found[variant] = comparison.products(mode, vectors, got)
    main = found.get("jit") or comparison.products(mode, every, problem.products(mode, "eager", every))
    for variant, verdicts in found.items():
        _judge(comparison, f"{mode}, {variant}", verdicts, findings)
    _explain(comparison, mode, found, every, len(dense), findings)
    if "eager" in found and not found["eager"].wrong.any():
        _in_proportion(comparison, mode, dense[:1], found["eager"], findings)
    return every, main


def _in_proportion(
    comparison: Comparison, mode: str, vector: np.ndarray, verdicts: Verdicts, findings: Findings
) -> None:
    """That a rule returns as many times more for a vector as that is larger: one that clips may do so far out."""
    large = 2.0**8 if comparison.problem.dtype == np.float16 else 2.0**30
    with np.errstate(all="ignore"):
        again = comparison.problem.products(mode, "eager", large * vector)[0] / large
        # A number that has overflowed says nothing. Powers of two do not round: what is apart is more than a rounding.
        wrong = np.isfinite(again) & (np.abs(again - verdicts.got[0]) > verdicts.allowed[0])
    if wrong.any():
        i = int(np.argmax(wrong))
        which, what = diagnosis.rule_and_vector(mode)
        came, due = apart(again[i], verdicts.got[0, i])
        detail = f"for {large:.3g} times a {what} it returns not {due} as many times, but {came}"
        where = diagnosis.element(comparison.problem, mode, i)
        findings.add(f"{mode}, large", REFUTED, detail, f"the {which} rule is not linear: {detail} ({where})")


def _vectors(
    comparison: Comparison, mode: str, directions: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random directions, large and small ones and with an offset, and zero; and one-hot ones."""
    problem, oracle, *_ = comparison
    size = problem.vector_size(mode)
    known = np.zeros(size, bool)
    known[oracle.index(mode)] = True
    if mode == "reverse":
        known &= oracle.credible
    normal = rng.normal(size=(directions, size))
    big, small = (64.0, 2.0**-6) if problem.dtype == np.float16 else (4096.0, 2.0**-30)
    if directions > 1:
        normal[-1] *= small
    dense = np.concatenate([normal, 1000 + normal[:1], -normal[:1], big * normal[:1], 0 * normal[:1]])
    where = np.flatnonzero(known)
    # So many that the products take no more memory than a Jacobian that is looked at as a whole.
    most = max(8, min(ONE_HOT, FULL // max(problem.n, problem.m)))
    if len(where) > most:
        where = np.sort(rng.choice(where, most, replace=False))
    one_hot = np.zeros((len(where), size))
    one_hot[np.arange(len(where)), where] = 1
    return problem.rounded(dense * known, problem.vector_shapes(mode)), one_hot


def _judge(comparison: Comparison, name: str, verdicts: Verdicts, findings: Findings) -> None:
    problem, oracle, bound, _ = comparison
    count, elements = verdicts.wrong.shape
    open_ones, doubtful = int(verdicts.unresolved.any(0).sum()), int((~oracle.credible).sum())
    if verdicts.wrong.any():
        wrong = int(verdicts.wrong.any(0).sum())
        findings.add(name, REFUTED, f"{off(wrong, elements)} in {counted(count, 'product')}")
    elif open_ones or doubtful:
        unknown = f"{open_ones} of {elements} elements" if open_ones else f"{doubtful} of {problem.m} outputs"
        findings.add(name, INCONCLUSIVE, f"{UNKNOWN} {unknown}")
        why = oracle.doubt or "its own error is not well below the bound"
        if not any(r.startswith(UNKNOWN) for r in findings.reasons):
            missing = {"f": "; give reference= or derivative=", "derivative": ""}.get(oracle.kind, "; give derivative=")
            findings.reasons.append(f"{UNKNOWN} {unknown}: {why}{missing}")
    else:
        worst = verdicts.worst_in_units(problem.unit)
        size = f"{worst:.2f}" if worst < 1e4 else f"{worst:.1e}"
        detail = f"{counted(count, 'product')}, the worst element off by {size} u·Σ|J||g|"
        if worst > bound:
            detail += f", which inputs off by {bound:g} u explain"
        findings.add(name, VERIFIED, detail, worst=worst)


def _explain(
    comparison: Comparison, mode: str, found: dict[str, Verdicts], vectors: np.ndarray, dense: int, findings: Findings
) -> None:
    """A sentence on what is wrong in a mode: with the rule, or with one way of calling it."""
    problem, oracle, *_ = comparison
    plain = [v for v in ("jit", "eager") if v in found]
    apart = [v for v in found if found[v].wrong.any()]
    if not apart:
        return
    right = [v for v in ("eager", "jit") if v in found and not found[v].wrong[:dense].any()]
    if right and any(found[v].wrong[:dense].any() for v in apart):
        variant = next(v for v in apart if found[v].wrong[:dense].any())
        findings.reasons.append(f"right {_under(right[0])}, wrong {_under(variant)} ({mode} mode)")
    else:
        variant = next(v for v in (*plain, *apart) if v in apart)
    verdicts = found[variant]
    vectors = vectors[: len(verdicts.got)]
    c, i = verdicts.worst(vectors)
    if not right or variant == "jit":
        findings.reasons.append(diagnosis.explain(problem, oracle, mode, vectors, verdicts, c, i))
    if not findings.witness:
        findings.witness = diagnosis.witness(problem, oracle, mode, vectors[c], verdicts, c, i)


def alone(comparison: Comparison, results: Results, findings: Findings) -> None:
    """With one argument differentiated at a time, or one result: a rule may be told which are."""
    problem = comparison.problem
    if not comparison.oracle.layout.whole:
        return
    ways: dict[str, list[Any]] = {"argument": [], "result": []}
    if len(problem.in_shapes) > 1:
        ways["argument"] = [(mode, functools.partial(problem.one_by_one, mode)) for mode in results]
    if len(problem.out_shapes) > 1 and "reverse" in results:
        ways["result"] = [("reverse", problem.of_each_result)]
    for what, those in ways.items():
        for mode, products_of in those:
            try:
                vectors, got = products_of(results[mode][0][:1])
                wrong = comparison.products(mode, vectors, got).wrong
            except Exception as error:
                detail = f"raises {type(error).__name__}: {first_line(error)}"
            else:
                if not wrong.any():
                    continue
                detail = f"is wrong in {diagnosis.element(problem, mode, int(np.argmax(wrong.any(0))))}"
            reason = f"with one {what} differentiated and the others not, {mode} mode {detail}"
            findings.add(f"one {what}", REFUTED, f"{mode} mode {detail}", reason)
            return
        if those:
            findings.add(f"one {what}", VERIFIED, "differentiated alone, each as with the others")


def in_the_vector(
    comparison: Comparison, mode: str, directions: int, rng: np.random.Generator
) -> tuple[str, str] | None:
    """What is wrong of the derivative of a product in its vector, in which it is linear: so the derivative is known.

    Forward, it is the product with another vector; in reverse the product of the other mode.
    """
    problem, other = comparison.problem, "forward" if mode == "reverse" else "reverse"
    start = _vectors(comparison, mode, directions, rng)[0][:1]
    for outer, of in (("forward", mode), ("reverse", other)):
        vectors = _vectors(comparison, of, directions, rng)[0][:1]
        try:
            got = problem.product_in_vector(mode, outer, start, vectors, of)
        except Exception as error:
            if is_missing_mode(error):
                continue
            return f"{outer} over {mode} mode", f"raises {type(error).__name__}: {first_line(error)}"
        wrong = comparison.products(of, vectors, got).wrong
        if wrong.any():
            return (
                f"{outer} over {mode} mode",
                f"is wrong in {diagnosis.element(problem, of, int(np.argmax(wrong.any(0))))}",
            )
    return None


def everywhere(
    comparison: Comparison, program: Any, modes: tuple[str, ...], rng: np.random.Generator, findings: Findings
) -> None:
    """Of a Jacobian of which some rows and columns are looked at, products with vectors that reach all of it.

    `program` is what the oracle differentiates. What Σ|J||v| is nobody has computed; but it is at most √size times the
    root of the sum of squares, and that is what products with random signs have on average.
    """
    problem, oracle, bound, _ = comparison
    if oracle.layout.whole or oracle.another or not oracle.credible.all():
        return
    for mode in modes:
        size = problem.vector_size(mode)
        v = problem.rounded(rng.normal(size=(1, size)), problem.vector_shapes(mode))
        vectors = np.concatenate([v, v * rng.choice([-1.0, 1.0], (8, size))])
        moved = nearby(problem.x, bound * problem.unit, rng)
        with np.errstate(all="ignore"):
            want, *signed = products_by_autodiff(problem, program, mode, vectors, problem.x)
            near = [products_by_autodiff(problem, program, mode, v, x)[0] for x in moved]
            most = np.sqrt(size * np.mean(np.square(signed), 0))
            # Of eight and of ten, which may be low.
            allowed = 4 * bound * problem.unit * most + 4 * np.max(np.abs(near - want), 0)
            allowed += 4 * problem.lost * (1 + np.abs(v).sum())
            got = problem.products(mode, "jit", v)[0]
        wrong = ~close(got, want, allowed) & np.isfinite(want)
        if wrong.any():
            i = int(np.argmax(wrong))
            came, due = apart(got[i], want[i])
            detail = f"{mode} mode gives {came} where {due} is due, in element {i} of a product with a random vector"
            findings.add("everywhere", REFUTED, off(int(wrong.sum()), len(wrong)), detail)
            return
    findings.add("everywhere", VERIFIED, "products with random vectors, which a row or column left out would show")


def adjoint(comparison: Comparison, results: Results, count: int, findings: Findings) -> None:
    """⟨g, J v⟩ = ⟨Jᵀ g, v⟩: the two modes are each other's transposes. How near, only an oracle can say."""
    if len(results) < 2 or not comparison.oracle.credible.all():
        return
    (g, reverse), (v, forward) = results["reverse"], results["forward"]
    with np.errstate(all="ignore"):
        left, right = np.sum(g[:count] * forward.got[:count], 1), np.sum(v[:count] * reverse.got[:count], 1)
        allowed = np.sum(np.abs(g[:count]) * forward.allowed[:count], 1)
        allowed += np.sum(np.abs(v[:count]) * reverse.allowed[:count], 1)
        apart = np.abs(left - right) > allowed
    if apart.any():
        i = int(np.argmax(apart))
        detail = f"⟨g, Jv⟩ is {left[i]:.6g} and ⟨Jᵀg, v⟩ is {right[i]:.6g}"
        findings.add("adjoint", REFUTED, detail, f"the modes are not each other's transposes: {detail}")
    else:
        findings.add("adjoint", VERIFIED, f"⟨g, Jv⟩ = ⟨Jᵀg, v⟩ in {counted(count, 'direction')}")


def _under(variant: str) -> str:
    return "when eager" if variant == "eager" else f"under {variant}"
