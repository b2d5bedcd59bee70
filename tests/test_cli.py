"""The command line: what `converge` computes, prints and writes, and how it says what is wrong."""

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import jaxact
from jaxact import classifiers
from jaxact._cli import converge, main
from jaxact._cli._converge_figure import _gaps
from jaxact._cli._converge_report import Outcome
from jaxact.classifiers import Fit, Params, Twins

ROWS = ["2,1,0,no", "4,3,0,yes", "1,5,0,no", "6,2,0,yes", "3,3,0,yes", "0,1,0,no"]


def status(*argv: Any) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in argv])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def write(path: Path, *rows: str, header: str = "a,b,same,class") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def results(out: Path) -> dict[str, Any]:
    """The numbers in DIR, which must be JSON by the book; and the figures must be there."""
    assert (out / "converge.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "converge.svg").stat().st_size > 10_000

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((out / "converge.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_default_data_agrees_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("converge", "--steps", 60, "--out", tmp_path / "new" / "folder") == 0
    report = results(tmp_path / "new" / "folder")
    ours = report["results"]["jaxact"]
    assert len(ours["sigmoid"]["loss"]) == 60
    assert ours["sigmoid"]["loss"] == ours["softmax"]["loss"]
    assert ours["largest_gap"] == {"absolute": 0, "ulp": 0, "relative": 0}
    assert ours["weight_gap"] == 0
    assert ours["steps_with_the_same_bits"] == 60
    assert ours["smallest_softmax_loss"] == min(ours["softmax"]["loss"])
    # The numbers are of the training that the library does.
    assert ours["sigmoid"]["loss"] == np.float32(ours["sigmoid"]["loss"]).tolist()
    assert ours["sigmoid"]["loss"][-1] < ours["sigmoid"]["loss"][0] / 4
    assert ours["sigmoid"]["accuracy"] > 0.9
    assert (report["data"]["examples"], len(report["data"]["features"])) == (569, 30)
    assert len(report["decision"]["logit"]) == 569
    assert np.shape(ours["softmax"]["weights"]) == (2, 30)
    peer = report["results"]["jax.nn + optax"]
    # The same mathematics in another order of operations: a few roundings of float32 in 60 steps.
    np.testing.assert_allclose(peer["softmax"]["loss"], ours["softmax"]["loss"], rtol=1e-5)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Training 2 x 2 classifiers for 60 steps, sgd." in printed.out
    assert "60 of 60" in printed.out
    assert "The two classifiers are the same model: all 60 losses agree bit for bit." in printed.out


@pytest.mark.long
def test_own_data_in_float64_with_any_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data.csv"
    file.write_text('\ufeff"x,1",same, $y_1$\n1,7, $no^\n\n \t\n2,7,[bold]日本"\n3,7,$no^\n', encoding="utf-8")
    options = ["--optimizer", "adamw", "--float64", "--steps", 20, "--seed", 3]
    assert status("converge", "--csv", file, "--label", "$y_1$", *options, "--out", tmp_path) == 0
    report = results(tmp_path)
    ours = report["results"]["jaxact"]
    assert ours["sigmoid"]["loss"] == ours["softmax"]["loss"]
    assert ours["sigmoid"]["loss"] != np.float32(ours["sigmoid"]["loss"]).tolist()
    assert report["data"]["features"] == ["x,1", "same"]
    assert report["data"]["classes"] == ["$no^", '[bold]日本"']
    assert report["data"]["labels"] == [0, 1, 0]
    assert (report["settings"]["optimizer"], report["settings"]["seed"]) == ("adamw", 3)
    described = """data.csv: 3 examples, 2 features; class 0 is '$no^', class 1 is '[bold]日本"'."""
    assert described in capsys.readouterr().out


@pytest.mark.parametrize("name", converge.OPTIMIZERS)
def test_optimizers_exist(name: str) -> None:
    optimizer, options, decay = converge.OPTIMIZERS[name]
    updates = getattr(optax, optimizer)(0.5, **options)
    assert updates.init(np.zeros(2)) is not None
    assert (decay > 0) == (name == "adamw")


def test_features_are_standardised(tmp_path: Path) -> None:
    huge = write(tmp_path / "huge.csv", "1e308,1,7,b", "-1e308,1.5,7,a", "5e307,2,7,b")
    data = converge.read_csv(huge, "class")
    # Three roundings of float64 in a mean of three.
    np.testing.assert_allclose(data.x.mean(axis=0), 0, atol=1e-15)
    np.testing.assert_allclose(data.x.std(axis=0), [1, 1, 0], rtol=1e-15)
    np.testing.assert_array_equal(data.x[:, 2], 0)
    assert data.y.tolist() == [1, 0, 1]


@pytest.mark.long
def test_unmatched_rates_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "data.csv", *ROWS)
    assert status("converge", "--csv", file, "--label", "class", "--unmatched", "--steps", 20, "--out", tmp_path) == 0
    ours = results(tmp_path)["results"]["jaxact"]
    assert ours["sigmoid"]["loss"][0] == ours["softmax"]["loss"][0]
    assert ours["largest_gap"]["relative"] > 0.05
    assert ours["weight_gap"] > 0.05
    assert "The two classifiers are out of step: " in capsys.readouterr().out


@pytest.mark.long
def test_unmatched_rates_may_make_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*rows: str, steps: int) -> str:
        file = write(tmp_path / "data.csv", *rows, header="a,class")
        argv = ["--csv", file, "--label", "class", "--unmatched", "--steps", steps, "--out", tmp_path]
        assert status("converge", *argv) == 0
        return capsys.readouterr().out

    once = printed("1,no", "2,yes", steps=1)
    assert "2 examples, 1 feature; " in once
    assert "for 1 step, sgd." in once
    assert "are not the same model: the loss agrees bit for bit, the weights do not." in once
    constant = printed("7,no", "7,yes", steps=3)
    assert "are the same model: all 3 losses agree bit for bit." in constant


@pytest.mark.skipif(sys.platform != "linux", reason="the names of files are text here")
def test_a_file_name_that_is_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "train_twins", lambda *_, **__: trained(1, 0.5))
    file = write(tmp_path / os.fsdecode(b"\xff.csv"), *ROWS)
    assert status("converge", "--csv", file, "--label", "class", "--steps", 2, "--out", tmp_path) == 0
    assert results(tmp_path)["data"]["name"] == "?.csv"


