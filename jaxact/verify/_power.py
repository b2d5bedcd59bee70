"""Could the check have failed? Mutants of the products, as wrong rules would have them, must be refuted."""

import math

import numpy as np

from jaxact.verify._compare import Comparison, Verdicts
from jaxact.verify._report import INCONCLUSIVE, POWERLESS, REFUTED, VERIFIED, Findings


def power(comparison: Comparison, results: dict[str, tuple[np.ndarray, Verdicts]], findings: Findings) -> str:
    """How many mutants are refuted, and the smallest relative error that would be, for the report."""
    fates: dict[str, bool] = {}
    smallest = math.inf
    for mode, (vectors, verdicts) in results.items():
        # Some of the one-hot vectors will do: what a mutant does wrong, it does with all of them.
        some = np.unique(np.linspace(0, len(vectors) - 1, 96).astype(int))
        vectors, verdicts = vectors[some], verdicts.rows(some)
        for name, mutant in mutants(comparison, mode, vectors, verdicts).items():
            wrong = comparison.products(mode, vectors, mutant, verdicts.product).wrong
            fates[f"{name} ({mode})"] = bool(wrong.any())
        with np.errstate(all="ignore"):
            relative = verdicts.allowed / np.abs(verdicts.product.want)
        smallest = min(smallest, float(np.nanmin(np.where(verdicts.unresolved, np.inf, relative))))
    refuted = f"{sum(fates.values())} of {len(fates)} mutants refuted"
    survivors = ", ".join(name for name, killed in fates.items() if not killed)
    if fates and not survivors:
        findings.add("power", VERIFIED, refuted)
    else:
        why = f"it does not refute {survivors}" if survivors else "no mutant of its products can be made"
        # Where it has refuted it can; and a mutant of a wrong product may be right.
        findings.add("power", INCONCLUSIVE, why, "" if findings.verdict == REFUTED else f"{POWERLESS}: {why}")
    return f"{refuted}; sees a relative error of {smallest:.2g}" if smallest < math.inf else refuted


def mutants(comparison: Comparison, mode: str, vectors: np.ndarray, verdicts: Verdicts) -> dict[str, np.ndarray]:
    """Products as wrong rules would have them. Each must be refuted by the comparison that passed the right ones."""
    problem, oracle, *_ = comparison
    want = verdicts.product.want
    got = np.nan_to_num(verdicts.got, nan=0, posinf=0, neginf=0)
    seen = np.abs(want) > 4 * verdicts.allowed
    seen &= ~verdicts.unresolved & np.isfinite(verdicts.got)
    if not want.any() and not verdicts.unresolved.any():
        return {"1 added": got + 1}
    if not seen.any():
        return {}
    one = np.zeros(got.shape[1], bool)
    one[np.argmax(np.where(seen, np.abs(want), 0).max(0))] = True
    made = {
        "zero": got * 0,
        "−1×": -got,
        "1 + 3·bound": got * (1 + 3 * _least_visible(comparison, verdicts, seen)),
        "one element zeroed": np.where(one, 0, got),
    }
    if oracle.layout.elementwise and problem.n > 1:
        size = np.where(seen, np.abs(want), 0).max(0)
        live = size > 0
        tail = live & (size <= np.quantile(size[live], 0.1))
        made["tail zeroed"] = np.where(tail, 0, got)
    elif oracle.layout.whole and not oracle.layout.elementwise:
        full = oracle.jacobian.reverse
        if full.shape[0] == full.shape[1] and np.any(full - np.diag(np.diag(full))):
            made["sum dropped"] = vectors * np.diag(full)
            if np.any(np.abs(full - full.T) > 1e-3 * np.abs(full).max()):
                made["transposed"] = vectors @ (full.T if mode == "reverse" else full)
    return made


# A bound beyond so many units, or beyond a quarter, is none: mutants this far off must still be refuted.
DULL = 1024


def _least_visible(comparison: Comparison, verdicts: Verdicts, seen: np.ndarray) -> float:
    """The smallest relative error that a check with this bound should see, unless the bound is far too wide."""
    (problem, _, bound, _), product = comparison, verdicts.product
    kept = min(1.0, DULL / bound, 0.25 / (bound * problem.unit))
    allowed = kept * (bound * problem.unit * product.size + product.conditioning) + verdicts.floor
    with np.errstate(all="ignore"):
        return float(np.min(np.where(seen, allowed / np.abs(product.want), np.inf)))
