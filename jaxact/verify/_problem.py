"""A function and its arguments, as the checks see them: float leaves in, float leaves out, and matrices of both."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array, lax

from jaxact.verify._primal import equations, perturbed, without_rules

Leaves = tuple[Array, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    """An argument that is no array. By identity, since it need not be hashable."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Spec:
    """Where the float arrays stand among the arguments. Hashable, so that compiled products are found again."""

    tree: Any
    roles: tuple[Any, ...]  # of each leaf: "float", "other", or a `Static`

    def split(self, leaves: Sequence[Any]) -> tuple[Leaves, Leaves]:
        by_role = list(zip(leaves, self.roles, strict=True))
        floats = tuple(leaf for leaf, role in by_role if role == "float")
        return floats, tuple(leaf for leaf, role in by_role if role == "other")

    def arguments(self, floats: Sequence[Any], others: Sequence[Any]) -> Any:
        of_role = {"float": iter(floats), "other": iter(others)}
        return self.tree.unflatten(
            [role.value if isinstance(role, Static) else next(of_role[role]) for role in self.roles]
        )

    def of_floats(self, f: Callable[..., Any], others: Leaves) -> Callable[..., Leaves]:
        """`f` as a function of the float leaves to the float leaves of its result."""

        def flat(*floats: Any) -> Leaves:
            out = jax.tree.leaves(f(*self.arguments(floats, others)))
            return tuple(y for y in out if _is_float(y))

        return flat


