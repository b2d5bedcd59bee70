"""The command line: what `verify` checks, prints and writes, and how it says what is wrong."""

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import oracles
import pytest
from rich.console import Console

import jaxact
from jaxact._cli import _verify_references as references, _verify_subjects as subjects, main, verify
from jaxact._cli.verify import _table
from jaxact.verify import Report

RULES = """
import jax
import jax.numpy as jnp

@jax.custom_vjp
def right(x):
    return jnp.sin(x)

right.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))

@jax.custom_vjp
def wrong(x):
    return jnp.sin(x)

wrong.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (-g * jnp.cos(x),))

def product(x, y):
    return x @ y

def raises(x):
    raise RuntimeError("no such luck.\\nsecond line")

def leaves(x):
    raise SystemExit

number = 3
"""


def status(*argv: Any) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["verify", *map(str, argv)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory has a module `rules_of_mine`, and two that cannot be imported."""
    (tmp_path / "rules_of_mine.py").write_text(RULES, encoding="utf-8")
    (tmp_path / "broken_rules.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "leaving_rules.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "rules_of_mine", raising=False)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_names_are_of_the_subjects() -> None:
    assert tuple(subjects.SUBJECTS) == verify.NAMES
    assert tuple(subjects.DTYPES) == verify.DTYPES
    for name, subject in subjects.SUBJECTS.items():
        assert getattr(subject.f, "__name__", "") == name


@pytest.mark.long
def test_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verify, "cores", lambda: 1)  # in one process of its own: each must import JAX
    monkeypatch.setattr(verify, "DTYPES", ("float32", "bfloat16"))  # of four, which take as long again
    out = tmp_path / "new" / "folder"
    assert status("softplus", "--out", out) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.count("verified") == 3
    assert "3 checks: 3 verified, 0 refuted, 0 inconclusive; written to " in printed.out
    results = json.loads((out / "verify.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert set(results["versions"]) == {"python", "jaxact", "jax", "jaxlib", "numpy"}
    reports = results["reports"]
    assert {report["verdict"] for report in reports} == {"verified"}
    every = [report for report in reports if "every" in report["subject"]]
    assert [report["subject"] for report in every] == ["softplus, every bfloat16"]
    assert [report["facts"]["inputs"] for report in every] == [65536]
    rules = [report for report in reports if report not in every]
    assert [report["facts"]["oracle"] for report in rules] == ["exact derivative, exact_sigmoid"] * 2
    assert ["order 2" in [check["name"] for check in report["checks"]] for report in rules] == [True, False]
    text = (out / "verify.md").read_text(encoding="utf-8")
    assert text.count("\n### `softplus") == 3
    assert text.count("\n| softplus | ") == 2
    assert str(Path.home()) not in text
    assert (out / "verify.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("verdict", ["refuted", "inconclusive"])
def test_what_is_not_verified_is_shown(
    verdict: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Report("softmax(float32[3,5])", verdict, reasons=("because of | and ∞",), facts={"max": np.inf})
    monkeypatch.setattr(subjects.Subject, "rule", lambda self, dtype: made)
    monkeypatch.setattr(verify, "_processes", ThreadPoolExecutor)  # threads see the attribute that is set
    assert status("softmax", "--out", tmp_path) == 1
    printed = capsys.readouterr().out
    heading, row, *_ = printed.splitlines()  # not in a terminal
    assert heading.index("verdict") == row.index(verdict)
    assert "because of | and ∞" in printed
    assert f"4 {verdict}" in printed
    results = json.loads((tmp_path / "verify.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert results["reports"][0]["facts"]["max"] is None


def test_exhaustively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def values(f: Any, reference: Any, *, dtype: Any, points: Any, bound: float, progress: bool) -> Report:
        asked.append((np.dtype(dtype).name, points, bound))
        return Report("f", "verified", facts={"max ulp": 0.5}, checks=REPORT.checks)

    monkeypatch.setattr(subjects.Subject, "rule", lambda self, dtype: REPORT)
    monkeypatch.setattr(verify, "_processes", lambda most: ThreadPoolExecutor(1))  # in order
    monkeypatch.setattr(subjects, "values", values)
    assert status("logit", "softmax", "--exhaustive", "--out", tmp_path) == 0
    assert asked == [("bfloat16", "all", 0.51), ("float16", "all", 0.51), ("float32", "all", 3.5)]
    assert "logit, every float32:\n  verified: " in capsys.readouterr().out


REPORT = subjects.values(jaxact.sigmoid, references.sigmoid, dtype=np.float32, points=np.zeros(1))


@pytest.mark.parametrize("name", oracles.VALUE_AND_SLOPE)
def test_exact_slopes(name: str) -> None:
    # The references in NumPy are those of the other tests, and tested in test_sigmoid.py.
    parts = subjects.SUBJECTS[name].elementwise
    assert parts is not None
    x = subjects.rounded(subjects.SUBJECTS[name].args[0], "float64")
    with mpmath.workdps(60):
        slopes = [float(parts.exact_slope(mpmath.mpf(a))) for a in x]
    assert slopes == [oracles.exact(name, 1, float(a)) for a in x]


@pytest.mark.usefixtures("rules")
def test_a_right_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("rules_of_mine:right", "--shape", "4,3", "--dtype", "bfloat16", "--scale", "2") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("right(bfloat16[4,3]): verified\n")
    assert printed.err == ""


@pytest.mark.usefixtures("rules")
def test_a_wrong_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("rules_of_mine:wrong", "--shape", "5", "--seed", "3") == 1
    printed = capsys.readouterr().out
    assert printed.startswith("wrong(float32[5]): refuted\n")
    assert "the backward rule has the wrong sign" in printed


@pytest.mark.usefixtures("rules")
def test_several_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("rules_of_mine:product", "--shape", "2,3", "--shape", "3", "--dtype", "float64") == 0
    assert "product(float64[2,3], float64[3]): verified" in capsys.readouterr().out


def assert_one_sentence(capsys: pytest.CaptureFixture[str], message: str) -> None:
    printed = capsys.readouterr()
    assert "jaxact verify: error: " in printed.err
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.endswith(".\n")
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["relu"], "there is no function 'relu' to verify: choose from sigmoid, log_sigmoid, "),
        (["softplus", "--shape", "3"], "--shape needs module:function."),
        (["--seed", "3"], "--seed needs module:function."),
        (["--out", "rules_of_mine.py"], "cannot write to rules_of_mine.py: it is not a directory."),
        (["rules_of_mine:right"], "module:function needs --shape."),
        (["rules_of_mine:right", "sigmoid"], "'rules_of_mine:right' must be the only NAME."),
        (["rules_of_mine:right", "--shape", "3", "--out", "here"], "--out is for jaxact's functions, not for module"),
        (["rules_of_mine:right", "--shape", "3", "--exhaustive"], "--exhaustive is for jaxact's functions"),
        (["rules_of_mine:right", "--shape", "3x4"], "argument --shape: must be whole numbers with commas between"),
        (["rules_of_mine:right", "--shape=-3"], "argument --shape: must be whole numbers"),
        (["rules_of_mine:right", "--shape", "3", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["rules_of_mine:right", "--shape", "3", "--order", "0"], "argument --order: must be a whole number"),
        (["rules_of_mine:right", "--shape", "3", "--scale", "0"], "argument --scale: must be a positive number"),
        (["no_such_module:f", "--shape", "3"], "cannot import no_such_module: ModuleNotFoundError: No module named"),
        (["broken_rules:f", "--shape", "3"], "cannot import broken_rules: ZeroDivisionError: division by zero."),
        (["leaving_rules:f", "--shape", "3"], "cannot import leaving_rules: SystemExit: 3."),
        (["no_such_module:f"], "cannot import no_such_module: "),
        ([":f", "--shape", "3"], "':f' is not module:function, such as package.module:f."),
        (["rules_of_mine:", "--shape", "3"], "'rules_of_mine:' is not module:function, such as"),
        (["./rules_of_mine.py:right", "--shape", "3"], "'./rules_of_mine.py:right' is not module:function, such as"),
        (["rules_of_mine:left", "--shape", "3"], "rules_of_mine has no 'left'."),
        (["rules_of_mine:number", "--shape", "3"], "rules_of_mine:number is not callable: it is of type int."),
        (["rules_of_mine:raises", "--shape", "3"], "cannot verify rules_of_mine:raises: RuntimeError: no such luck."),
        (["rules_of_mine:leaves", "--shape", "3"], "cannot verify rules_of_mine:leaves: SystemExit: no message."),
        (["rules_of_mine:right", "--shape", "3", "--scale", "1e300"], "--scale 1e+300 is out of the range of float32."),
        (["rules_of_mine:product", "--shape", "3"], "cannot verify rules_of_mine:product: TypeError: "),
        (["rules_of_mine:right", "--shape", "999999999,999999999,999999999"], "cannot verify rules_of_mine:right: "),
    ],
)
@pytest.mark.usefixtures("rules")
def test_a_mistake_is_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*argv) == 2
    assert_one_sentence(capsys, message)


@pytest.mark.parametrize("package", ["mpmath", "rich", "matplotlib"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert status("--out", tmp_path / "out") == 2
    assert_one_sentence(capsys, f"cannot import {package}")
    assert list(tmp_path.iterdir()) == []


def test_as_a_module() -> None:
    root = Path(verify.__file__).parents[2]
    command = [sys.executable, "-m", "jaxact", "verify", "rely:on"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "python -m jaxact verify: error: cannot import rely: ModuleNotFoundError: No module named 'rely'.\n"
    )


@pytest.mark.parametrize("width", [60, 80, 120])
def test_names_and_dtypes_are_whole_in_a_narrow_terminal(width: int) -> None:
    name = "softmax_cross_entropy_with_integer_labels"
    console = Console(width=width, file=io.StringIO())
    console.print(_table([(name, "bfloat16", "inconclusive", "both", "2.90", "0.500", "10/10", "46.6", "f")], width))
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()[3:]]
    assert "".join(words[0] for words in lines if words) == name
    assert lines[0][1:3] == ["bfloat16", "inconclusive"]
