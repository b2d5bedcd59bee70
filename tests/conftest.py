"""Flags and the strict configuration.

`pytest` runs with JAX as a user finds it. `pytest --strict-jax` runs the same tests with strict dtype promotion and
the tracer-leak check. `pytest --long` adds the tests that take some seconds and that others mostly cover,
`pytest --exhaustive` those that take minutes too, and every combination of parameters.
"""

import collections
import gc
import itertools
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that take some seconds each too")
    parser.addoption("--exhaustive", action="store_true", help="run those that take minutes too")
    parser.addoption("--strict-jax", action="store_true", help="strict dtype promotion and the tracer-leak check")


def pytest_configure(config: pytest.Config) -> None:
    # By default a tenth of the time goes into visiting again and again what JAX has traced and compiled, and keeps.
    gc.set_threshold(100_000, 50, 50)
    if config.getoption("--strict-jax"):
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        jax.config.update("jax_check_tracer_leaks", True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--exhaustive"):
        return
    marks = ("exhaustive",) if config.getoption("--long") else ("exhaustive", "long")
    left_out = {item for item in items if any(mark in item.keywords for mark in marks)}
    tests: dict[Any, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if item not in left_out and hasattr(item, "callspec"):
            tests[item.path, item.function].append(item)  # type: ignore[attr-defined]
    left_out.update(*map(_superfluous, tests.values()))
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _superfluous(cases: list[pytest.Item]) -> list[pytest.Item]:
    """The cases of a test without which each value of each parameter is still in one, and of three or more each pair.

    What stands in one `parametrize` is one parameter, so a test with a list of cases loses none.
    """

    def combinations(case: Any) -> set[Any]:
        marks = [mark.args[0] for mark in case.iter_markers("parametrize")]
        groups = [[name.strip() for name in m.split(",")] if isinstance(m, str) else m for m in marks]
        values = [tuple(id(case.callspec.params[name]) for name in group) for group in groups]
        return set(itertools.combinations(enumerate(values), 1 if len(values) < 3 else 2))

    left = [(case, combinations(case)) for case in cases]
    todo = set[Any]().union(*(found for _, found in left))
    while todo:
        case, found = max(left, key=lambda pair: len(todo & pair[1]))
        todo -= found
        left.remove((case, found))
    return [case for case, _ in left]


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


# Runs programs one by one, each on a copy of the names that `common` leaves, which is run once; answers with what the
# program printed, and the traceback if it raised.
RUNNER = """
import contextlib, io, json, sys, traceback
commons, answers = {}, sys.stdout
for line in sys.stdin:
    common, program = json.loads(line)
    printed, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            if common not in commons:
                names = {}
                exec(common, names)
                commons[common] = names
            exec(program, dict(commons[common]))
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def on_eight_devices() -> Iterator[Callable[..., str]]:
    """Runs a program on eight CPU devices, and before it what it has in common with others; returns what it printed.

    The number of devices is that of a process, and each process must import JAX: so there is one for all tests. What
    they ask is how a program is divided, which is settled before LLVM optimises it: without that a third is saved.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    to, answers = process.stdin, process.stdout
    assert to is not None
    assert answers is not None

    def run(program: str, common: str = "") -> str:
        late = threading.Timer(120, process.kill)  # devices that wait for each other wait for ever
        late.start()
        try:
            print(json.dumps([textwrap.dedent(common), textwrap.dedent(program)]), file=to, flush=True)
            answer = answers.readline()
        finally:
            late.cancel()
        assert answer, "the process with eight devices has ended"
        printed, error = json.loads(answer)
        assert not error, error[-3000:]
        return printed

    with process:
        yield run
        process.kill()