class Problem:
    """`f` at `args`. Vectors of tangents and cotangents are rows of float64 matrices, leaf after leaf."""

    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...]):
        if not callable(f):
            raise TypeError(f"f must be a function, got {f!r}.")
        leaves, tree = jax.tree.flatten(args)
        # A function of its own: whatever has been traced before may have had other rules, or called what has now.
        self.f = functools.partial(f)
        self._compiled: dict[Any, Any] = {}
        self.spec = Spec(tree, tuple(map(_role, leaves)))
        as_arrays = [
            leaf if isinstance(role, Static) else _array(leaf)
            for leaf, role in zip(leaves, self.spec.roles, strict=True)
        ]
        self.floats, self.others = self.spec.split(as_arrays)
        if not self.floats:
            raise TypeError(
                "args must contain a float array or number, for there is no derivative with respect to others."
            )
        self.wide = any(x.dtype == np.float64 for x in self.floats)
        try:
            with self.precision():
                shapes = jax.eval_shape(lambda *floats: f(*self.spec.arguments(floats, self.others)), *self.floats)
        except Exception as error:
            if any(isinstance(leaf, float) for leaf in leaves):
                error.add_note(
                    "Python floats among args are differentiated: for a constant, give functools.partial(f, ...)."
                )
            raise
        self._bare = {"forward": len(args) == 1 and jax.tree_util.all_leaves(args), "reverse": hasattr(shapes, "dtype")}
        out = [y for y in jax.tree.leaves(shapes) if _is_float(y)]
        self.out_shapes = [(y.shape, np.dtype(y.dtype)) for y in out]
        if not self.out_shapes:
            raise TypeError("f must return a float array; it has no derivative otherwise.")
        self.in_shapes = [(x.shape, np.dtype(x.dtype)) for x in self.floats]

    def compiled(self, function: Callable[..., Any], *known: Any) -> Callable[..., Any]:
        """`function` of what is known and of arrays, compiled, for as long as there is this problem.

        Were it a jitted function of its own, with static arguments, JAX would hold these and all that they hold.
        """
        if (function, *known) not in self._compiled:
            self._compiled[function, *known] = jax.jit(functools.partial(function, *known))
        return self._compiled[function, *known]

    def precision(self) -> Any:
        """The context to run `f` in: with 64 bits if the arguments have them, or JAX is set to."""
        return jax.enable_x64(self.wide or jax.config.read("jax_enable_x64"))

    @property
    def n(self) -> int:
        return sum(int(np.prod(shape)) for shape, _ in self.in_shapes)

    @property
    def m(self) -> int:
        return sum(int(np.prod(shape)) for shape, _ in self.out_shapes)

    @property
    def dtypes(self) -> list[np.dtype]:
        return [dtype for _, dtype in (*self.in_shapes, *self.out_shapes)]

    @property
    def dtype(self) -> np.dtype:
        """The narrowest dtype among arguments and results: errors are measured in its unit roundoff."""
        return max(self.dtypes, key=lambda d: float(ml_dtypes.finfo(d).eps))

    @property
    def unit(self) -> float:
        return float(ml_dtypes.finfo(self.dtype).eps) / 2

    @property
    def lost(self) -> float:
        """What may be lost of a small number: XLA flushes it to 0, but in float16, computed wider, it rounds it."""
        info = ml_dtypes.finfo(self.dtype)
        return float(info.smallest_subnormal if self.dtype == np.float16 else info.smallest_normal)

    @functools.cached_property
    def x(self) -> np.ndarray:
        return np.concatenate([np.asarray(leaf).astype(np.float64).ravel() for leaf in self.floats])

    def leaves(self, x: np.ndarray, dtype: Any = None) -> Leaves:
        """The float leaves that a vector stands for, in their own dtypes or in `dtype`."""
        return tuple(part[0] for part in unravel(x[None], self.in_shapes, dtype))

    def rounded(self, vectors: np.ndarray, shapes: Any) -> np.ndarray:
        return ravel([part.astype(np.float64) for part in unravel(vectors, shapes)])

    def value(self, variant: str = "eager") -> np.ndarray:
        """f's value, called `eager`ly or under `jit`."""
        with self.precision():
            if variant == "eager":
                return ravel_one(self.spec.of_floats(self.f, self.others)(*self.floats))
            return ravel_one(self.compiled(value_of, self.f, self.spec)(self.floats, self.others))

    @functools.cached_property
    def operations(self) -> set[str]:
        """The names of JAX's primitives that `f` is made of."""
        with self.precision():
            program = jax.make_jaxpr(self.spec.of_floats(self.f, self.others))(*self.floats)
        return {equation.primitive.name for equation in equations(program.jaxpr)}

    @property
    def loops(self) -> bool:
        """Whether `f` has a loop of which nobody knows how long it takes."""
        return "while" in self.operations

    @property
    def draws(self) -> bool:
        """Whether `f` draws random numbers."""
        return bool({"random_bits", "threefry2x32", "rng_bit_generator"} & self.operations)

    def vector_shapes(self, mode: str) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Of the cotangents that reverse mode takes, or of the tangents that forward mode takes."""
        return self.out_shapes if mode == "reverse" else self.in_shapes

    def bare(self, mode: str) -> bool:
        """Whether a mode's vectors are single arrays: there is one argument, or one result, and no tree of them."""
        return self._bare[mode]

    def vector_size(self, mode: str) -> int:
        return self.m if mode == "reverse" else self.n

    def products(self, mode: str, variant: str, vectors: np.ndarray) -> np.ndarray:
        """Jᵀg or J v for each row, as `f`'s own rules have it, called `eager`ly or under a transformation."""
        with self.precision():
            parts = tuple(unravel(vectors, self.vector_shapes(mode)))
            if variant == "eager":
                return ravel(eager_products(self.f, self.spec, mode, self.floats, self.others, parts))
            return ravel(self.compiled(products_of, self.f, self.spec, mode, variant)(self.floats, self.others, parts))

    def one_by_one(self, mode: str, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Products with one float leaf differentiated at a time, and the vectors that they are products with.

        In reverse mode there is one, of which each leaf has its part; in forward mode one for each leaf.
        """
        flat = self.spec.of_floats(self.f, self.others)

        def of_leaf(i: int) -> Callable[[Any], Leaves]:
            return lambda leaf: flat(*self.floats[:i], leaf, *self.floats[i + 1 :])

        with self.precision():
            parts = tuple(jax.device_put(part[0]) for part in unravel(vector, self.vector_shapes(mode)))
            if mode == "reverse":
                got = [jax.vjp(of_leaf(i), leaf)[1](parts)[0] for i, leaf in enumerate(self.floats)]
                return vector, ravel_one(got)[None]
            moved = enumerate(zip(self.floats, parts, strict=True))
            out = [jax.jvp(of_leaf(i), (leaf,), (tangent,))[1] for i, (leaf, tangent) in moved]
        return _of_leaves(vector[0], self.in_shapes), np.stack([ravel_one(y) for y in out])

    def of_each_result(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Products of reverse mode with one result differentiated at a time, and the vectors that they are with."""
        flat = self.spec.of_floats(self.f, self.others)
        with self.precision():
            parts = [jax.device_put(part[0]) for part in unravel(vector, self.out_shapes)]
            got = [jax.vjp(lambda *x, i=i: flat(*x)[i], *self.floats)[1](part) for i, part in enumerate(parts)]
        return _of_leaves(vector[0], self.out_shapes), np.stack([ravel_one(x) for x in got])

    def product_in_vector(self, mode: str, outer: str, vector: np.ndarray, along: np.ndarray, of: str) -> np.ndarray:
        """The derivative of a product in its vector, along one of those that the mode `of` takes."""
        flat = self.spec.of_floats(self.f, self.others)
        with self.precision():
            start = tuple(part[0] for part in unravel(vector, self.vector_shapes(mode)))
            moved = tuple(part[0] for part in unravel(along, self.vector_shapes(of)))

            def product(*parts: Any) -> Leaves:
                return product_along(flat, mode, self.floats, parts)

            return ravel_one(product_along(product, outer, start, moved))[None]


def _role(leaf: Any) -> Any:
    if isinstance(leaf, float):
        return "float"
    if not hasattr(leaf, "dtype") and not isinstance(leaf, complex):
        return Static(leaf)
    return "float" if _is_float(leaf) else "other"


def _is_float(leaf: Any) -> bool:
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"arguments and results of f must be real, got {dtype.name}: of complex ones nothing is known.")
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 2:
        raise TypeError(f"arguments and results of f must have 16 bits or more, got {dtype.name}.")
    return jnp.issubdtype(dtype, jnp.floating)


