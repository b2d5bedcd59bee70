"""One verification by `rule`: the checks in their order, and what each of them found."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxact.verify import _diagnosis as diagnosis
from jaxact.verify._batch import in_a_batch, one_array_in_a_batch
from jaxact.verify._compare import Comparison
from jaxact.verify._contract import check_contract, is_missing_mode
from jaxact.verify._edges import given_points, swept_points
from jaxact.verify._oracle import find_oracle
from jaxact.verify._other_values import allowed, other_values, values_apart
from jaxact.verify._power import power
from jaxact.verify._problem import Problem
from jaxact.verify._products import Results, adjoint, alone, everywhere, in_the_vector, products
from jaxact.verify._reference import kind_of
from jaxact.verify._report import (
    ABSENT,
    INCONCLUSIVE,
    POWERLESS,
    REFUTED,
    UNKNOWN,
    VERIFIED,
    Check,
    Findings,
    Report,
    first_line,
    name_of,
    type_text,
)
from jaxact.verify._residuals import residuals

MODES = ("reverse", "forward")
TRANSFORMS = ("jit", "vmap", "remat")
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
    problem: Problem = dataclasses.field(init=False)
    modes: tuple[str, ...] = dataclasses.field(init=False)
    rng: np.random.Generator = dataclasses.field(init=False)
    comparison: Comparison = dataclasses.field(init=False)
    findings: Findings = dataclasses.field(init=False)
    special: str = dataclasses.field(init=False)  # what becomes of nan and ±inf in a batch

    def run(self) -> Report:
        # nan is looked for here, and put in; and arguments are moved to the device without being asked for.
        with jax.debug_nans(False), jax.debug_infs(False), jax.transfer_guard("allow"):
            return self._run()

    def _run(self) -> Report:
        self.problem = problem = Problem(self.f, self.args)
        subject = f"{name_of(self.f)}({', '.join(map(_describe, jax.tree.leaves(self.args)))})"
        if problem.n == 0 or problem.m == 0:
            return Report(subject, INCONCLUSIVE, reasons=("there is no element to check",))
        self.findings = findings = Findings()
        self.special = ""
        if not (self._formal() and self._find_modes()):
            return Report(subject, REFUTED, tuple(findings.checks), tuple(findings.reasons))
        self.rng = np.random.default_rng(self.seed)
        self.comparison = comparison = self._find_comparison()
        self._primal()
        results = {
            mode: products(comparison, mode, self.transforms, self.directions, self.rng, findings)
            for mode in self.modes
        }
        alone(comparison, results, findings)
        kind = comparison.oracle.kind
        if kind in ("f", "jax"):
            everywhere(comparison, self.reference if kind == "jax" else problem.f, self.modes, self.rng, findings)
        adjoint(comparison, results, self.directions, findings)
        if findings.verdict == REFUTED and kind == "f" and problem.loops:
            findings.reasons.append(
                "if a loop of f ends before its limit, what f computes has another derivative: give derivative="
            )
        if (comparison.oracle.another or (findings.verdict == REFUTED and kind != "f")) and problem.draws:
            findings.reasons.append(
                "if the random numbers that f draws are others in float64, give it what is drawn, and not the key"
            )
        seen = power(comparison, results, findings)
        if findings.verdict != REFUTED:
            self._edges()
            if self.order > 1:
                self._higher()
            self._vmap(results)
        bound = comparison.bound
        facts = {
            "oracle": comparison.oracle.name,
            "bound": f"{bound:g} u = {bound * problem.unit:.3g} of Σ|J||g| ({problem.dtype})"
            + ("" if self.given_bound else f", and what inputs off by {BOUND:g} u explain"),
            "products checked": sum(len(vectors) for vectors, _ in results.values()),
            "modes": list(self.modes),
            "residual bytes": self._residual_bytes(),
            "power": seen,
            **({} if comparison.oracle.layout.whole else {"looked at": comparison.oracle.layout.extent(problem)}),
            **({"nan and ±inf in a batch": self.special} if self.special else {}),
            "seed": self.seed,
        }
        refuted = findings.verdict == REFUTED  # what is wrong before what is not known
        reasons = tuple(sorted(findings.reasons, key=lambda r: refuted and r.startswith((UNKNOWN, POWERLESS))))
        checks = tuple(findings.checks)
        return Report(subject, findings.verdict, checks, reasons, facts, findings.witness)

    def _residual_bytes(self) -> Any:
        if "reverse" not in self.modes:
            return "no reverse mode"
        try:
            return residuals(self.f, *self.args).facts["bytes"]
        except Exception as error:  # what has a reverse mode when called eagerly alone
            return f"not known, since to trace reverse mode raises {type(error).__name__}"

    def _formal(self) -> bool:
        formal = check_contract(self.problem, leaks=False)
        self.findings.add("contract", formal.verdict, "; ".join(formal.reasons) or "shapes, dtypes and trees")
        self.findings.reasons += formal.reasons
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
                if is_missing_mode(error) and mode not in self.wanted:
                    self.findings.add(mode, ABSENT, why)
                else:
                    self.findings.add(mode, REFUTED, why, f"{mode} mode: {why}")
        self.modes = tuple(m for m in present if not self.wanted or m in self.wanted)
        if not present and not self.findings.reasons:
            self.findings.reasons.append("f has neither reverse nor forward mode")
        return not self.findings.reasons

    def _find_comparison(self) -> Comparison:
        bound = self.given_bound or BOUND
        oracle = find_oracle(self.problem, self.reference, self.derivative, bound, self.rng)
        if self.given_bound is None and self.problem.dtype == np.float64 and not oracle.exact:
            bound = 1024.0
        return Comparison(self.problem, oracle, bound, strict=self.given_bound is not None)

    def _primal(self) -> None:
        """Values: of the rules' forward passes, of f under transformations, of the reference."""
        problem, reasons = self.problem, self.findings.reasons
        reference = self.reference if self.knows_value else None
        others = other_values(self.comparison, self.modes, reference, self.transforms)
        if "jit" in self.transforms:
            try:
                others["f under jit"] = problem.value("jit")
            except Exception as error:
                reasons.append(f"f raises {type(error).__name__} under jit")
        for name, i, came, due in values_apart(others, problem.value(), allowed(self.comparison)):
            reasons.append(f"{name} is {came} where f is {due} (output {i})")
        if reasons:
            self.findings.add("primal", REFUTED, "; ".join(reasons))
        else:
            whose = "and the reference agree" if "the reference" in others else "agree"
            self.findings.add("primal", VERIFIED, f"f, its rules' forward passes {whose}")

    def _edges(self) -> None:
        given, oracle = self.edges if isinstance(self.edges, dict) else {}, self.comparison.oracle
        if given and not oracle.layout.elementwise:
            reason = "edges are for an elementwise function, and f is not elementwise at args"
            self.findings.add("edges", INCONCLUSIVE, "f is not elementwise at args", reason)
        if self.edges is None or not oracle.layout.elementwise:
            return
        if given:
            self._found(*given_points(self.problem, given, self.modes, self.comparison.bound))
        elif self.edges is ... and not oracle.another:
            self._found(*swept_points(self.comparison, self.reference, self.derivative, self.modes, self.rng))

    def _found(self, check: Check, witness: str = "") -> None:
        """Adds a check whose detail is the reason, unless it is verified, and the lines that show it."""
        reason = "" if check.verdict in (VERIFIED, ABSENT) else check.detail
        self.findings.add(check.name, check.verdict, check.detail, reason)
        self.findings.witness = self.findings.witness or witness

    def _vmap(self, results: Results) -> None:
        if "vmap" not in self.transforms:
            return
        vectors = {mode: every[: self.directions] for mode, (every, _) in results.items()}
        # As `jax.jacobian` does it: vectors alone are a batch, and the arguments are not.
        for mode, of in vectors.items():
            try:
                wrong = self.comparison.products(mode, of, self.problem.products(mode, "vmap", of)).wrong
                why = "is wrong" if wrong.any() else ""
            except Exception as error:
                why = f"raises {type(error).__name__}: {first_line(error)}"
            if why:
                self._found(Check("vmap", REFUTED, f"{mode} mode {why} for a batch of vectors alone"))
                return
        check, self.special = in_a_batch(self.comparison, vectors, self.rng)
        why = "" if check.verdict == REFUTED else one_array_in_a_batch(self.comparison, vectors)
        self._found(Check("vmap", REFUTED, why) if why else check)

    def _has_slopes_in_jax(self) -> bool:
        """Whether what was given as the derivative are slopes, and JAX can differentiate them."""
        try:
            return self.comparison.oracle.layout.elementwise and kind_of(self.problem, self.derivative) == "jax"
        except ValueError:  # Jacobians have other shapes
            return False

    def _higher(self) -> None:
        """The same for the derivative along a fixed vector, as a function of the arguments."""
        mode, name = self.modes[0], "order 2" if self.order == 2 else f"orders 2 to {self.order}"
        oracle = self.comparison.oracle
        given = oracle.kind == "derivative" and self._has_slopes_in_jax()
        if not given and (not oracle.autodiff or (oracle.kind == "numpy" and not oracle.exact)):
            why = "of a second derivative there is no oracle where autodiff of what f computes is wrong"
            self.findings.add(name, INCONCLUSIVE, why, f"{why}; give derivative=, or reference=, in JAX")
            return
        for each in self.modes:
            if wrong := in_the_vector(self.comparison, each, self.directions, self.rng):
                detail = f"{wrong[0]}, with respect to the vector, {wrong[1]}"
                self.findings.add(name, REFUTED, detail, f"second derivative: {detail}")
                return
        normal = self.rng.normal(size=(1, self.problem.vector_size(mode)))
        vector = self.problem.rounded(normal, self.problem.vector_shapes(mode))
        ours = diagnosis.derivative_along(self.problem, self.problem.f, mode, vector, None)
        if given:
            exact = diagnosis.slopes_along(self.problem, self.derivative, vector)
        else:
            theirs = self.reference if oracle.kind == "jax" else self.problem.f
            exact = diagnosis.derivative_along(self.problem, theirs, mode, vector, np.float64)
        transforms = tuple(t for t in self.transforms if t == "jit")
        report = dataclasses.replace(
            self, f=ours, reference=exact, derivative=None, wanted=(), order=self.order - 1, transforms=transforms,
            edges=None, knows_value=False,
        ).run()  # fmt: skip
        telling = [c for c in report.checks if c.verdict == report.verdict]
        # Of what is verified the largest error, and of what is not the first thing found.
        found = max(telling, key=lambda c: -1 if c.worst is None else c.worst, default=None)
        self.findings.add(name, report.verdict, found.detail if found else "")
        self.findings.reasons += [f"second derivative: {r}" for r in report.reasons]


def _describe(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return repr(leaf)
    return type_text(leaf.shape, leaf.dtype)