def test_control_characters_in_a_class_are_not_in_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "train_twins", lambda *_, **__: trained(1, 0.5))
    file = write(tmp_path / "data.csv", "1,2,3,x\x01", "2,3,4,\uffff")
    assert status("converge", "--csv", file, "--label", "class", "--steps", 2, "--out", tmp_path) == 0
    ElementTree.parse(tmp_path / "converge.svg")
    assert results(tmp_path)["data"]["classes"] == ["x\x01", "\uffff"]


def test_a_gap_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_peer_loss = functools.partial(classifiers.train_twins, loss=converge.peer_loss)
    monkeypatch.setattr(classifiers, "train_twins", lambda *args, **options: with_peer_loss(*args, **options))
    assert status("converge", "--steps", 60, "--out", tmp_path) == 0
    same = results(tmp_path)["results"]["jaxact"]["steps_with_the_same_bits"]
    assert same < 60
    assert f"The two classifiers are not the same bit for bit: {same} of 60 losses agree" in capsys.readouterr().out


def trained(*losses: float) -> Twins:
    """What `train_twins` might return for ROWS."""
    loss = np.array(losses, np.float32)
    return Twins(*(Fit(loss, 0.5, Params(jnp.zeros((logits, 3)), jnp.zeros(logits))) for logits in (1, 2)))