def _array(leaf: Any) -> Array:
    # A NumPy array of float64 is meant as such, whether or not JAX is set to have float64.
    with jax.enable_x64(getattr(leaf, "dtype", None) == np.float64 or jax.config.read("jax_enable_x64")):
        return jnp.asarray(leaf)


def _of_leaves(vector: np.ndarray, shapes: Any) -> np.ndarray:
    """The vector for each leaf, with zeros for the others."""
    edges, place = np.cumsum([0, *(int(np.prod(shape)) for shape, _ in shapes)]), np.arange(len(vector))
    return np.stack([np.where((place >= a) & (place < b), vector, 0) for a, b in pairwise(edges)])


def unravel(vectors: np.ndarray, shapes: Any, dtype: Any = None) -> list[np.ndarray]:
    """Rows of a matrix as one array a leaf, with the rows as its leading axis."""
    sizes = [int(np.prod(shape)) for shape, _ in shapes]
    parts = np.split(vectors, np.cumsum(sizes)[:-1], axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        return [
            part.reshape(len(vectors), *shape).astype(dtype or own)
            for part, (shape, own) in zip(parts, shapes, strict=True)
        ]


def ravel(parts: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(p).astype(np.float64).reshape(len(p), -1) for p in parts], axis=1)


def ravel_one(leaves: Sequence[Any]) -> np.ndarray:
    return ravel([np.asarray(leaf)[None] for leaf in leaves])[0]


def product_along(flat: Callable[..., Leaves], mode: str, floats: Leaves, vector: Leaves) -> Leaves:
    """Jᵀg or J v of a function of float leaves."""
    return jax.vjp(flat, *floats)[1](vector) if mode == "reverse" else jax.jvp(flat, floats, vector)[1]


def eager_products(f: Any, spec: Spec, mode: str, floats: Leaves, others: Leaves, vectors: Sequence[Any]) -> Any:
    flat: Any = spec.of_floats(f, others)
    # Put there as they are: to index an array of JAX, or to make one of another, is a program to compile. And `jnp`
    # would make them arrays of the mesh in use, which with explicit axes are of another type than the results.
    rows = [tuple(jax.device_put(part[i]) for part in vectors) for i in range(len(vectors[0]))]
    if mode == "reverse":
        _, pullback = jax.vjp(flat, *floats)
        results = [pullback(row) for row in rows]
    else:
        results = [jax.jvp(flat, floats, row)[1] for row in rows]
    return [np.stack([np.asarray(r[i]) for r in results]) for i in range(len(results[0]))]


def value_of(f: Any, spec: Spec, floats: Leaves, others: Leaves) -> Leaves:
    return spec.of_floats(f, others)(*floats)


def products_of(f: Any, spec: Spec, mode: str, variant: str, floats: Leaves, others: Leaves, vectors: Leaves) -> Any:
    """The products under jit, of f or of the checkpointed f: one after another, or all at once under vmap."""
    flat = spec.of_floats(f, others)
    if variant == "remat":
        flat = jax.checkpoint(flat)
    if variant == "vmap":
        return jax.vmap(lambda vector: product_along(flat, mode, floats, vector))(vectors)
    return lax.map(lambda vector: product_along(flat, mode, floats, vector), vectors)


def plain_products(
    f: Any, spec: Spec, mode: str, floats: Leaves, others: Leaves, vectors: Leaves, signs: Array | None = None
) -> Any:
    """The products by autodiff of what `f` computes; with `signs`, each operation rounded otherwise."""

    def product(floats: Leaves, vector: Leaves) -> Leaves:
        return product_along(without_rules(spec.of_floats(f, others)), mode, floats, vector)

    if signs is not None:
        product = perturbed(product, signs)
    # Not all at once: of 1000 numbers and each pair of them that would be 8 GB.
    return lax.map(lambda vector: product(floats, vector), vectors, batch_size=64)
