"""The command line: what `bench` measures, prints and writes, and how it says what is wrong. No test is of speed."""

import dataclasses
import functools
import io
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

import jaxact
from jaxact._cli import (
    _bench_compare as compare,
    _bench_figure as figure,
    _bench_measure as measure,
    _bench_report as report,
    _bench_subjects as subjects,
    bench,
    main,
)
from jaxact._cli._bench_measure import Cell, Ratio
from jaxact._cli._bench_report import Outcome

TINY: dict[str, tuple[subjects.Shape, ...]] = {"sigmoid": ((), (2, 2**13)), "softmax": ((8,),)}


def status(*argv: Any) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *map(str, argv)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two functions at small shapes in one dtype, few rounds."""
    monkeypatch.setattr(subjects, "DTYPES", ("float32",))
    monkeypatch.setattr(subjects, "beside_tokamax", dict)
    small = {n: dataclasses.replace(subjects.SUBJECTS[n], shapes=subjects.Shapes(s, s)) for n, s in TINY.items()}
    monkeypatch.setattr(subjects, "SUBJECTS", small)
    monkeypatch.setattr(measure, "SUBJECTS", small)
    monkeypatch.setattr(bench, "NAMES", tuple(TINY))
    monkeypatch.setattr(bench, "SECONDS", {"quick": 0, "full": 0})
    monkeypatch.setattr(bench, "IMPORTS", {"quick": 1, "full": 1})
    monkeypatch.setattr(measure, "LEAST", 0)
    monkeypatch.setattr(measure, "LENGTHY", 0)


def results(out: Path) -> dict[str, Any]:
    """The numbers in DIR, which must be JSON by the book; and the figure must be there."""
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((out / "bench.json").read_text(encoding="utf-8"), parse_constant=refuse)


def made_up(ratio: float = 1.0, spread: float = 0.0, **fields: Any) -> Cell:
    cell = Cell(
        "softmax", "jax.nn", "float32", (128, 256), 2**17, "jit", "value", {"ours": ratio, "peer": 1.0},
        Ratio(ratio, spread), Ratio(2.0, 0.0), (0.3, 0.2), (0, 4), None,
    )  # fmt: skip
    return cell._replace(**fields)


def outcome(*cells: Cell, **fields: Any) -> Outcome:
    return dataclasses.replace(Outcome(True, 1.0, list(cells), (0.5, 0.02), 2, {"softmax": 1.5}), **fields)


def test_names_are_of_the_subjects() -> None:
    assert tuple(subjects.SUBJECTS) == bench.NAMES
    assert bench.SECONDS.keys() == bench.IMPORTS.keys() == set(subjects.Shapes._fields)


@pytest.mark.long
@pytest.mark.parametrize("name", bench.NAMES)
def test_peers_compute_the_same(name: str) -> None:
    subject = subjects.SUBJECTS[name]
    arguments = subject.arguments((4, 8, 16) if name == "linear_cross_entropy" else (4, 8), "float32")
    # A few roundings of the peer's: the functions need to be the same, not as accurate.
    np.testing.assert_allclose(
        jax.jit(subject.ours)(*arguments), jax.jit(subject.peer)(*arguments), rtol=1e-5, atol=1e-5
    )


@pytest.mark.usefixtures("tiny")
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert status("--quick", "--out", out) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert [line.split()[:2] for line in lines[:6]] == [
        ["dtype", "shape"], ["sigmoid,", "beside"], ["float32", "scalar"], ["float32", "2×8192"],
        ["softmax,", "beside"], ["float32", "8"],
    ]  # fmt: skip
    assert max(map(len, lines[:6])) <= 120
    for text in ("Value and gradient take ", "Eager: ", "Compiling: ", "import jaxact adds ", "~ a spread above 10%"):
        assert text in printed.out
    found = results(out)
    assert set(found["versions"]) == {"python", "jaxact", "jax", "jaxlib", "numpy", "optax"}
    assert set(found["hardware"]) == {"cpu", "cores", "memory", "device"}
    cells = found["cells"]
    # With and without the gradient: sigmoid under jit at 2 shapes and eager at one, softmax at one in both.
    assert len(cells) == 2 * (2 + 1 + 2)
    for cell in cells:
        ours, peer = cell["seconds"]["ours"], cell["seconds"]["peer"]
        assert min(ours, peer, cell["of_peer"]["ratio"]) > 0
        assert (cell["of_limit"] is not None) == (cell["bytes"] >= 2**16)
        assert (cell["kept"] is not None) == (cell["mode"] == "jit" and cell["what"] == "value+gradient")
    assert [c["bytes"] for c in cells if c["shape"] == [2, 8192]] == [2**16] * 2
    kept = next(c["kept"] for c in cells if c["shape"] == [2, 8192] and c["kept"])
    assert kept[0] == 2**16  # the values
    text = (out / "bench.md").read_text(encoding="utf-8")
    assert text.count("\n| sigmoid | jax.nn | ") == 2
    assert str(Path.home()) not in text


def test_the_scale_is_of_the_logits() -> None:
    def deviations(scale: float) -> list[float]:
        of = bench._tasks([*bench.NAMES], "quick", scale)
        return [float(np.std(s.arguments((40, 50), "float32")[0])) for name, s, *_ in of if name not in apart]

    apart = {"logit", "linear_cross_entropy"}  # which have probabilities, and features
    assert deviations(8.0) == pytest.approx(8 * np.array(deviations(1.0)))
    (_, head, *_), *_ = bench._tasks(["linear_cross_entropy"], "quick", 8.0)
    x, w, _ = head.arguments((40, 64, 50), "float32")
    assert np.std(x @ w) == pytest.approx(8, rel=0.1)  # over 2000 logits that are not independent


def test_a_run_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gradient = made_up(what="value+gradient", kept=(4, 4))
    runs = iter([outcome(made_up(1.0), gradient), outcome(made_up(1.5), gradient)])
    monkeypatch.setattr(bench, "_measured", lambda *_: next(runs))
    assert status("--out", tmp_path) == 0
    assert status("--out", tmp_path / "second", "--compare", tmp_path / "bench.json") == 0
    said = "1 of 2 cells of both runs have changed by more than both spreads and 5 %."
    assert said in capsys.readouterr().out
    text = (tmp_path / "second" / "bench.md").read_text(encoding="utf-8")
    assert text.index("## Since bench.json") < text.index("| 1.00 ±0.00 | 1.50 ±0.00 | 1.50 |") < text.index(said)


@pytest.mark.parametrize("width", [80, 118])
def test_the_table_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [made_up(99.99, shape=(128, 131072)), made_up(99.99, what="value+gradient", shape=(128, 131072))]
    monkeypatch.setattr(measure, "cells", lambda *_: made)
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=True, width=width, color_system=None)
    tasks: list[bench.Task] = [("sigmoid", subjects.SUBJECTS["sigmoid"], "bfloat16", (128, 131072))]
    with Progress(console=console, disable=True) as bar:
        assert list(bench._rows(tasks, 0, bar, bar.add_task(""), console)) == [made]
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert ("kept" in lines[-3]) == (width >= 118)


def test_ratios_are_paired() -> None:
    # The machine is ten times slower in the last rounds, for both.
    slow = np.array([1, 1, 1, 10, 10])
    assert measure.ratio(3 * slow, 2 * slow) == Ratio(1.5, 0.0)
    found = measure.ratio(np.array([1.0, 2, 3, 4, 5]), np.ones(5))
    assert found == (3, pytest.approx(1 / 3))
    assert not found.certain
    assert Ratio(3, 0.1).certain


def test_calls_are_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LEAST", 0)
    monkeypatch.setattr(measure, "ROUNDS", (12, 12))
    calls: list[str] = []
    times = measure.in_turns({name: lambda name=name: calls.append(name) for name in "abc"}, 0)  # type: ignore[misc]
    assert {name: len(of) for name, of in times.items()} == {"a": 12, "b": 12, "c": 12}
    rounds = np.array(calls[6:]).reshape(12, 3)  # after warming up
    assert {tuple(sorted(of)) for of in rounds} == {("a", "b", "c")}
    assert len({tuple(of) for of in rounds}) == 6  # every order


def test_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", (1, 1))
    short: list[int] = []
    long: list[int] = []

    def slow() -> None:
        long.append(0)
        time.sleep(2 * measure.LEAST)

    measure.in_turns({"short": lambda: short.append(0), "long": slow}, 0)
    assert len(long) == 3
    assert len(short) > 10


@pytest.mark.parametrize(("lengthy", "times"), [(0, 1), (math.inf, 2)])
def test_short_compiling_is_repeated(lengthy: float, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LENGTHY", lengthy)
    traced: list[str] = []

    def tracing(who: str, x: Any) -> Any:
        traced.append(who)
        return x

    ours, peer = (functools.partial(tracing, who) for who in measure.BOTH)
    subject = dataclasses.replace(subjects.SUBJECTS["sigmoid"], ours=ours, peer=peer)
    compiled, seconds = measure._compiled(measure._value, subject, (jnp.ones(3),))
    assert sorted(traced) == ["ours"] * times + ["peer"] * times
    assert compiled.keys() == set(measure.BOTH)
    assert min(seconds) > 0


def test_the_gradient_is_of_the_first_arguments() -> None:
    value, gradients = measure._with_gradient(lambda x, y: x * y, 1)(jnp.ones(()), jnp.float32(3), jnp.float32(5))
    assert (value, gradients) == (15, (5,))


def test_the_copy_is_of_the_same_bytes() -> None:
    given = subjects.SUBJECTS["softmax"].arguments((16, 64), "bfloat16")
    call: Any = measure._limit(subjects.SUBJECTS["softmax"], "value", given, jax.eval_shape(jaxact.softmax, *given))
    (x,) = call.args
    # What is read and written, in both.
    assert 2 * x.nbytes == 2 * 16 * 64 * 2


def test_the_limit_of_the_head_is_its_products() -> None:
    head = subjects.SUBJECTS["linear_cross_entropy"]
    x, w, labels = head.arguments((4, 8, 16), "bfloat16")
    given = (jnp.ones(()), x, w, labels)
    dx, dw = measure._limit(head, "value+gradient", given, None)()
    assert (dx.shape, dw.shape) == (x.shape, w.shape)
    assert measure._limit(head, "value", given[1:], None)().shape == (4, 16)


def test_the_summary() -> None:
    cells = [
        made_up(2.0, 0.2), made_up(0.5, what="value+gradient", kept=(100, 100)),
        made_up(8.0, what="value+gradient", dtype="bfloat16", kept=(300, 100), compiling=(3.0, 1.0)),
        made_up(1.04, 0.5, dtype="bfloat16"),
        made_up(90.0, bytes=4, shape=(), compiling=None, mode="eager"),
        made_up(70.0, bytes=2**10, shape=(256,)), made_up(60.0, peer="tokamax"),
    ]  # fmt: skip
    text = "\n".join(report.summary(outcome(*cells)))
    # The geometric means of 0.5 and 8, and of 2 and 1.04.
    assert "Value and gradient take 2.00 of the peers' time, the value 1.44: geometric means of 2 cells" in text
    assert "Slower by more than 5 %: 2 of 4 cells, 1 of them uncertain (~): softmax bfloat16 128×256 value+" in text
    assert "Eager: 90.00 of the peers' time (median), at most 90.0 ±0.0, softmax float32 scalar value" in text
    assert "at most 3.0, softmax bfloat16 128×256 value+gradient" in text
    assert "Kept for the backward pass, more than by the peer: softmax 3 times (bfloat16 128×256)" in text
    assert "import jaxact adds 20 ms to the 500 ms of import jax" in text
    assert "Speed-up of value and gradient from 1 to 2 cores: softmax 1.50" in text
    many = "\n".join(report.summary(outcome(*[made_up(1.5)] * 6, made_up(0.5, what="value+gradient"))))
    assert "Slower by more than 5 %: 6 of 7 cells, most of all softmax float32" in many
    fine = "\n".join(report.summary(outcome(made_up(1.05), made_up(1.0, what="value+gradient", kept=(1, 1)))))
    assert "Slower by more than 5 %: 0 of 2 cells\n" in fine
    assert "more than by the peer: by none" in fine


def test_a_spread_is_flagged() -> None:
    cells = [made_up(1.0, 0.3, of_limit=Ratio(3.0, 0.01)), made_up(0.5, 0.02, what="value+gradient", kept=(2**20, 0))]
    cells.append(made_up(1.25, 0.2, mode="eager"))
    assert report.row(cells) == (
        "float32", "128×256", "1.00 ±0.30~", "3.00", "0.50 ±0.01", "2.00", "1.25~", "0/0.0", "1.0/0", "1.5/1.5",
    )  # fmt: skip


def test_changes_are_found(tmp_path: Path) -> None:
    before = [made_up(1.0, 0.02), made_up(1.0, 0.3, what="value+gradient"), made_up(1.0, dtype="bfloat16")]
    file = tmp_path / "old.json"
    numbers = report.as_json(outcome(*before, made_up(9.0, function="gone")))
    numbers["versions"]["jax"], numbers["scale"] = "0.0.1", 8.0
    file.write_text(json.dumps(numbers), encoding="utf-8")
    after = [made_up(1.2, 0.05), made_up(1.2, what="value+gradient"), made_up(1.04, dtype="bfloat16")]
    now = outcome(*after, made_up(5.0, function="new"))
    rows, notes = compare.changes(compare.read(file), now)
    assert rows == [("1.00 ±0.02", "1.20 ±0.06", "1.20", "float32", "128×256", "jit", "value", "softmax")]
    assert notes[0] == "1 of 3 cells of both runs have changed by more than both spreads and 5 %"
    assert notes[1:] == [f"Other versions: jax 0.0.1 → {now.versions['jax']}", "Other logits: scale 8.0 → 1.0"]
    large, small = made_up(1.5), made_up(9.0, what="value+gradient", bytes=4)
    assert [row[0] for row in compare.changes(compare.read(file), outcome(small, large))[0]] == [
        "1.00 ±0.02",
        "1.00 ±0.30~",
    ]
    halved, _ = compare.changes(compare.read(file), outcome(made_up(0.5, 0.1)))
    assert halved[0][2] == "0.50"


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    small = outcome(made_up(1.0, bytes=4, of_limit=None), made_up(1.0, np.inf, bytes=4, what="value+gradient"))
    assert math.isnan(small.mean("value"))
    small.cells = [made_up(1.0, 0.2, bytes=4, what=what, kept=(4, 4)) for what in ("value", "value+gradient")]
    assert report.write(small, ["## More"], tmp_path) == ["bench.json", "bench.md", "bench.png"]
    assert results(tmp_path)["geometric_means"] == {"value": None, "value+gradient": None}
    assert (tmp_path / "bench.md").read_text(encoding="utf-8").endswith("## More")


def test_the_figure_says_the_point() -> None:
    def texts(*cells: Cell) -> str:
        return "\n".join(text.get_text() for text in figure.draw(outcome(*cells)).texts)

    fast = made_up(0.8, what="value+gradient")
    title = "Value and gradient take 0.80 of the time of jax.nn and optax"
    assert f"{title}\nNo function is slower by more than 5 % at any" in texts(fast)
    slow = made_up(3.0, 0.4, dtype="bfloat16", function="softmax_cross_entropy_with_integer_labels")
    assert "1 of 2 points are slower by more than 5 %, the slowest takes 3.0 times its peer's" in texts(fast, slow)
    assert "Only arrays below 64 KiB were measured" in texts(made_up(bytes=4))


@pytest.mark.skipif(sys.platform != "linux", reason="the names of files are text here")
def test_a_run_is_compared_with_a_file_whose_name_is_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_measured", lambda *_: outcome(made_up(), made_up(what="value+gradient", kept=(4, 4))))
    assert status("--out", tmp_path) == 0
    old = (tmp_path / "bench.json").rename(tmp_path / os.fsdecode(b"\xff.json"))
    assert status("--out", tmp_path, "--compare", old) == 0
    assert "## Since ?.json" in (tmp_path / "bench.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads cannot be kept to a core here")
def test_the_speedup_is_of_all_threads_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    every = os.sched_getaffinity(0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: every | {1000})  # more than one, on any machine
    kept: list[tuple[int, set[int]]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda *call: kept.append(call))
    found = measure.speedup("softmax", (8,), 0)
    assert found is not None
    assert found > 0
    threads = {int(thread.name) for thread in Path("/proc/self/task").iterdir()}
    one = {min(every)}
    assert {thread for thread, cores in kept if cores == one} >= threads
    assert [cores for _, cores in kept[-len(threads) :]] == [every | {1000}] * len(threads)


def test_cores_whose_speedup_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: {0}, raising=False)
    assert measure.speedup("softmax", (8,), 0) is None
    assert "Cores: this system cannot keep threads to one" in report._scaling(outcome(speedup={}))
    assert report._scaling(outcome(speedup={}, cores=1)) == "Cores: there is only one"


def assert_one_sentence(capsys: pytest.CaptureFixture[str], message: str) -> None:
    printed = capsys.readouterr()
    assert "jaxact bench: error: " in printed.err
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.endswith(".\n")
    assert printed.out == ""


NO_CELLS = ['{"cells": [{}], "versions": {}, "hardware": {}}', "[]", "{", '{"cells": 3}', "3", "\xff", "", "[" * 10**5]
NO_RATIOS = ["0.0", "null", "9" * 400]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["relu"], "there is no function 'relu' to measure: choose from sigmoid, log_sigmoid, "),
        (["--scale", "0"], "argument --scale: must be a positive number, got '0'."),
        (["--scale", "1e38"], "--scale 1e+38 is out of the range of float32."),
        (["--compare", "absent.json"], "cannot read absent.json: No such file or directory."),
        (["--compare", "."], "cannot read .: Is a directory."),
        (["--out", "file"], "cannot write to file: it is not a directory."),
        (["--out", "file/below"], "cannot write to file/below: Not a directory."),
        *((["--compare", f"{i}.json"], f"{i}.json is not a bench.json that") for i in range(len(NO_CELLS + NO_RATIOS))),
    ],
)
def test_a_mistake_is_named(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("measuring has started")

    monkeypatch.setattr(bench, "_measured", refuse)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    good = json.dumps(report.as_json(outcome(made_up(1.5))))
    odd = [good.replace('"ratio": 1.5', f'"ratio": {ratio}') for ratio in NO_RATIOS]
    for i, text in enumerate((*NO_CELLS, *odd)):
        Path(f"{i}.json").write_text(text, encoding="latin-1")
    assert status(*argv) == 2
    assert_one_sentence(capsys, message)
    assert not Path("bench").exists()


@pytest.mark.parametrize("package", ["optax", "matplotlib", "rich"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert status("--out", tmp_path / "out") == 2
    assert_one_sentence(capsys, "pip install 'jaxact[demo]'.")
    assert list(tmp_path.iterdir()) == []
