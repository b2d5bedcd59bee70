"""One verification by `rule`: the checks in their order, and what each of them found."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxact.verify import _diagnosis as diagnosis
from jaxact.verify._batch import in_a_batch
from jaxact.verify._compare import Verdicts, close, compare, mutants
from jaxact.verify._contract import check_contract, first_line, is_missing_mode
from jaxact.verify._edges import edge_points
from jaxact.verify._oracle import ANOTHER, Oracle, find_oracle, reference_value
from jaxact.verify._problem import Problem
from jaxact.verify._report import INCONCLUSIVE, REFUTED, VERIFIED, Check, Report, name_of, type_text, verdict_of
from jaxact.verify._residuals import residuals

MODES = ("reverse", "forward")
TRANSFORMS = ("jit", "vmap", "remat")
ONE_HOT = 1024  # one-hot vectors at most
BOUND = 8.0  # units, where none is given


@dataclasses.dataclass
class Session:
    """One verification: what `rule` was called with, and what has been found so far."""

    f: Any
    args: tuple[Any, ...]
    reference: Any
    derivative: Any
    wanted: tuple[str, ...]
    order: int
    given_bound: float | None
    transforms: tuple[str, ...]
    edges: Any
    directions: int
    seed: int
    knows_value: bool = True  # whether the reference's value is accurate; that of a derivative need not be

    def run(self) -> Report:
        self.problem = problem = Problem(self.f, self.args)
        self.subject = f"{name_of(self.f)}({', '.join(map(_describe, jax.tree.leaves(self.args)))})"
        if problem.n == 0 or problem.m == 0:
            return Report(self.subject, INCONCLUSIVE, reasons=("there is no element to check",))
        self.checks: list[Check] = []
        self.reasons: list[str] = []
        self.witness = self.special = ""
        if not (self._formal() and self._find_modes()):
            return Report(self.subject, REFUTED, tuple(self.checks), tuple(self.reasons))
        self.rng = np.random.default_rng(self.seed)
        self.bound = self.given_bound or BOUND
        self.oracle = find_oracle(problem, self.reference, self.derivative, self.bound, self.rng)
        if self.given_bound is None and problem.dtype == np.float64 and not self.oracle.exact:
            self.bound = 1024.0
        self.killed, self.made, self.smallest, self.points = 0, 0, math.inf, 0
        self._primal()
        results = {mode: self._mode(mode) for mode in self.modes}
        self._alone(results)
        self._adjoint(results)
        self._power(results)
        if verdict_of([c.verdict for c in self.checks]) != REFUTED:
            self._edges()
            if self.order > 1:
                self._higher()
            self._vmap(results)
        facts = {
            "oracle": self.oracle.name,
            "bound": f"{self.bound:g} u = {self.bound * problem.unit:.3g} of Σ|J||g| ({problem.dtype})"
            + ("" if self.given_bound else f", and what inputs off by {BOUND:g} u explain"),
            "products checked": self.points,
            "modes": list(self.modes),
            "residual bytes": self._residual_bytes(),
            "power": f"{self.killed} of {self.made} mutants refuted; sees a relative error of {self.smallest:.2g}",
            **({"nan and ±inf in a batch": self.special} if self.special else {}),
            "seed": self.seed,
        }
        verdict = verdict_of([c.verdict for c in self.checks])
        return Report(self.subject, verdict, tuple(self.checks), tuple(self.reasons), facts, self.witness)

    def _residual_bytes(self) -> Any:
        return residuals(self.f, *self.args).facts["bytes"] if "reverse" in self.modes else "no reverse mode"

    def _formal(self) -> bool:
        formal = check_contract(self.problem, leaks=False)
        self.checks.append(Check("contract", formal.verdict, "; ".join(formal.reasons) or "shapes, dtypes and trees"))
        self.reasons += formal.reasons
        return formal.verdict != REFUTED

    def _find_modes(self) -> bool:
        """Finds the modes of `f`; says whether there is one, with all that are wanted, and none raises an error."""
        present = []
        for mode in MODES:
            try:
                self.problem.products(mode, "eager", np.zeros((1, self.problem.vector_size(mode))))
                present.append(mode)
            except Exception as error:
                why = f"{type(error).__name__}: {first_line(error)}"
                missing = is_missing_mode(error) and mode not in self.wanted
                self.checks.append(Check(mode, "absent" if missing else REFUTED, why))
                if not missing:
                    self.reasons.append(f"{mode} mode: {why}")
        self.modes = tuple(m for m in present if not self.wanted or m in self.wanted)
        if not present and not self.reasons:
            self.reasons.append("f has neither reverse nor forward mode")
        return not self.reasons

    def _primal(self) -> None:
        """Values: of the rules' forward passes, of f under transformations, of the reference."""
        problem = self.problem
        self.value, self.allowed = problem.value(), self._allowed(problem, self.oracle)
        others = self.other_values(problem, self.oracle)
        if "jit" in self.transforms:
            try:
                others["f under jit"] = problem.value("jit")
            except Exception as error:
                self.reasons.append(f"f raises {type(error).__name__} under jit")
        for name, i, came, due in _apart(others, self.value, self.allowed):
            self.reasons.append(f"{name} is {came} where f is {due} (output {i})")
        if self.reasons:
            self.checks.append(Check("primal", REFUTED, "; ".join(self.reasons)))
        else:
            whose = "and the reference agree" if "the reference" in others else "agree"
            self.checks.append(Check("primal", VERIFIED, f"f, its rules' forward passes {whose}"))

    def _allowed(self, problem: Problem, oracle: Oracle) -> np.ndarray:
        """How far values may be apart."""
        size = problem.unit * np.abs(problem.value())
        if self.given_bound is None and oracle.layout.whole:
            size = size + problem.unit * oracle.product("forward", np.abs(problem.x)[None]).size[0]
        # What is flushed to 0 may have been a factor of the input.
        factor = 1 + np.abs(problem.x) if oracle.layout.elementwise else 1
        return self.bound * size + 4 * float(ml_dtypes.finfo(problem.dtype).smallest_normal) * factor

    def other_values(self, problem: Problem, oracle: Oracle) -> dict[str, np.ndarray]:
        """What should be the value of f as well."""
        others = {f"the {mode} rule's own primal": problem.primal_of(mode) for mode in self.modes}
        if self.knows_value and oracle.layout.whole:
            reference = reference_value(problem, self.reference)
            others |= {} if reference is None else {"the reference": reference}
        return others

    def other_value(self, problem: Problem, oracle: Oracle) -> tuple[str, int, str, str] | None:
        """Which of them is not, at which output, and what the two are. An infinite reference may be one of mpmath's."""
        others, value = self.other_values(problem, oracle), problem.value()
        if "the reference" in others:
            others["the reference"] = np.where(np.isfinite(others["the reference"]), others["the reference"], value)
        return next(_apart(others, value, self._allowed(problem, oracle)), None)

    def _mode(self, mode: str) -> tuple[np.ndarray, Verdicts]:
        problem = self.problem
        dense, one_hot = self._vectors(mode)
        every = np.concatenate([dense, one_hot])
        self.points += len(every)
        found: dict[str, Verdicts] = {}
        for variant in ("eager", *(t for t in self.transforms if t != "vmap")):
            vectors = every if variant == "jit" else dense
            try:
                got = problem.products(mode, variant, vectors)
            except Exception as error:
                self.checks.append(Check(f"{mode}, {variant}", REFUTED, f"{type(error).__name__}: {first_line(error)}"))
                self.reasons.append(f"{mode} mode raises {type(error).__name__} {_under(variant)}")
                continue
            found[variant] = self._compare(mode, vectors, got)
        main = found.get("jit") or self._compare(mode, every, problem.products(mode, "eager", every))
        for variant, verdicts in found.items():
            self._judge(mode, variant, verdicts, len(verdicts.got))
        self._explain(mode, found, every, len(dense))
        return every, main

    def _compare(self, mode: str, vectors: np.ndarray, got: np.ndarray, product: Any = None) -> Verdicts:
        strict = self.given_bound is not None
        return compare(self.problem, self.oracle, mode, vectors, got, self.bound, strict, product)

    def _judge(self, mode: str, variant: str, verdicts: Verdicts, count: int) -> None:
        name, size = f"{mode}, {variant}", verdicts.wrong.shape[1]
        open_ones, doubtful = int(verdicts.unresolved.any(0).sum()), int((~self.oracle.credible).sum())
        if verdicts.wrong.any():
            wrong = int(verdicts.wrong.any(0).sum())
            self.checks.append(Check(name, REFUTED, f"{wrong} of {size} elements are off in {count} products"))
        elif open_ones or doubtful:
            unknown = f"{open_ones} of {size} elements" if open_ones else f"{doubtful} of {self.problem.m} outputs"
            self.checks.append(Check(name, INCONCLUSIVE, f"the oracle does not know {unknown}"))
            why = self.oracle.doubt or "its own error is not well below the bound"
            if not any(r.startswith("the oracle does not know") for r in self.reasons):
                self.reasons.append(f"the oracle does not know {unknown}: {why}; give reference= or derivative=")
        else:
            worst = verdicts.worst_in_units(self.problem.unit)
            self.checks.append(
                Check(name, VERIFIED, f"{count} products, the worst element off by {worst:.2f} u·Σ|J||g|")
            )

    def _alone(self, results: dict[str, tuple[np.ndarray, Verdicts]]) -> None:
        """With one argument differentiated at a time: a rule may be told which are."""
        problem = self.problem
        if len(problem.in_shapes) == 1 or not self.oracle.layout.whole:
            return
        for mode, (vectors, _) in results.items():
            try:
                vectors, got = problem.one_by_one(mode, vectors[:1])
                wrong = self._compare(mode, vectors, got).wrong
            except Exception as error:
                detail = f"raises {type(error).__name__}: {first_line(error)}"
            else:
                if not wrong.any():
                    continue
                detail = f"is wrong in element {int(np.argmax(wrong.any(0)))}"
            self.checks.append(Check("one argument", REFUTED, f"{mode} mode {detail}"))
            self.reasons.append(f"with one argument differentiated and the others not, {mode} mode {detail}")
            return
        self.checks.append(Check("one argument", VERIFIED, "differentiated alone, each as with the others"))

    def _explain(self, mode: str, found: dict[str, Verdicts], vectors: np.ndarray, dense: int) -> None:
        """A sentence on what is wrong in a mode: with the rule, or with one way of calling it."""
        plain = [v for v in ("jit", "eager") if v in found]
        apart = [v for v in found if found[v].wrong.any()]
        if not apart:
            return
        right = [v for v in ("eager", "jit") if v in found and not found[v].wrong[:dense].any()]
        if right and any(found[v].wrong[:dense].any() for v in apart):
            variant = next(v for v in apart if found[v].wrong[:dense].any())
            self.reasons.append(f"right {_under(right[0])}, wrong {_under(variant)} ({mode} mode)")
        else:
            variant = next(v for v in (*plain, *apart) if v in apart)
        verdicts = found[variant]
        c, i = verdicts.worst(vectors[: len(verdicts.got)])
        if not right or variant == "jit":
            self.reasons.append(
                diagnosis.explain(self.problem, self.oracle, mode, vectors[: len(verdicts.got)], verdicts, c, i)
            )
        if not self.witness:
            self.witness = diagnosis.witness(self.problem, self.oracle, mode, vectors[c], verdicts, c, i)

    def _vectors(self, mode: str) -> tuple[np.ndarray, np.ndarray]:
        """Random directions, large and small ones and with an offset, and zero; and one-hot ones."""
        problem = self.problem
        size = problem.vector_size(mode)
        known = np.zeros(size, bool)
        known[self.oracle.index(mode)] = True
        if mode == "reverse":
            known &= self.oracle.credible
        normal = self.rng.normal(size=(self.directions, size))
        big, small = (64.0, 2.0**-6) if problem.dtype == np.float16 else (4096.0, 2.0**-30)
        if self.directions > 1:
            normal[-1] *= small
        dense = np.concatenate([normal, 1000 + normal[:1], -normal[:1], big * normal[:1], 0 * normal[:1]])
        where = np.flatnonzero(known)
        if len(where) > ONE_HOT:
            where = np.sort(self.rng.choice(where, ONE_HOT, replace=False))
        one_hot = np.zeros((len(where), size))
        one_hot[np.arange(len(where)), where] = 1
        return problem.rounded(dense * known, problem.vector_shapes(mode)), one_hot

    def _adjoint(self, results: dict[str, tuple[np.ndarray, Verdicts]]) -> None:
        """⟨g, J v⟩ = ⟨Jᵀ g, v⟩: the two modes are each other's transposes. How near, only an oracle can say."""
        if len(results) < 2 or not self.oracle.credible.all():
            return
        (g, reverse), (v, forward) = results["reverse"], results["forward"]
        count = self.directions
        with np.errstate(all="ignore"):
            left, right = np.sum(g[:count] * forward.got[:count], 1), np.sum(v[:count] * reverse.got[:count], 1)
            allowed = np.sum(np.abs(g[:count]) * forward.allowed[:count], 1)
            allowed += np.sum(np.abs(v[:count]) * reverse.allowed[:count], 1)
            apart = np.abs(left - right) > allowed
        if apart.any():
            i = int(np.argmax(apart))
            detail = f"⟨g, Jv⟩ is {left[i]:.6g} and ⟨Jᵀg, v⟩ is {right[i]:.6g}"
            self.checks.append(Check("adjoint", REFUTED, detail))
            self.reasons.append(f"the modes are not each other's transposes: {detail}")
        else:
            self.checks.append(Check("adjoint", VERIFIED, f"⟨g, Jv⟩ = ⟨Jᵀg, v⟩ in {count} directions"))

    def _power(self, results: dict[str, tuple[np.ndarray, Verdicts]]) -> None:
        """Would it have been noticed? Mutants of the products must be refuted."""
        fates: dict[str, bool] = {}
        for mode, (vectors, verdicts) in results.items():
            # Some of the one-hot vectors will do: what a mutant does wrong, it does with all of them.
            some = np.unique(np.linspace(0, len(vectors) - 1, 96).astype(int))
            vectors, verdicts = vectors[some], verdicts.rows(some)
            for name, mutant in mutants(self.problem, self.oracle, mode, vectors, verdicts, self.bound).items():
                fates[f"{name} ({mode})"] = bool(self._compare(mode, vectors, mutant, verdicts.product).wrong.any())
            with np.errstate(all="ignore"):
                relative = verdicts.allowed / np.abs(verdicts.product.want)
            self.smallest = min(self.smallest, float(np.nanmin(np.where(verdicts.unresolved, np.inf, relative))))
        self.made, self.killed = len(fates), sum(fates.values())
        survivors = ", ".join(name for name, killed in fates.items() if not killed)
        if fates and not survivors:
            self.checks.append(Check("power", VERIFIED, f"{self.killed} of {self.made} mutants refuted"))
        else:
            why = f"it does not refute {survivors}" if survivors else "no mutant of its products can be made"
            self.checks.append(Check("power", INCONCLUSIVE, why))
            self.reasons.append(f"the check cannot fail: {why}")

    def _edges(self) -> None:
        given = self.edges if isinstance(self.edges, dict) else {}
        if given and not self.oracle.layout.elementwise:
            self.checks.append(Check("edges", INCONCLUSIVE, "f is not elementwise at args"))
            self.reasons.append("edges are for an elementwise function, and f is not elementwise at args")
        if self.edges is None or not self.oracle.layout.elementwise or self.oracle.doubt == ANOTHER:
            return
        self.checks.append(edge_points(self, given))
        if self.checks[-1].verdict == REFUTED:
            self.reasons.append(self.checks[-1].detail)

    def _vmap(self, results: dict[str, tuple[np.ndarray, Verdicts]]) -> None:
        if "vmap" not in self.transforms:
            return
        vectors = {mode: every[: self.directions] for mode, (every, _) in results.items()}
        # As `jax.jacobian` does it: vectors alone are a batch, and the arguments are not.
        for mode, of in vectors.items():
            try:
                wrong = ~self.right(mode, of, self.problem.products(mode, "vmap", of))
                why = "is wrong" if wrong.any() else ""
            except Exception as error:
                why = f"raises {type(error).__name__}: {first_line(error)}"
            if why:
                self.checks.append(Check("vmap", REFUTED, f"{mode} mode {why} for a batch of vectors alone"))
                self.reasons.append(self.checks[-1].detail)
                return
        check, self.special = in_a_batch(self, vectors)
        self.checks.append(check)
        if self.checks[-1].verdict == REFUTED:
            self.reasons.append(self.checks[-1].detail)

    def right(self, what: str, vectors: np.ndarray, got: np.ndarray) -> np.ndarray:
        """Which elements of values, or of products with the vectors, will do."""
        return close(got, self.value, self.allowed) if what == "value" else ~self._compare(what, vectors, got).wrong

    def _higher(self) -> None:
        """The same for the derivative along a fixed vector, as a function of the arguments."""
        mode, name = self.modes[0], "order 2" if self.order == 2 else f"orders 2 to {self.order}"
        of_numpy = self.oracle.name.startswith("reference in NumPy") and not self.oracle.exact
        if not self.oracle.autodiff or of_numpy:
            why = "of a second derivative there is no oracle where autodiff of what f computes is wrong"
            self.checks.append(Check(name, INCONCLUSIVE, why))
            self.reasons.append(f"{why}; give derivative=, or reference=, in JAX")
            return
        normal = self.rng.normal(size=(1, self.problem.vector_size(mode)))
        vector = self.problem.rounded(normal, self.problem.vector_shapes(mode))
        ours = diagnosis.derivative_along(self.problem, self.problem.f, mode, vector, None)
        theirs = self.reference if self.oracle.name.startswith("reference in JAX") else self.problem.f
        exact = diagnosis.derivative_along(self.problem, theirs, mode, vector, np.float64)
        transforms = tuple(t for t in self.transforms if t == "jit")
        report = dataclasses.replace(
            self, f=ours, reference=exact, derivative=None, wanted=(), order=self.order - 1, transforms=transforms,
            edges=None, knows_value=False,
        ).run()  # fmt: skip
        worst = next((c.detail for c in report.checks if c.verdict == report.verdict), "")
        self.checks.append(Check(name, report.verdict, worst))
        self.reasons += [f"second derivative: {r}" for r in report.reasons]


def _apart(
    others: dict[str, np.ndarray], value: np.ndarray, allowed: np.ndarray
) -> Iterator[tuple[str, int, str, str]]:
    for name, other in sorted(others.items()):
        wrong = ~close(other, value, allowed)
        if wrong.any():
            i = int(np.argmax(wrong))
            yield name, i, *diagnosis.apart(other[i], value[i])


def _under(variant: str) -> str:
    return "when eager" if variant == "eager" else f"under {variant}"


def _describe(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return repr(leaf)
    return type_text(leaf.shape, leaf.dtype)
