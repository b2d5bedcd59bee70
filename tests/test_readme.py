"""The README is true: its table, its examples, and that importing jaxact imports nothing heavy."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxact

README = (Path(__file__).parent.parent / "README.md").read_text()
ROWS = re.findall(r"^\| `(.+?)` \| (\S+) \| (\S+) \| (\S+) \|$", README, re.MULTILINE)


def evaluate(expression: str, nn: ModuleType, losses: ModuleType) -> float:
    return float(eval(expression, {"jax": jax, "jnp": jnp, "nn": nn, "losses": losses}))


@pytest.mark.parametrize(("expression", "theirs", "ours", "exact"), ROWS)
def test_every_line_of_the_table(expression: str, theirs: str, ours: str, exact: str) -> None:
    # Five digits are printed.
    np.testing.assert_allclose(evaluate(expression, jaxact, jaxact.losses), float(ours), rtol=5e-5)
    np.testing.assert_allclose(evaluate(expression, jax.nn, optax.losses), float(theirs), rtol=5e-5)
    np.testing.assert_allclose(float(ours), float(exact), rtol=5e-5)


def test_the_table_was_found() -> None:
    assert len(ROWS) == 16


def test_every_example_runs() -> None:
    for package in ("flax", "equinox"):
        pytest.importorskip(package, reason="not a dependency; the examples run where it is, as in `.ci/run`")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    # What the section on verifying says is printed; the figures in a verified report, and whether float64 was
    # enough for the oracle, are those of one compiler.
    printed = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    missing, cancelled, mended = (names[n] for n in ("missing", "cancelled", "mended"))
    for text, report in zip(printed, (missing, cancelled), strict=False):
        assert text.splitlines() == [report.reasons[0], *report.witness.splitlines()]
    without_figures = [
        re.sub(r"[\d.]+ u·|in float64, by autodiff|in mpmath", "", text) for text in (printed[2].rstrip(), str(mended))
    ]
    assert without_figures[0] == without_figures[1]


def test_submodules_are_imported_where_they_are_used() -> None:
    code = "import jaxact; print(jaxact.verify.rule.__name__, jaxact.classifiers.predict.__name__); jaxact.softmin"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["rule", "predict"]
    assert "AttributeError: module 'jaxact' has no attribute 'softmin'" in run.stderr


def test_import_is_light() -> None:
    code = "import sys, jax; before = set(sys.modules); import jaxact; print(*sorted(set(sys.modules) - before))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jaxact.verify", "jaxact.classifiers", "jaxact._cli"} & set(modules)
    assert {m.split(".")[0] for m in modules} - {"jax"} == {"jaxact"}