def test_divergence_is_reported_and_is_null_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(classifiers, "train_twins", lambda *_, **__: trained(1, np.inf, np.nan))
    file = write(tmp_path / "data.csv", *ROWS)
    assert status("converge", "--csv", file, "--label", "class", "--steps", 3, "--out", tmp_path) == 0
    ours = results(tmp_path)["results"]["jaxact"]
    assert ours["sigmoid"]["loss"] == [1, None, None]
    assert ours["largest_gap"]["absolute"] is None
    assert ours["steps_with_the_same_bits"] == 1
    assert "not comparable: from step 2 on a loss is not finite, so lower the learning rate." in capsys.readouterr().out


BAD_FILES = {
    "empty": ([], "", "data.csv is empty."),
    "header only": ([], "a,class", "data.csv has no rows below its header."),
    "no label": (ROWS, "a,b,c,d", "data.csv has no column 'class'; its columns are 'a', 'b', 'c', 'd'."),
    "label alone": (["no", "yes"], "class", "data.csv has no feature: its only column is the label 'class'."),
    "twice": (ROWS, "a,a,b,class", "data.csv has two columns called 'a'."),
    "one class": (ROWS[:1], "a,b,c,class", "must hold two distinct values, it holds only 'no'."),
    "three": ([*ROWS, "1,1,1,?"], "a,b,c,class", "must hold two distinct values, it holds 3 values: '?', 'no', 'yes'."),
    "text": (["1,2,3,no", "1,x,3,yes"], "a,b,c,class", "row 2 (line 3), column 'b': 'x' is not a number."),
    "blank": (["1,2,3,no", "", "1,2,,yes"], "a,b,c,class", "row 2 (line 4), column 'c': the cell is blank."),
    "blank label": (["1,2,3, "], "a,b,c,class", "row 1 (line 2), column 'class': the label is blank."),
    "nan label": (["1,2,3,NaN"], "a,b,c,class", "row 1 (line 2), column 'class': the label is NaN."),
    "nan": (["nan,2,3,no"], "a,b,c,class", "row 1 (line 2), column 'a': 'nan' is not a finite number."),
    "overflow": (["1,2,1e999,no"], "a,b,c,class", "row 1 (line 2), column 'c': '1e999' is not a finite number."),
    "short": (["1,2,3,no", "1,2"], "a,b,c,class", "row 2 (line 3): the number of cells is 2, the header's is 4."),
    "long": (["1,2,3,no,5"], "a,b,c,class", "row 1 (line 2): the number of cells is 5, the header's is 4."),
    "quote": (['1,2,3,"no'], "a,b,c,class", "data.csv as CSV, line 2: unexpected end of data."),
}


def assert_one_sentence(capsys: pytest.CaptureFixture[str], message: str) -> None:
    printed = capsys.readouterr()
    assert "jaxact converge: error: " in printed.err
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.endswith(".\n")
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(("rows", "header", "message"), BAD_FILES.values(), ids=list(BAD_FILES))
def test_a_bad_file_is_named(
    rows: list[str], header: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "data.csv", *rows, header=header)
    if not header:
        file.write_bytes(b"")
    assert status("converge", "--csv", file, "--label", "class", "--out", tmp_path) == 2
    assert_one_sentence(capsys, message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "argument --steps: must be a whole number from 1 to 1000000, got '0'."),
        (["--steps", "1e3"], "argument --steps: must be a whole number"),
        (["--learning-rate", "0"], "argument --learning-rate: must be a positive number, got '0'."),
        (["--learning-rate", "nan"], "argument --learning-rate: must be a positive number, got 'nan'."),
        (["--learning-rate", "1e-60"], "--learning-rate 1e-60 is out of the range of float32."),
        (["--learning-rate", "1e300"], "--learning-rate 1e+300 is out of the range of float32."),
        (["--learning-rate", "fast"], "argument --learning-rate: must be a positive number, got 'fast'."),
        (["--optimizer", "newton"], "argument --optimizer: invalid choice: 'newton'"),
        (["--seed", "-1"], "argument --seed: must be a whole number"),
        (["--label", "class"], "--label needs --csv."),
        (["--csv", "data.csv"], "--csv needs --label."),
        (["--csv", "absent.csv", "--label", "class"], "cannot read absent.csv: No such file or directory."),
        (["--csv", ".", "--label", "class"], "cannot read .: Is a directory."),
        (["--csv", "latin.csv", "--label", "class"], "cannot read latin.csv: it is not UTF-8 text."),
        (["--out", "file"], "cannot write to file: it is not a directory."),
        (["--out", "file/folder"], "cannot write to file/folder: Not a directory."),
    ],
)
def test_a_bad_option_is_named(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("data.csv"), *ROWS)
    Path("latin.csv").write_bytes("größe,class\n".encode("latin-1"))
    Path("file").touch()
    assert status("converge", *argv) == 2
    assert_one_sentence(capsys, message)


