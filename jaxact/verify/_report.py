"""What a check found: verdicts with their evidence, as text, JSON and Markdown."""

import dataclasses
import functools
import json
import math
from typing import Any, Final, Literal

import numpy as np

Verdict = Literal["verified", "refuted", "inconclusive"]
VERIFIED: Final = "verified"
REFUTED: Final = "refuted"
INCONCLUSIVE: Final = "inconclusive"
UNKNOWN = "the oracle does not know"  # how a reason begins that says why there is no verdict
POWERLESS = "the check cannot fail"  # and one that says that a wrong product would have passed
ABSENT: Final = "absent"  # of a check: there was nothing to check


class NotVerified(AssertionError):
    """Raised by `Report.raise_if_not_ok`; its message is the report."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was checked: `verdict`, or "absent" where there was nothing to check.

    `worst` is the largest error of a product in u·Σ|J||g|, of a check that measures it.
    """

    name: str
    verdict: Verdict | Literal["absent"]
    detail: str
    worst: float | None = None


@dataclasses.dataclass
class Findings:
    """What has been found so far."""

    checks: list[Check] = dataclasses.field(default_factory=list)
    reasons: list[str] = dataclasses.field(default_factory=list)
    witness: str = ""

    def add(
        self, name: str, verdict: Verdict | Literal["absent"], detail: str, reason: str = "", worst: float | None = None
    ) -> None:
        self.checks.append(Check(name, verdict, detail, worst))
        if reason:
            self.reasons.append(reason)

    @property
    def verdict(self) -> Verdict:
        return verdict_of([c.verdict for c in self.checks])


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The result of a verification; true if the verdict is "verified".

    Attributes:
        subject: what was verified.
        verdict: "verified", "refuted" or "inconclusive". Inconclusive is not a pass: `reasons` says what is missing.
        checks: what was checked, each with its verdict.
        reasons: sentences for the author: what is wrong, or why there is no verdict.
        facts: oracle, bound, products checked, power, residual bytes and the like; plain values, for JSON.
        witness: lines to paste into a REPL, with `f` and `args` as they were given, that show a wrong product of first
            derivatives; empty where nothing or something else is refuted.
    """

    subject: str
    verdict: Verdict
    checks: tuple[Check, ...] = ()
    reasons: tuple[str, ...] = ()
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    witness: str = ""

    @property
    def ok(self) -> bool:
        """Whether the verdict is "verified"."""
        return self.verdict == VERIFIED

    def __bool__(self) -> bool:
        return self.ok

    def raise_if_not_ok(self) -> None:
        """Raises `NotVerified`, an `AssertionError` whose message is the report, unless the verdict is "verified"."""
        if not self:
            raise NotVerified(str(self))

    def __str__(self) -> str:
        lines = [f"{self.subject}: {self.verdict}", *(f"  {reason}" for reason in self.reasons)]
        width = max((len(c.name) for c in self.checks), default=0)
        lines += [f"  {_MARKS[c.verdict]} {c.name:{width}}  {c.detail}" for c in self.checks]
        lines += [f"  {name}: {_plain(value)}" for name, value in self.facts.items()]
        if self.witness:
            lines += ["  to see it:", *(f"    {line}" for line in self.witness.splitlines())]
        return "\n".join(lines)

    __repr__ = __str__

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(_finite(dataclasses.asdict(self)), indent=2, ensure_ascii=False, default=_plain)

    def to_markdown(self) -> str:
        """The report as a section of Markdown."""
        lines = [f"### `{self.subject}`: {self.verdict}", "", *(f"{reason}\n" for reason in self.reasons)]
        lines += ["| check | verdict | |", "|---|---|---|"]
        lines += [f"| {c.name} | {c.verdict} | {_cell(c.detail)} |" for c in self.checks]
        lines += ["", *(f"- {name}: {_plain(value)}" for name, value in self.facts.items())]
        if self.witness:
            lines += ["", "```python", self.witness, "```"]
        return "\n".join(lines) + "\n"


_MARKS = {VERIFIED: "✓", REFUTED: "✗", INCONCLUSIVE: "?", ABSENT: "–"}


def name_of(f: Any) -> str:
    f = f.func if isinstance(f, functools.partial) else f
    return getattr(f, "__name__", None) or type(f).__name__


def type_text(shape: tuple[int, ...], dtype: Any) -> str:
    """As JAX writes it: float32[8,7]."""
    name = dtype.name if hasattr(dtype, "name") else np.dtype(dtype).name  # that of a key is no type of NumPy
    return f"{name}[{','.join(map(str, shape))}]"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def as_code(number: float) -> str:
    return repr(float(number)).replace("inf", "jnp.inf").replace("nan", "jnp.nan")


def off(wrong: int, size: int) -> str:
    return f"{wrong} of {counted(size, 'element')} {'is' if wrong == 1 else 'are'} off"


def first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def apart(a: float, b: float) -> tuple[str, str]:
    """Two numbers with as many digits as it takes to tell them apart."""
    texts = ((f"{a:.{digits}g}", f"{b:.{digits}g}") for digits in (5, 7, 9, 17))
    return next((pair for pair in texts if pair[0] != pair[1]), (repr(a), repr(b)))


def verdict_of(verdicts: list[Any]) -> Verdict:
    """Refuted if anything is, verified only if nothing is left open."""
    if REFUTED in verdicts:
        return REFUTED
    return INCONCLUSIVE if INCONCLUSIVE in verdicts or VERIFIED not in verdicts else VERIFIED


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)


def _finite(value: Any) -> Any:
    """The same with nan and infinities as text, since JSON has none."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
