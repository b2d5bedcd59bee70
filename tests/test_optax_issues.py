"""What users of optax.losses have reported, and what its integer loss accepts in silence: one test each.

`these` is the module under test. With `return optax.losses` in the fixture below, the tests of `STILL_FAILING` fail.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxact.losses

INF, NAN = float("inf"), float("nan")
U = 2.0**-24


@pytest.fixture
def these() -> Any:
    return jaxact.losses


def cross_entropies(these: Any, label: int, classes: int) -> list[Any]:
    """−log p of one label, by an integer and by a one-hot row."""
    one_hot = jnp.asarray(np.eye(classes)[label], jnp.float32)
    return [
        lambda x: these.softmax_cross_entropy_with_integer_labels(x, jnp.asarray(label)),
        lambda x: these.softmax_cross_entropy(x, one_hot),
    ]


@pytest.mark.parametrize("kind", [0, 1], ids=["integer", "one-hot"])
def test_optax_896_value_and_gradient_at_minus_infinity(these: Any, kind: int) -> None:
    value, gradient = jax.value_and_grad(cross_entropies(these, 1, 3)[kind])(jnp.array([-INF, 0.0, 0.0]))
    np.testing.assert_allclose(float(value), np.log(2), rtol=2 * U)  # log1p's ulp
    assert gradient.tolist() == [0, -0.5, 0.5]


@pytest.mark.parametrize("kind", [0, 1], ids=["integer", "one-hot"])
def test_optax_1762_forward_mode_at_minus_infinity(these: Any, kind: int) -> None:
    f = cross_entropies(these, 1, 3)[kind]
    assert jax.jit(jax.jacfwd(f))(np.array([-INF, 0, 0], np.float32)).tolist() == [0, -0.5, 0.5]


@pytest.mark.parametrize("name", ["sigmoid_binary_cross_entropy", "sigmoid_focal_loss"])
def test_optax_431_binary_losses_at_infinity(these: Any, name: str) -> None:
    x, y, f = jnp.array([INF, INF, -INF, -INF]), jnp.array([1.0, 0.0, 1.0, 0.0]), getattr(these, name)
    assert f(x, y).tolist() == [0, INF, INF, 0]
    assert jax.jit(jax.grad(lambda x: f(x, y).sum()))(x).tolist() == [0, 1, -1, 0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.5])
def test_optax_1267_gradients_of_the_focal_loss_are_numbers(these: Any, gamma: float) -> None:
    sizes = np.array([0, 1e-30, 1, 20, 87, 90, 104, 1e3, 1e30, 3.4e38], np.float32)
    x, y = np.tile(np.append(sizes, -sizes), 3), np.repeat(np.array([0, 0.3, 1], np.float32), 20)
    assert np.isfinite(jax.grad(lambda x: these.sigmoid_focal_loss(x, y, gamma=gamma).sum())(x)).all()


def test_optax_1786_gradient_of_soft_labels_at_0(these: Any) -> None:
    # −log p: log 2, though the label is 0; and where there is no class there is no derivative.
    x = jnp.array([0.0, 0.0, -INF])
    gradient = jax.grad(lambda q: these.softmax_cross_entropy(x, q))(jnp.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(np.asarray(gradient), [np.log(2), np.log(2), 0], rtol=2 * U)


def test_a_label_out_of_range_makes_its_row_nan(these: Any) -> None:
    x, y = np.tile(np.array([1, 2, 3], np.float32), (5, 1)), np.array([-1, 3, 7, -100, 0])
    f = these.softmax_cross_entropy_with_integer_labels
    gradient, pushed = jax.jit(
        lambda x: (jax.grad(lambda x: f(x, y).sum())(x), jax.jvp(lambda x: f(x, y), (x,), (x,)))
    )(x)
    for value in (f(x, y), *pushed):
        assert np.isnan(value).tolist() == [True] * 4 + [False]
    assert np.isnan(gradient).tolist() == [[True] * 3] * 4 + [[False] * 3]


@pytest.mark.parametrize("index", [-100, 1])
def test_an_ignored_row_leaves_no_trace(index: int) -> None:
    x, y = np.array([[1, NAN, 3], [INF, INF, 0], [0, 1, 2]], np.float32), np.array([index, index, 0])
    f = jaxact.losses.softmax_cross_entropy_with_integer_labels

    @jax.jit
    def run(x: Any, y: Any) -> Any:
        value, pull = jax.vjp(lambda x: f(x, y, ignore_index=index), x)
        return value, pull(jnp.ones(3))[0]

    value, gradient = (np.asarray(a) for a in run(x, y))
    np.testing.assert_allclose(value, [0, 0, np.log(np.exp([0, 1, 2]).sum())], rtol=4 * U)
    assert gradient[:2].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert np.isfinite(gradient[2]).all()


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("kind", [0, 1], ids=["integer", "one-hot"])
def test_jax_40384_a_small_loss_is_not_zero(these: Any, kind: int, offset: float) -> None:
    gap = np.array([12.0, 17.5, 20.0, 40.0, 80.0])
    x = np.stack([gap, np.zeros(5)], -1).astype(np.float32) + np.float32(offset)
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(cross_entropies(these, 0, 2)[kind])))(x)
    want = np.exp(-np.logaddexp(0, gap))  # 12 roundings, as in test_jax_issues.py
    np.testing.assert_allclose(np.asarray(value), np.logaddexp(0, -gap), rtol=12 * U)
    np.testing.assert_allclose(np.asarray(gradient), np.stack([-want, want], -1), rtol=12 * U)


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize("kind", [0, 1], ids=["integer", "one-hot"])
def test_a_common_offset_changes_nothing(these: Any, kind: int, offset: float) -> None:
    x, run = jnp.array([1.0, 2.0, 3.0]), jax.value_and_grad(cross_entropies(these, 2, 3)[kind])
    # The differences are exact; the shift of the exponentials may be another: two roundings of each.
    np.testing.assert_allclose(float(run(x + offset)[0]), float(run(x)[0]), rtol=8 * U)
    np.testing.assert_allclose(np.asarray(run(x + offset)[1]), np.asarray(run(x)[1]), rtol=8 * U)


@pytest.mark.long
def test_integer_loss_on_eight_devices(on_eight_devices: Callable[..., str], request: pytest.FixtureRequest) -> None:
    program = """
        import functools, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from jaxact.losses import softmax_cross_entropy_with_integer_labels as loss
        rng = np.random.default_rng(0)
        x, v = (np.float32(rng.normal(size=(8, 16)) * 5) for _ in range(2))
        where, weights, y = rng.random((8, 16)) < 0.8, np.float32(rng.uniform(0, 2, 16)), rng.integers(0, 16, 8)
        where[np.arange(8), y] = True
        y[3] = -1

        def run(f, x, v, *rest):
            value, pushed = jax.jvp(lambda x: f(x, *rest), (x,), (v,))
            return value, pushed, jax.grad(lambda x: f(x, *rest).sum())(x)

        def agree(got, want):
            # Sums of 16 products in another order; two devices' errors.
            for g, w in zip(got, want):
                np.testing.assert_allclose(np.asarray(g), w, rtol=32 * 2**-24, atol=64 * 2**-24)

        plain = functools.partial(loss, ignore_index=-1)
        want = jax.jit(functools.partial(run, plain))(x, v, y)
        for kind in (AxisType.Explicit, AxisType.Auto):
            mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
            with jax.set_mesh(mesh):
                for rows, labels in ((P(None, "d"), P(None)), (P("d"), P("d")), (P("d"), P(None))):
                    if kind == AxisType.Explicit and rows == P("d") and labels == P(None):
                        continue  # there the types must agree
                    put = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, rows), (v, rows), (y, labels))]
                    agree(jax.jit(functools.partial(run, plain))(*put), want)

        # So many classes are folded, on each device that has whole rows.
        x_wide, y_wide = np.float32(rng.normal(size=(8, 1024)) * 5), rng.integers(0, 1024, 8)
        want = jax.jit(functools.partial(run, plain))(x_wide, x_wide, y_wide)
        mesh_of_rows = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
        with jax.set_mesh(mesh_of_rows):
            put = [jax.device_put(a, NamedSharding(mesh_of_rows, P("d"))) for a in (x_wide, x_wide, y_wide)]
            agree(jax.jit(functools.partial(run, plain))(*put), want)
            # Weights that are on every device, or divided as the classes.
            weighted = lambda z, w, y: (loss(z, y, class_weight=w, label_smoothing=0.1) ** 2).sum()
            of_weights = jax.jit(jax.grad(weighted, (0, 1)))
            want = jax.jit(jax.grad(weighted, (0, 1)))(x, weights, abs(y))
            for rows, labels, by_class in WAYS:
                put = [jax.device_put(a, NamedSharding(mesh_of_rows, s))
                       for a, s in ((x, rows), (weights, by_class), (abs(y), labels))]
                # Sums over rows and classes in another order, of terms no larger than the largest result.
                for a, b in zip(of_weights(*put), want):
                    np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-5 * np.abs(b).max())

        def full(x, y, where, weights, axis_name=None):
            options = dict(label_smoothing=0.1, z_loss=0.1, temperature=2.0, axis_name=axis_name)
            return loss(x, y, -1, where, ignore_index=-1, class_weight=weights, **options)

        split, one = P(None, "d"), P()
        byhand = jax.shard_map(
            functools.partial(full, axis_name="d"), mesh=mesh, in_specs=(split, one, split, P("d")), out_specs=one
        )
        agree(jax.jit(functools.partial(run, byhand))(x, v, y, where, weights),
              jax.jit(functools.partial(run, full))(x, v, y, where, weights))

        # Where the label's class has the least number, and where it is impossible.
        least = np.zeros((2, 8), np.float32)
        least[:, 5] = np.finfo(np.float32).min, -np.inf
        of_least = jax.shard_map(
            functools.partial(loss, axis_name="d"), mesh=mesh, in_specs=(split, one), out_specs=one)
        np.testing.assert_array_equal(of_least(least, np.array([5, 5])), -least[:, 5])

        # Classes split by hand, and rows over an axis that is explicit beside it.
        both = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(AxisType.Explicit,) * 2)
        with jax.set_mesh(both):
            by_class = jax.shard_map(
                lambda x, y, w: loss(x, y, class_weight=w, axis_name="classes"),
                in_specs=(P(None, "classes"), P(), P("classes")), out_specs=P(), axis_names={"classes"},
            )
            put = [jax.device_put(a, NamedSharding(both, s))
                   for a, s in ((x, P("rows", "classes")), (abs(y), P("rows")), (weights, P("classes")))]
            got = jax.jit(jax.grad(lambda x, y, w: (by_class(x, y, w) ** 2).sum(), (0, 2)))(*put)
        want = jax.jit(jax.grad(lambda x, y, w: (loss(x, y, class_weight=w) ** 2).sum(), (0, 2)))(x, abs(y), weights)
        for a, b in zip(got, want):
            np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-5 * np.abs(b).max())  # as above
        print("agreed")
    """
    # Rows or classes, and with either the weights divided or not.
    ways = '((P("d"), P(), P()), (P("d"), P("d"), P("d")), (P(None, "d"), P(), P("d")))'
    if request.config.getoption("--exhaustive"):
        ways = f'(*{ways}, (P("d"), P("d"), P()), (P(None, "d"), P(), P()))'
    assert on_eight_devices(program.replace("WAYS", ways)).strip() == "agreed"


@pytest.mark.long
def test_dense_loss_on_eight_devices_with_labels_divided_otherwise(
    on_eight_devices: Callable[..., str], request: pytest.FixtureRequest
) -> None:
    program = """
        import itertools, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from jaxact.losses import softmax_cross_entropy as loss
        rng = np.random.default_rng(0)
        x, q = np.float32(rng.normal(size=(8, 16)) * 5), np.float32(rng.dirichlet(np.ones(16), 8))

        def run(x, q):
            pushed = jax.jvp(loss, (x, q), (x, q))[1]
            return loss(x, q), pushed, *jax.grad(lambda x, q: loss(x, q).sum(), (0, 1))(x, q)

        def agree(got, want):
            # As of the integer loss.
            for g, w in zip(got, want, strict=True):
                np.testing.assert_allclose(np.asarray(g), w, rtol=32 * 2**-24, atol=64 * 2**-24)

        want = jax.jit(run)(x, q)
        mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(AxisType.Explicit,) * 2)
        with jax.set_mesh(mesh):
            rows, both, none = P("rows"), P("rows", "classes"), P()
            for logits, labels in PAIRS:
                put = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, logits), (q, labels))]
                agree(jax.jit(run)(*put), want)

        def of_shard(x, row):
            # Labels that are the same on all devices.
            return loss(x, row), jax.grad(lambda x: loss(x, row).sum())(x)

        mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
        byhand = jax.shard_map(of_shard, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows"))
        agree(jax.jit(byhand)(x, q[0]), jax.jit(of_shard)(x, q[0]))
        print("agreed")
    """
    # Each division once on either side; and classes divided on both.
    pairs = "((rows, both), (both, none), (none, rows), (both, both))"
    if request.config.getoption("--exhaustive"):
        pairs = "itertools.product((rows, both, none), repeat=2)"
    assert on_eight_devices(program.replace("PAIRS", pairs)).strip() == "agreed"
