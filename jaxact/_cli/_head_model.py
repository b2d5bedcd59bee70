"""The model of `head`: the next word of a text after the eight before it, in Flax NNX, trained with Optax."""

import collections
import math
import os
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jaxact
from jaxact._cli._words import plural

CONTEXT = 8  # words
DENSE, FUSED = "dense", "fused"


def dense(x: Array, w: Array, labels: Array) -> Array:
    """The usual head: all logits, then the loss."""
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, labels).mean()


HEADS: dict[str, Callable[..., Any]] = {DENSE: dense, FUSED: jaxact.linear_cross_entropy}


def language_reference() -> list[str]:
    """Its words in lower case, from what `help()` shows; it ships with Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ArgumentError(None, "this Python comes without its language reference, pydoc_data.topics.") from None
    return re.findall(r"[a-z]+", "\n".join(topics[name] for name in sorted(topics)).lower())


def numbered(words: list[str], vocabulary: int) -> np.ndarray:
    """1 for the most frequent word, 2 for the next, and 0 for those that have no number below `vocabulary`."""
    # Words that are equally frequent go by the alphabet: their place in the text differs between versions of Python.
    ranked = sorted(collections.Counter(words).items(), key=lambda item: (-item[1], item[0]))
    numbers = {word: i for i, (word, _) in enumerate(ranked[: vocabulary - 1], 1)}
    return np.array([numbers.get(word, 0) for word in words], np.int32)


def batches(numbers: np.ndarray, size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Without end: (size, CONTEXT) words and (size,) words that come next, from random places."""
    rng = np.random.default_rng(seed)
    windows = np.lib.stride_tricks.sliding_window_view(numbers, CONTEXT + 1)
    while True:
        window = windows[rng.integers(len(windows), size=size)]
        yield window[:, :-1], window[:, -1]


class Model(nnx.Module):
    """Everything below the head, whose weight it holds."""

    def __init__(self, vocabulary: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(vocabulary, features, rngs=rngs)
        self.hidden = nnx.Linear(CONTEXT * features, 2 * features, rngs=rngs)
        self.last = nnx.Linear(2 * features, features, rngs=rngs)
        self.head = nnx.Param(0.02 * jax.random.normal(rngs.params(), (features, vocabulary)))

    def __call__(self, contexts: Array) -> Array:
        x = self.embedding(contexts).reshape(len(contexts), -1)
        return self.last(nnx.gelu(self.hidden(x)))


# At the module's level, so that there is one compilation for all heads.
_initial: Any = nnx.jit(
    lambda size, features, seed: Model(size, features, rngs=nnx.Rngs(seed)), static_argnums=(0, 1, 2)
)


class Trainer:
    """One model with one head: its state, and the training step, compiled.

    Args:
        head: what makes the mean loss of x, w and labels.
        mesh: of `mesh_of`; then tokens and classes are split over its devices.
    """

    def __init__(self, head: str, vocabulary: int, settings: Any, mesh: Mesh | None = None):
        self.mesh = mesh
        optimizer = optax.adamw(settings.learning_rate)
        graph, params = nnx.split(_initial(vocabulary, settings.features, settings.seed))

        def loss(params: Any, contexts: Array, labels: Array) -> Array:
            model = nnx.merge(graph, params)
            return HEADS[head](model(contexts), model.head[...], labels)

        def step(state: Any, contexts: Array, labels: Array) -> Any:
            params, moments = state
            value, gradient = jax.value_and_grad(loss)(params, contexts, labels)
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), value

        state = params, optimizer.init(params)
        self.state = jax.tree_util.tree_map_with_path(self._placed, state)
        shardings = jax.tree.map(lambda a: a.sharding, self.state)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        empty = np.zeros((settings.batch, CONTEXT), np.int32), np.zeros(settings.batch, np.int32)
        self.compiled = jitted.lower(self.state, *map(self._split, empty)).compile()

    def _placed(self, path: Any, a: Array) -> Array:
        """The head's weight, and the moments of its gradient, have the classes on their last axis."""
        if self.mesh is None:
            return a
        spec = P(None, "classes") if "head" in jax.tree_util.keystr(path) else P()
        return jax.device_put(a, NamedSharding(self.mesh, spec))

    def _split(self, tokens: np.ndarray) -> Any:
        return tokens if self.mesh is None else jax.device_put(tokens, NamedSharding(self.mesh, P("tokens")))

    @property
    def memory(self) -> int | None:
        """Bytes of temporary arrays in one step on one device, beside the state; None where XLA does not tell."""
        analysis = self.compiled.memory_analysis()
        return analysis and int(analysis.temp_size_in_bytes)

    def __call__(self, contexts: np.ndarray, labels: np.ndarray) -> float:
        """One step: the loss before it."""
        self.state, loss = self.compiled(self.state, self._split(contexts), self._split(labels))
        return float(loss)


def mesh_of(devices: int) -> Mesh:
    """The devices, a power of two, as tokens × classes: the classes get as many as the tokens, or twice that."""
    tokens = 2 ** (int(math.log2(devices)) // 2)
    return jax.make_mesh((tokens, devices // tokens), ("tokens", "classes"), axis_types=(AxisType.Auto,) * 2)


def room() -> float:
    """Bytes that a program may take of the device's memory, a fifth being kept free; infinity where it is not known."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return 0.8 * stats["bytes_limit"]
    try:
        return 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf


class Cost(NamedTuple):
    """Of one training step."""

    memory: int | None  # bytes
    seconds: np.ndarray  # of each repeat; empty where the step was not run
    losses: np.ndarray  # of the same steps, and of one before them


class Outcome(NamedTuple):
    """What came of `head`."""

    settings: Any
    words: int  # in the text
    distinct: int
    losses: dict[str, np.ndarray]  # of the training, with either head
    costs: dict[int, dict[str, Cost]]  # by vocabulary and head
    sharded: Cost | None  # the same training on several devices, not timed

    @property
    def gap(self) -> float:
        return relative_gap(*self.losses.values())

    @property
    def verdict(self) -> str:
        """How the two trainings compare, to follow "the two heads"."""
        steps = len(self.losses[FUSED])
        if not np.isfinite([*self.losses.values()]).all():
            return "are not comparable: a loss is not finite, so lower the learning rate"
        within = f"{steps} {plural('step', steps)}"
        return f"train alike: the largest relative gap between their losses in {within} is {self.gap:.1e}"


def relative_gap(a: np.ndarray, b: np.ndarray) -> float:
    """The largest |a − b|, relative to the larger of the two; nan if there is nothing to compare."""
    gap = np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))
    return float(gap.max()) if gap.size else math.nan


def ratio(costs: dict[str, Cost]) -> float:
    """How much more memory the dense head takes."""
    dense, fused = costs[DENSE].memory, costs[FUSED].memory
    return dense / fused if dense and fused else math.nan
