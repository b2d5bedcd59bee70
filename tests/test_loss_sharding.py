"""The losses and functions of rows where their arguments are divided over devices, each in another way."""

import functools
from collections.abc import Callable

import pytest

longer = functools.partial(pytest.param, marks=pytest.mark.long)


@pytest.mark.parametrize(
    "name", ["softmax", "log_softmax", "logsumexp", "weighted binary", longer("binary"), longer("focal")]
)
def test_arguments_that_are_divided_otherwise_than_the_logits(name: str, on_eight_devices: Callable[..., str]) -> None:
    # A rule must return cotangents that are divided over the devices as its arguments are: a constant is not at all.
    program = """
        import jax, jax.numpy as jnp, numpy as np, jaxact
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from jaxact import losses
        rng = np.random.default_rng(0)
        x, y = np.float32(rng.normal(size=(8, 4))), np.float32(rng.uniform(size=(8, 4)))
        binary, focal, row = losses.sigmoid_binary_cross_entropy, losses.sigmoid_focal_loss, jnp.arange(4.0)
        functions = {
            "softmax": lambda c, x, y: jaxact.softmax(x, temperature=c) * y,
            "log_softmax": lambda c, x, y: jaxact.log_softmax(x, temperature=c) * y,
            "logsumexp": lambda c, x, y: jaxact.logsumexp(x, -1, b=c * row),
            "binary": lambda c, x, y: binary(x, 1.0, pos_weight=c),
            "weighted binary": lambda c, x, y: binary(x, y, pos_weight=c * row),
            "focal": lambda c, x, y: focal(x, jnp.ones(4), alpha=c / 4, gamma=c),
        }

        def derivatives(f):
            def run(c, x, y):
                total = lambda c, x: f(c, x, y).sum()
                return f(c, x, y), jax.jvp(lambda x: f(c, x, y), (x,), (y,))[1], *jax.grad(total, (1, 0))(c, x)
            return run

        explicit = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2], axis_types=(AxisType.Explicit,))
        auto = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
        run, c = derivatives(functions["NAME"]), jnp.float32(2)
        want = jax.jit(run)(c, x, y)
        split = (P("rows"), P("rows"), P("rows"), P())
        by_hand = jax.shard_map(run, mesh=auto, in_specs=(P(), P("rows"), P("rows")), out_specs=split)
        results = [jax.jit(by_hand)(c, x, y)]
        with jax.set_mesh(explicit):
            put = lambda a: jax.device_put(a, NamedSharding(explicit, P("rows", None)))
            results.append(jax.jit(run)(c, put(x), put(y)))
        for got in results:
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-6, atol=2e-6)  # sums in another order
        print("agreed")
    """
    assert on_eight_devices(program.replace("NAME", name)).strip() == "agreed"


def test_labels_that_are_divided_where_the_logits_are_constant(on_eight_devices: Callable[..., str]) -> None:
    program = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, PartitionSpec as P
        from jaxact.losses import softmax_cross_entropy_with_integer_labels as loss
        x, y = jnp.float32(np.random.default_rng(0).normal(size=(64, 40))), jnp.arange(128) % 40
        run = lambda y: loss(x, y)  # so many that there is a branch, whose two ways must be of one type
        mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
        got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("rows"), out_specs=P("rows")))(y)
        np.testing.assert_allclose(got, jnp.concatenate([run(y[:64]), run(y[64:])]), rtol=8 * 2**-24)  # fused otherwise
        print("agreed")
    """
    assert on_eight_devices(program).strip() == "agreed"


@pytest.mark.parametrize(
    ("of", "spec"),
    [
        (
            "jax.grad(lambda x, y, w: loss(x, y, class_weight=w, label_smoothing=0.1).sum(), (0, 2))",
            '"rows", "classes"',
        ),
        # `vmap` takes the divided axis from the type of the labels.
        ("jax.vmap(jax.value_and_grad(lambda x, y, w: loss(x, y, class_weight=w)), (0, 0, None))", '"rows"'),
    ],
    ids=["sum", "batch"],
)
def test_class_weights_that_are_on_no_mesh(of: str, spec: str, on_eight_devices: Callable[..., str]) -> None:
    program = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from jaxact.losses import softmax_cross_entropy_with_integer_labels as loss
        x, y, w = np.float32(np.random.default_rng(0).normal(size=(8, 4))), np.arange(8) % 4, jnp.arange(1.0, 5.0)
        run = jax.jit(OF)
        mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=2 * (AxisType.Explicit,))
        with jax.set_mesh(mesh):
            put = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, P(SPEC)), (y, P("rows")))]
            got = run(*put, w)
        for a, b in zip(got, run(x, y, w), strict=True):
            np.testing.assert_allclose(np.asarray(a), b, rtol=2e-6, atol=2e-6)  # sums in another order
        print("agreed")
    """
    assert on_eight_devices(program.replace("OF", of).replace("SPEC", spec)).strip() == "agreed"


def test_several_class_axes_of_which_the_last_is_divided(on_eight_devices: Callable[..., str]) -> None:
    program = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from jaxact import losses
        x, y = np.float32(np.random.default_rng(0).normal(size=(4, 2, 8))), np.arange(4)
        q = np.abs(x) / np.abs(x).sum((1, 2), keepdims=True)
        soft = jax.jit(jax.value_and_grad(lambda x: losses.softmax_cross_entropy(x, q, (1, 2)).sum()))
        hard = jax.jit(lambda x: losses.softmax_cross_entropy_with_integer_labels(x, y, (1, 2)))
        mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=2 * (AxisType.Explicit,))
        for run in (soft, hard):
            with jax.set_mesh(mesh):
                got = run(jax.device_put(x, NamedSharding(mesh, P("rows", None, "classes"))))
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run(x)), strict=True):
                np.testing.assert_allclose(np.asarray(a), b, rtol=2e-6, atol=2e-6)  # sums in another order
        print("agreed")
    """
    assert on_eight_devices(program).strip() == "agreed"
