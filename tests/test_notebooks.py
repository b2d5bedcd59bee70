"""The notebooks are as they should be committed, and say the same when they are run again from a clean kernel.

Running them takes minutes and `jaxact[notebooks]`: `pytest --exhaustive tests/test_notebooks.py`.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from notebook_checks import Notebook, differences, faults, same

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_as_it_should_be_committed(path: Path) -> None:
    assert faults(json.loads(path.read_text(encoding="utf-8"))) == []


@every_notebook
def test_the_readme_leads_to_it(path: Path) -> None:
    assert f"](notebooks/{path.name})" in README


@every_notebook
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("default")  # Jupyter's own
def test_says_the_same_again(path: Path) -> None:
    for needed in ("nbclient", "flax", "equinox"):
        pytest.importorskip(needed, reason=f"needs {needed}; it comes with jaxact[notebooks]")
    from refresh import execute

    fresh = execute(path)
    assert faults(fresh) == []
    assert differences(json.loads(path.read_text(encoding="utf-8")), fresh) == []


def test_the_notebooks_were_found() -> None:
    assert NOTEBOOKS


def markdown(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": "a", "metadata": {}, "source": source}


def code(count: int, *outputs: dict[str, Any], tags: tuple[str, ...] = ()) -> dict[str, Any]:
    metadata = {"tags": list(tags)} if tags else {}
    return {
        "cell_type": "code", "id": "b", "metadata": metadata, "source": "", "execution_count": count,
        "outputs": list(outputs),
    }  # fmt: skip


def printed(words: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": words}


def picture(data: str = "iVBO") -> dict[str, Any]:
    return {"output_type": "display_data", "metadata": {}, "data": {"image/png": data, "text/plain": "<Figure>"}}


def sound() -> Notebook:
    return {
        "metadata": {"kernelspec": {"name": "python3"}, "language_info": {"name": "python"}},
        "cells": [
            markdown("# Why?"),
            code(1, printed("loss 0.25, step 30\n")),
            code(2, picture()),
            markdown("Answer: so."),
        ],
    }


SPOILT: dict[str, tuple[Callable[[Notebook], Any], str]] = {
    "no question": (lambda n: n["cells"].pop(0), "no question"),
    "no answer": (lambda n: n["cells"].pop(), "no answer"),
    "a cell that was not run": (lambda n: n["cells"][2].update(execution_count=None), "not all been run"),
    "a cell that was run again": (lambda n: n["cells"][1].update(execution_count=3), "not all been run"),
    "another kernel": (lambda n: n["metadata"]["kernelspec"].update(name="my-env"), "not python3"),
    "widgets": (lambda n: n["metadata"].update(widgets={}), "widgets"),
    "a cell's times": (lambda n: n["cells"][1]["metadata"].update(execution={}), "beside its tags"),
    "a warning": (lambda n: n["cells"][1]["outputs"].append(printed("careful", "stderr")), "warning"),
    "a path": (lambda n: n["cells"][1]["outputs"].append(printed("in /home/me/x.py")), "'/home/'"),
    "a path in a package": (lambda n: n["cells"][1]["outputs"].append(printed("lib/site-packages/x")), "site-packages"),
    "an address": (lambda n: n["cells"][1]["outputs"].append(printed("<f at 0x7f0012345678>")), "0x7f"),
    "an interactive output": (lambda n: n["cells"][2]["metadata"].update(tags=["interactive"]), "interactive"),
}


@pytest.mark.parametrize(("spoil", "why"), SPOILT.values(), ids=SPOILT)
def test_a_fault_is_noticed(spoil: Callable[[Notebook], Any], why: str) -> None:
    notebook = sound()
    assert faults(notebook) == []
    spoil(notebook)
    assert len(found := faults(notebook)) == 1
    assert why in found[0]


def test_a_changed_output_is_noticed() -> None:
    for change in (
        lambda n: n["cells"][1].update(outputs=[printed("loss 0.35, step 30\n")]),
        lambda n: n["cells"][1].update(outputs=[printed("loss 0.25, step 31\n")]),
        lambda n: n["cells"][1].update(outputs=[]),
        lambda n: n["cells"][2].update(outputs=[printed("no image")]),
    ):
        fresh = sound()
        change(fresh)
        assert len(differences(sound(), fresh)) == 1


def test_an_image_and_a_timing_may_change() -> None:
    committed = sound()
    committed["cells"][2:2] = [code(2, printed("1.5 s"), tags=("timing",)), code(3, tags=("interactive",))]
    fresh = copy.deepcopy(committed)
    fresh["cells"][2]["outputs"] = [printed("much longer")]
    fresh["cells"][3]["outputs"] = [printed("a widget")]
    fresh["cells"][4]["outputs"] = [picture("another")]
    del fresh["cells"][4]["outputs"][0]["data"]["text/plain"]
    assert differences(committed, fresh) == []


@pytest.mark.parametrize(
    ("committed", "fresh", "equal"),
    [
        ("0.4999", "0.5000", True),  # one unit of the last digit
        ("0.4999", "0.5", True),  # and as NumPy prints it
        ("0.4999", "0.5001", False),
        ("0.4999", "0.6", False),
        ("1.", "0.9999", True),
        ("1", "0.9999", False),
        ("4.1399e-08", "4.1400e-08", True),
        ("4.1399e-08", "4.1399e-07", False),
        ("4.1399e-08", "4.1410e-08", False),
        ("-0.25", "0.25", False),
        ("30 steps", "31 steps", False),
        ("30 steps", "30 times", False),
        ("[1.0, nan]", "[1.0, 2.0]", False),
        ("1.0", "1.0 1.0", False),
        ("  1.0   2.0", "1.0 2.0", True),
    ],
)
def test_numbers(committed: str, fresh: str, equal: bool) -> None:
    assert same(committed, fresh) == equal
