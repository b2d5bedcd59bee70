"""What should be the value of `f` as well: that of its rules' forward passes, and of the reference."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxact.verify._compare import Comparison, close
from jaxact.verify._jacobian import products_by_autodiff
from jaxact.verify._problem import Leaves, Problem, Spec, ravel_one, unravel
from jaxact.verify._reference import reference_value
from jaxact.verify._report import apart


def allowed(comparison: Comparison) -> np.ndarray:
    """How far values may be apart."""
    problem, oracle, bound, strict = comparison
    # An infinite input is exact, and a multiple of it no size.
    inputs = np.where(np.isfinite(problem.x), np.abs(problem.x), 0)
    size = problem.unit * np.abs(problem.value())
    if not strict and oracle.layout.whole:
        size = size + problem.unit * oracle.product("forward", inputs[None]).size[0]
    elif not strict:
        size = size + problem.unit * _size_by_signs(problem, inputs)
    # What is lost may have been a factor of the input.
    factor = 1 + inputs if oracle.layout.elementwise else 1
    return bound * size + 4 * problem.lost * factor


def _size_by_signs(problem: Problem, inputs: np.ndarray) -> np.ndarray:
    """Twice the root of Σⱼ(Jᵢⱼxⱼ)², which products with random signs have on average, of a J not known as a whole."""
    vectors = inputs * np.random.default_rng(0).choice([-1.0, 1.0], (8, problem.n))
    with np.errstate(all="ignore"):
        try:
            products = products_by_autodiff(problem, problem.f, "forward", vectors, problem.x)
        except Exception:  # what f computes need not have a derivative where its rule is given
            return np.zeros(problem.m)
        return np.nan_to_num(2 * np.sqrt(np.mean(np.square(products), 0)), posinf=0)


def _primal(flat: Any, mode: str, *floats: Any) -> Leaves:
    """The value that a rule's forward pass returns beside the derivative."""
    if mode == "reverse":
        return jax.vjp(flat, *floats)[0]
    return jax.jvp(flat, floats, tuple(jax.device_put(np.zeros(x.shape, x.dtype)) for x in floats))[0]


def _transformed(f: Any, spec: Spec, modes: Any, transforms: Any, floats: Leaves, others: Leaves, batch: Leaves) -> Any:
    """All of them in one program: they are one by one, and the second of each batch."""
    values, flat = {}, spec.of_floats(f, others)
    for mode in modes:
        if "jit" in transforms:
            values[f"the {mode} rule's own primal under jit"] = _primal(flat, mode, *floats)
        if "vmap" in transforms:
            rows = jax.vmap(functools.partial(_primal, flat, mode))(*batch)
            values[f"the {mode} rule's own primal in a batch"] = tuple(y[1] for y in rows)
    return values


def _primals(problem: Problem, modes: tuple[str, ...], transforms: tuple[str, ...]) -> dict[str, np.ndarray]:
    flat = problem.spec.of_floats(problem.f, problem.others)
    with problem.precision():
        values = {f"the {mode} rule's own primal": _primal(flat, mode, *problem.floats) for mode in modes}
        if {"jit", "vmap"} & {*transforms}:
            # Other arguments come first in the batch, and their value may be what is returned for all.
            batch = tuple(unravel(np.stack([problem.x * 1.125, problem.x]), problem.in_shapes))
            transformed = problem.compiled(_transformed, problem.f, problem.spec, modes, transforms)
            with contextlib.suppress(Exception):  # what raises here, products raise as well
                values |= transformed(problem.floats, problem.others, batch)
        return {name: ravel_one(value) for name, value in values.items()}


def other_values(
    comparison: Comparison, modes: tuple[str, ...], reference: Any, transforms: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """What should be the value of f as well."""
    problem = comparison.problem
    others = _primals(problem, modes, transforms)
    if comparison.oracle.layout.whole:
        value = reference_value(problem, reference)
        others |= {} if value is None else {"the reference": value}
    return others


def other_value(comparison: Comparison, modes: tuple[str, ...], reference: Any) -> tuple[str, int, str, str] | None:
    """Which of them is not, at which output, and what the two are. An infinite reference may be one of mpmath's."""
    others, value = other_values(comparison, modes, reference), comparison.problem.value()
    if "the reference" in others:
        others["the reference"] = np.where(np.isfinite(others["the reference"]), others["the reference"], value)
    return next(values_apart(others, value, allowed(comparison)), None)


def values_apart(
    others: dict[str, np.ndarray], value: np.ndarray, allowed: np.ndarray
) -> Iterator[tuple[str, int, str, str]]:
    """Those that are not f's value: which, at which output, and what the two are."""
    for name, other in sorted(others.items()):
        wrong = ~close(other, value, allowed)
        if wrong.any():
            i = int(np.argmax(wrong))
            yield name, i, *apart(other[i], value[i])
