"""The command line: what `head` computes, prints and writes, and how it says what is wrong."""

import argparse
import json
import subprocess
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.progress import Progress

pytest.importorskip("flax")

from jaxact import _chunks
from jaxact._cli import _head_figure as figure, _head_model as model, head, main
from jaxact._cli._record import plain

TINY = ["--vocab", "3000,64", "--steps", 4, "--batch", 64, "--features", 4]
SHARDED = ["--vocab", "64", "--steps", "6", "--batch", "32", "--features", "4", "--devices", "8"]


def status(*argv: Any) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["head", *map(str, argv)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def results(out: Path) -> dict[str, Any]:
    """The numbers in DIR, which must be JSON by the book; and the figures must be there."""
    assert (out / "head.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "head.svg").stat().st_size > 10_000

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((out / "head.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_heads_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SECONDS", 0)
    monkeypatch.setattr(_chunks, "CHUNK_BYTES", 10 * 4 * 3000)  # 10 tokens a chunk
    out = tmp_path / "new" / "folder"
    assert status(*TINY, "--out", out) == 0
    report = results(out)
    assert report["settings"] == {
        "vocab": [64, 3000], "steps": 4, "batch": 64, "features": 4, "learning_rate": 0.01, "seed": 0, "devices": 1,
    }  # fmt: skip
    assert set(report["versions"]) == {"python", "jaxact", "jax", "jaxlib", "numpy", "flax", "optax"}
    dense, fused = report["losses"]["dense"], report["losses"]["fused"]
    assert len(dense) == 4
    # A model that knows nothing yet, whose logits are small.
    np.testing.assert_allclose(dense[0], np.log(64), rtol=0.01)
    # The same mathematics in another order of operations: a few roundings of float32 in 4 steps.
    np.testing.assert_allclose(fused, dense, rtol=1e-5)
    assert report["largest_relative_gap"] == pytest.approx(np.max(np.abs(np.subtract(dense, fused)) / dense), rel=1e-3)
    assert list(report["steps"]) == ["64", "3000"]
    for costs in report["steps"].values():
        for cost in costs.values():
            assert (len(cost["seconds"]), len(cost["losses"])) == (5, 6)
        np.testing.assert_allclose(costs["fused"]["losses"], costs["dense"]["losses"], rtol=1e-5)
    large = report["steps"]["3000"]
    logits = 4 * 64 * 3000
    assert large["dense"]["memory"] > logits > large["fused"]["memory"]
    assert report["sharded"] is None
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Python's language reference: " in printed.out
    assert "Training 2 models on 64 classes for 4 steps, adamw." in printed.out
    assert f"The two heads train alike: {report['verdict'].partition(': ')[2]}\n" in printed.out


def test_training_learns(small: tuple[Any, dict[str, model.Trainer]]) -> None:
    settings, trainers = small
    words = model.language_reference()
    numbers = model.numbered(words, settings.vocab[0])
    batch = model.batches(numbers, settings.batch, 0)
    losses = [trainers["fused"](*next(batch)) for _ in range(60)]
    # Below what the frequencies of the words alone can give.
    share = np.bincount(numbers) / len(words)
    assert np.mean(losses[-10:]) < -np.sum(share * np.log(share))


@pytest.fixture(scope="module")
def small() -> tuple[Any, dict[str, model.Trainer]]:
    """Settings, and a model with either head: each takes a second to compile."""
    settings = head_settings(vocab=[100], batch=256, features=8)
    return settings, {name: model.Trainer(name, 100, settings) for name in model.HEADS}


def head_settings(**options: Any) -> Any:
    return argparse.Namespace(**({"learning_rate": 0.01, "seed": 0, "devices": 1, "steps": 3} | options))


def test_words_are_numbered_by_frequency() -> None:
    words = ["b", "c", "a", "c", "b", "c", "d"]
    assert model.numbered(words, 3).tolist() == [2, 1, 0, 1, 2, 1, 0]
    assert model.numbered(words, 99).tolist() == [2, 1, 3, 1, 2, 1, 4]


def test_batches_are_of_the_text() -> None:
    contexts, labels = next(model.batches(np.arange(50, dtype=np.int32), 20, 1))
    assert contexts.shape == (20, model.CONTEXT)
    np.testing.assert_array_equal(contexts[:, -1] + 1, labels)
    np.testing.assert_array_equal(np.diff(contexts, axis=1), 1)


def test_what_does_not_fit_is_not_run(
    small: tuple[Any, dict[str, model.Trainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, trainers = small
    dense = trainers[model.DENSE].memory
    assert dense is not None
    monkeypatch.setattr(model, "room", lambda: dense - 1)
    monkeypatch.setattr(head, "SECONDS", 0)
    monkeypatch.setattr(model.Trainer, "memory", property(lambda self: dense if self is trainers["dense"] else 1))
    costs = head._measured(settings, model.language_reference(), Progress(disable=True), trainers)[100]
    assert (costs[model.DENSE].memory, len(costs[model.DENSE].seconds)) == (dense, 0)
    assert len(costs[model.FUSED].seconds) >= head.REPEATS[0]
    assert "not run, for lack of memory (dense)" in drawn(outcome(settings, costs))
    monkeypatch.setattr(model, "room", lambda: 0)
    monkeypatch.setattr(model, "Trainer", lambda name, *_: trainers[name])
    with pytest.raises(
        ArgumentError, match="a step with the dense head needs more memory than there is: lower --batch"
    ):
        head._trained(settings, np.arange(99), Progress(disable=True))


def outcome(settings: Any, costs: dict[str, model.Cost], *last: float) -> model.Outcome:
    losses = {name: np.array([3, 2, *last]) for name in model.HEADS}
    return model.Outcome(settings, 9, 9, losses, {settings.vocab[0]: costs}, None)


def drawn(found: model.Outcome) -> str:
    """The texts of the figure."""
    return "\n".join(text.get_text() for text in figure.draw(found).texts)


def test_divergence_is_reported() -> None:
    costs = {name: model.Cost(None, np.ones(5), np.ones(6)) for name in model.HEADS}
    found = outcome(head_settings(vocab=[9], batch=8, features=2), costs, np.nan)
    assert found.verdict == "are not comparable: a loss is not finite, so lower the learning rate"
    assert "The two heads are not comparable" in drawn(found)
    assert plain(head._as_json(found))["losses"]["fused"] == [3, 2, None]
    same = outcome(head_settings(vocab=[9], batch=8, features=2), costs)
    assert "All 2 losses agree to a relative" not in drawn(found)
    assert "All 2 losses agree to the last bit" in drawn(same)


def test_one_of_each_is_singular() -> None:
    settings = head_settings(vocab=[9], batch=1, features=1, steps=1)
    costs = {name: model.Cost(None, np.ones(5), np.ones(6)) for name in model.HEADS}
    once = model.Outcome(settings, 9, 9, dict.fromkeys(model.HEADS, np.ones(1)), {9: costs}, None)
    assert "in 1 step is " in once.verdict
    assert "The loss agrees to the last bit" in drawn(once)
    assert " 1 token a step, 1 feature, adamw" in drawn(once)


@pytest.mark.exhaustive
def test_several_devices_agree_with_one(tmp_path: Path) -> None:
    root = Path(head.__file__).parents[2]
    command = [sys.executable, "-m", "jaxact", "head", *SHARDED, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "On 8 devices, 2 for tokens × 4 for classes, the losses agree with one device's to " in done.stdout
    report = results(tmp_path)
    # Sums over devices are in another order.
    np.testing.assert_allclose(report["sharded"]["losses"], report["losses"]["fused"], rtol=1e-5)
    assert report["sharded"]["memory"] < report["steps"]["64"]["fused"]["memory"]


def assert_one_sentence(capsys: pytest.CaptureFixture[str], message: str) -> None:
    printed = capsys.readouterr()
    assert "jaxact head: error: " in printed.err
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.endswith(".\n")
    assert printed.out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--vocab", "1"], "argument --vocab: must be whole numbers from 2 to 99999999, such as 2000,8000, got '1'."),
        (
            ["--vocab", "2e3"],
            "argument --vocab: must be whole numbers from 2 to 99999999, such as 2000,8000, got '2e3'.",
        ),
        (["--vocab", ""], "argument --vocab: must be whole numbers from 2 to 99999999, such as 2000,8000, got ''."),
        (["--steps", "0"], "argument --steps: must be a whole number from 1 to 1000000, got '0'."),
        (["--batch", "-1"], "argument --batch: must be a whole number"),
        (["--features", "2.5"], "argument --features: must be a whole number"),
        (["--learning-rate", "nan"], "argument --learning-rate: must be a positive number, got 'nan'."),
        (["--learning-rate", "1e300"], "--learning-rate 1e+300 is out of the range of float32."),
        (["--seed", "x"], "argument --seed: must be a whole number"),
        (["--devices", "6"], "argument --devices: must be a power of two from 1 to 256, got '6'."),
        (["--devices", "0"], "argument --devices: must be a power of two"),
        (["--vocab", "99999999", "--features", "1000000"], "the parameters need more memory than there is: lower"),
        (["--out", "file"], "cannot write to file: it is not a directory."),
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
    Path("file").touch()
    assert status(*argv) == 2
    assert_one_sentence(capsys, message)


def test_what_cannot_be_divided_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(head, "_start_devices", lambda number: None)
    monkeypatch.setattr(model, "mesh_of", lambda n: jax.sharding.AbstractMesh((2, 4), ("tokens", "classes")))
    for option, named in ((["--vocab", "66"], "the smallest --vocab 66"), (["--batch", "33"], "--batch 33")):
        assert status(*SHARDED, *option, "--out", tmp_path) == 2
        parts = 4 if "66" in option else 2
        assert_one_sentence(capsys, f"{named} must be a multiple of {parts}, the parts into which ")


def test_devices_come_too_late(capsys: pytest.CaptureFixture[str]) -> None:
    number = 2 * jax.device_count()
    assert status("--devices", number) == 2
    assert_one_sentence(capsys, f"--devices {number}: JAX has started with {jax.device_count()}.")


@pytest.mark.parametrize("package", ["flax", "optax", "matplotlib", "rich"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert status("--out", tmp_path / "out") == 2
    assert_one_sentence(capsys, "pip install 'jaxact[head]'.")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_text_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert status() == 2
    assert_one_sentence(capsys, "this Python comes without its language reference, pydoc_data.topics.")