def test_a_result_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(classifiers, "train_twins", lambda *_, **__: trained(1, 0.5))
    file = write(tmp_path / "data.csv", *ROWS)
    (tmp_path / "converge.json").mkdir()
    assert status("converge", "--csv", file, "--label", "class", "--steps", 2, "--out", tmp_path) == 2
    message = capsys.readouterr().err
    assert message.endswith("converge.json: Is a directory.\n")
    assert message.count("\n") == 1


@pytest.mark.parametrize("package", ["optax", "matplotlib", "rich", "sklearn"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert status("converge", "--out", tmp_path) == 2
    assert_one_sentence(capsys, f"cannot import {package}")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optax", None)
    assert status("converge") == 2
    assert_one_sentence(capsys, "pip install 'jaxact[demo]'.")


def test_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(classifiers, "train_twins", interrupt)
    assert status("converge", "--out", tmp_path) == 130
    assert capsys.readouterr().err.endswith("jaxact converge: interrupted.\n")


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert status() == 2
    printed = capsys.readouterr()
    assert "converge" in printed.out
    assert printed.err == ""
    assert status("diverge") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.long
def test_as_a_module(tmp_path: Path) -> None:
    file = write(tmp_path / "data.csv", *ROWS)
    root = Path(jaxact.__file__).parents[1]
    command = [sys.executable, "-m", "jaxact", "converge", "--csv", str(file), "--label", "class", "--steps", "4"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=root, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "all 4 losses agree bit for bit." in done.stdout
    assert results(tmp_path)["results"]["jaxact"]["weight_gap"] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full here")
def test_an_output_that_cannot_be_written_to(tmp_path: Path) -> None:
    data = ["--csv", str(write(tmp_path / "data.csv", *ROWS)), "--label", "class"]
    command = [sys.executable, "-m", "jaxact", "converge", *data, "--steps", "3", "--out", str(tmp_path)]
    with open("/dev/full", "w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 2
    assert process.stderr == "python -m jaxact converge: error: No space left on device.\n"


def test_a_closed_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(classifiers, "train_twins", lambda *_, **__: trained(1, 0.5, 0.2))
    data = ["--csv", write(tmp_path / "data.csv", *ROWS), "--label", "class"]
    assert status("converge", *data, "--steps", 3, "--optimizer", "adamw", "--out", tmp_path) == 0
    assert results(tmp_path)["settings"]["weight_decay"] == 0.01


def test_a_reader_that_has_seen_enough() -> None:
    program = "from jaxact import _cli; _cli.converge.run = lambda _: print('x' * 10**6); _cli.main(['converge'])"
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        process = subprocess.run([sys.executable, "-c", program], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (process.returncode, process.stderr) == (1, "")


def test_the_gaps_have_a_mark_at_each_decade() -> None:
    apart = Twins(trained(1, 1, 1).sigmoid, trained(1, 1 + 2e-7, 1 + 6e-7).softmax)
    nothing: Any = None
    outcome = Outcome(
        nothing, argparse.Namespace(steps=3), 0.0, dict.fromkeys(("jaxact", "jax.nn + optax"), apart), nothing
    )
    axes = Figure().subplots()
    _gaps(axes, outcome)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "0",
        "0",
        *(f"$10^{{{k}}}$" for k in (-7, -6, -5)),
    ]
