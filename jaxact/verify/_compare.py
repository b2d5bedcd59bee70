"""Products of a rule held against the oracle, element by element."""

import dataclasses
from typing import Any, NamedTuple

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
    floor: np.ndarray  # what may be lost of small numbers

    def rows(self, some: np.ndarray) -> "Verdicts":
        product = Product(*(getattr(self.product, f.name)[some] for f in dataclasses.fields(Product)))
        own = (getattr(self, name)[some] for name in ("allowed", "wrong", "unresolved", "floor"))
        return Verdicts(self.got[some], product, *own)

    def worst_in_units(self, unit: float) -> float:
        """The largest error in units of u·Σ|J||g|, where that is not 0, beyond what may be lost."""
        with np.errstate(all="ignore"):
            error = np.maximum(np.abs(self.got - self.product.want) - self.floor, 0)
            units = error / (unit * self.product.size)
        return float(np.max(units, initial=0.0, where=np.isfinite(units)))

    def worst(self, vectors: np.ndarray) -> tuple[int, int]:
        """Vector and element of the largest error, if possible of a one-hot vector, which shows it best."""
        with np.errstate(all="ignore"):
            off = np.abs(self.got - self.product.want) / self.allowed
        off = np.where(self.wrong, np.nan_to_num(off, nan=np.inf), -1)
        simple = ((vectors != 0).sum(1) == 1)[:, None] & self.wrong
        at = np.argmax(np.where(simple, off, -1) if simple.any() else off)
        return divmod(int(at), off.shape[1])


class Comparison(NamedTuple):
    """What products are held against, and how closely."""

    problem: Problem
    oracle: Oracle
    bound: float  # in u·Σ|J||g|
    strict: bool  # whether the bound is the user's own

    def products(self, mode: str, vectors: np.ndarray, got: np.ndarray, product: Product | None = None) -> Verdicts:
        """|error| ≤ bound·u·Σⱼ|Jᵢⱼ||vⱼ|, or, unless `strict`, what inputs off by `bound` units would explain too."""
        product = product or self.oracle.product(mode, vectors)
        info = ml_dtypes.finfo(self.problem.dtype)
        # Results, and what they are products of. Those of an elementwise function may be an exponential, which is lost
        # from −log of that on, and a factor like x or x².
        lost, factors = self.problem.lost, np.abs(vectors)
        if self.oracle.layout.elementwise:
            factors = factors * (1 + np.fmin(np.abs(self.problem.x), -np.log(lost))) ** 2  # of an input of nan too
        else:
            factors = factors.sum(1, keepdims=True)
        floor = 4 * lost * (1 + factors)
        base = self.bound * self.problem.unit * product.size + floor
        if not self.strict:
            base = base + product.conditioning
        with np.errstate(all="ignore"):
            error = np.abs(got - product.want)
            # What does not fit into the dtype is infinite there.
            overflow = (np.abs(product.want) >= float(info.max) * (1 - self.bound * self.problem.unit)) & (
                np.sign(got) == np.sign(product.want)
            )
            right = (error <= base) | (overflow & np.isinf(got))
            perhaps = error <= base + product.error
            unresolved = ((product.error > base) | (~right & perhaps)) & (got != product.want)
            wrong = ~right & ~perhaps
        if mode == "forward" or self.oracle.layout.elementwise:
            unresolved |= ~self.oracle.credible
            wrong &= self.oracle.credible
        elif self.oracle.infinite is not None:
            unresolved |= self.oracle.infinite
            wrong &= ~self.oracle.infinite
        return Verdicts(got, product, base, wrong, unresolved & ~wrong, floor)


def close(a: np.ndarray, b: np.ndarray, allowed: Any) -> np.ndarray:
    """|a − b| ≤ allowed, or the same infinity, or nan in both."""
    with np.errstate(all="ignore"):
        return (np.abs(a - b) <= allowed) | (a == b) | (np.isnan(a) & np.isnan(b))
