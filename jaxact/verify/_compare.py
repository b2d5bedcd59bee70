"""Products of a rule held against the oracle, element by element."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from jaxact.verify._oracle import Oracle, Product
from jaxact.verify._problem import Problem


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """For each vector (row) and element (column): what came, what was due, and whether that will do."""

    got: np.ndarray
    product: Product
    allowed: np.ndarray
    wrong: np.ndarray
    unresolved: np.ndarray  # the oracle's own error is not well below what is allowed
    floor: np.ndarray  # below this XLA flushes to 0

    def rows(self, some: np.ndarray) -> "Verdicts":
        product = Product(*(getattr(self.product, f.name)[some] for f in dataclasses.fields(Product)))
        own = (getattr(self, name)[some] for name in ("allowed", "wrong", "unresolved", "floor"))
        return Verdicts(self.got[some], product, *own)

    def worst_in_units(self, unit: float) -> float:
        """The largest error in units of u·Σ|J||g|, where that is not 0."""
        with np.errstate(all="ignore"):
            units = np.abs(self.got - self.product.want) / (unit * self.product.size)
        return float(np.max(units, initial=0.0, where=np.isfinite(units) & (np.abs(self.product.want) > self.floor)))

    def worst(self, vectors: np.ndarray) -> tuple[int, int]:
        """Vector and element of the largest error, if possible of a one-hot vector, which shows it best."""
        with np.errstate(all="ignore"):
            off = np.abs(self.got - self.product.want) / self.allowed
        off = np.where(self.wrong, np.nan_to_num(off, nan=np.inf), -1)
        simple = ((vectors != 0).sum(1) == 1)[:, None] & self.wrong
        at = np.argmax(np.where(simple, off, -1) if simple.any() else off)
        return divmod(int(at), off.shape[1])


def compare(
    problem: Problem,
    oracle: Oracle,
    mode: str,
    vectors: np.ndarray,
    got: np.ndarray,
    bound: float,
    strict: bool,
    product: Product | None = None,
) -> Verdicts:
    """|error| ≤ bound·u·Σⱼ|Jᵢⱼ||vⱼ|, or, unless `strict`, what inputs off by `bound` units would explain as well."""
    product = product or oracle.product(mode, vectors)
    info = ml_dtypes.finfo(problem.dtype)
    # Below the smallest normal number XLA flushes to 0, results and what they are products of.
    floor = 4 * float(info.smallest_normal) * (1 + np.abs(vectors).sum(1, keepdims=True))
    base = bound * problem.unit * product.size + floor
    if not strict:
        base = base + product.conditioning
    with np.errstate(all="ignore"):
        error = np.abs(got - product.want)
        # What does not fit into the dtype is infinite there.
        overflow = (np.abs(product.want) >= float(info.max) * (1 - bound * problem.unit)) & (
            np.sign(got) == np.sign(product.want)
        )
        right = (error <= base) | (overflow & np.isinf(got))
        perhaps = error <= base + product.error
        unresolved = ((product.error > base) | (~right & perhaps)) & (got != product.want)
        wrong = ~right & ~perhaps
    if mode == "forward" or oracle.layout.elementwise:
        unresolved |= ~oracle.credible
        wrong &= oracle.credible
    elif oracle.infinite is not None:
        unresolved |= oracle.infinite
        wrong &= ~oracle.infinite
    return Verdicts(got, product, base, wrong, unresolved & ~wrong, floor)


def close(a: np.ndarray, b: np.ndarray, allowed: Any) -> np.ndarray:
    """|a − b| ≤ allowed, or the same infinity, or nan in both."""
    with np.errstate(all="ignore"):
        return (np.abs(a - b) <= allowed) | (a == b) | (np.isnan(a) & np.isnan(b))


def mutants(
    problem: Problem, oracle: Oracle, mode: str, vectors: np.ndarray, verdicts: Verdicts, bound: float
) -> dict[str, np.ndarray]:
    """Products as wrong rules would have them. Each must be refuted by the comparison that passed the right ones."""
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
        "1 + 3·bound": got * (1 + 3 * _least_visible(problem, verdicts, seen, bound)),
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


def _least_visible(problem: Problem, verdicts: Verdicts, seen: np.ndarray, bound: float) -> float:
    """The smallest relative error that a check with this bound should see, unless the bound is far too wide."""
    product = verdicts.product
    kept = min(1.0, DULL / bound, 0.25 / (bound * problem.unit))
    allowed = kept * (bound * problem.unit * product.size + product.conditioning) + verdicts.floor
    with np.errstate(all="ignore"):
        return float(np.min(np.where(seen, allowed / np.abs(product.want), np.inf)))
