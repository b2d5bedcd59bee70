"""The fused head on eight devices, in one process and in two: as on one device, with no collective but all-reduce."""

import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

from jaxact import linear_cross_entropy

COMMON = """
    import collections, functools, re, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from jaxact import linear_cross_entropy as head

    rng = np.random.default_rng(0)
    N, D, V = 64, 16, 96
    X, W, BIAS = (np.float32(rng.normal(size=size)) for size in ((N, D), (D, V), (V,)))
    Y, WEIGHT = np.int32(rng.integers(0, V, N)), np.float32(rng.uniform(0, 2, N))
    Y[5] = -100
    OPTIONS = dict(z_loss=0.01, label_smoothing=0.1, temperature=2.0, logit_softcap=4.0)
    COTANGENT = np.cos(np.arange(N, dtype=np.float32))
    ARRAYS = (X, W, BIAS, Y, WEIGHT)

    def loss(x, w, bias, y, weight, reduction="mean", chunk=16, **rest):
        out = head(x, w, y, bias=bias, token_weight=weight, reduction=reduction, chunk=chunk, **OPTIONS, **rest)
        return out if reduction == "mean" else (out * COTANGENT.reshape(out.shape)).sum()

    def value_and_gradients(*args, **options):
        return jax.value_and_grad(functools.partial(loss, **options), (0, 1, 2))(*args)

    def collectives(compiled):
        kinds = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
        return collections.Counter(re.findall(rf"= .*? {kinds}(?:-start)?\\(", compiled.as_text()))

    def agree(got, want):
        # 1e-5 of the largest: sums of some 100 products in another order.
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=0, atol=1e-5 * np.abs(w).max())

    def mesh(kind):
        return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)

    def put(mesh, arrays, batch="data", classes="model"):
        specs = (P(batch), P(None, classes), P(classes), P(batch), P(batch))
        return [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs)]

    def compiled(f, args):
        program = jax.jit(f).lower(*args).compile()
        found = collectives(program)
        assert set(found) <= {"all-reduce"}, found
        return program(*args), found["all-reduce"]

    REDUCTIONS = ("mean", "none")

    # What one device says, compiled once for all the programs that ask for it.
    @functools.cache
    def want(reduction):
        return jax.jit(functools.partial(value_and_gradients, reduction=reduction))(*ARRAYS)

    WEIGHTED = dict(class_weight=np.float32(np.random.default_rng(1).uniform(1, 2, V)), z_loss=0.1, temperature=2.0,
                    logit_softcap=4.0, label_smoothing=0.1)
    WEIGHTED = {name: jnp.asarray(a) for name, a in WEIGHTED.items()}
    # All together, and some alone: what is not asked for takes another path.
    CHOSEN = {"sum": WEIGHTED, "none": {name: WEIGHTED[name] for name in ("temperature", "z_loss")}}

    def gradients_of_options(options, x, w, y, reduction, **rest):
        return jax.grad(lambda o: head(x, w, y, reduction=reduction, chunk=8, **rest, **o).sum())(options)

    @functools.cache
    def wanted_of_options():
        return {r: jax.jit(functools.partial(gradients_of_options, reduction=r))(o, X, W, Y) for r, o in CHOSEN.items()}
"""


@pytest.mark.long
def test_meshes_with_automatic_axes(on_eight_devices: Callable[..., str]) -> None:
    program = """
        auto = mesh(AxisType.Auto)
        for r in REDUCTIONS:
            f = functools.partial(value_and_gradients, reduction=r)
            agree(compiled(f, put(auto, ARRAYS))[0], want(r))
        f = value_and_gradients
        agree(compiled(f, put(auto, ARRAYS, None))[0], want("mean"))
        print("agreed")
    """
    assert on_eight_devices(program, COMMON).strip() == "agreed"


@pytest.mark.exhaustive
def test_tokens_divided_over_two_automatic_axes(on_eight_devices: Callable[..., str]) -> None:
    program = """
        divided = put(mesh(AxisType.Auto), ARRAYS, ("data", "model"), None)
        agree(compiled(value_and_gradients, divided)[0], want("mean"))
        print("agreed")
    """
    assert on_eight_devices(program, COMMON).strip() == "agreed"


@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.exhaustive)])
def test_meshes_with_explicit_axes(reduction: str, on_eight_devices: Callable[..., str]) -> None:
    program = """
        explicit, counts = mesh(AxisType.Explicit), []
        with jax.set_mesh(explicit):
            args = put(explicit, ARRAYS)
            for chunk in (4, 16):
                f = functools.partial(value_and_gradients, reduction=REDUCTION, chunk=chunk)
                got, count = compiled(f, args)
                agree(got, want(REDUCTION))
                x_bar, w_bar, bias_bar = got[1]
                assert jax.typeof(x_bar).sharding.spec == P("data", None)
                assert jax.typeof(w_bar).sharding.spec == P(None, "model")
                counts.append(count)
            # Many chunks are a loop: what is in it stands in the program once. w's gradient is outside.
            assert counts[0] == counts[1], counts

            def pushed(x, w, bias, y, weight):
                f = lambda x, w, bias: loss(x, w, bias, y, weight, reduction=REDUCTION)
                return jax.jvp(f, (x, w, bias), (x, 2 * w, -bias))
            value, pushforward = compiled(pushed, args)[0]
            agree(value, want(REDUCTION)[0])
            terms = [np.float64(a) * b for a, b in zip(want(REDUCTION)[1], (X, 2 * W, -BIAS))]
            # As of the gradients, which are multiplied by numbers of size 1 and added.
            allowed = 1e-5 * sum(abs(t).sum() for t in terms)
            assert abs(float(pushforward) - sum(t.sum() for t in terms)) <= allowed
        print("agreed")
    """
    assert on_eight_devices(program.replace("REDUCTION", repr(reduction)), COMMON).strip() == "agreed"


@pytest.mark.long
def test_features_divided_over_an_explicit_axis(on_eight_devices: Callable[..., str]) -> None:
    # Neither tokens nor classes are; the gradients are divided as the operands.
    program = """
        explicit = mesh(AxisType.Explicit)
        with jax.set_mesh(explicit):
            for of_x, of_w, r in (P(), P("model", None), "mean"), (P(None, "model"), P(), "none"):
                specs = (of_x, of_w, P(), P(), P())
                divided = [jax.device_put(a, NamedSharding(explicit, spec)) for a, spec in zip(ARRAYS, specs)]
                got = jax.jit(functools.partial(value_and_gradients, reduction=r))(*divided)
                agree(got, want(r))
                for g, a in zip(got[1][:2], divided):
                    assert jax.typeof(g).sharding.spec == jax.typeof(a).sharding.spec
        print("agreed")
    """
    assert on_eight_devices(program, COMMON).strip() == "agreed"


@pytest.mark.exhaustive
def test_axes_of_which_some_are_explicit(on_eight_devices: Callable[..., str]) -> None:
    program = """
        explicit, f = mesh(AxisType.Explicit), value_and_gradients
        with jax.set_mesh(explicit):
            agree(compiled(f, put(explicit, ARRAYS, None))[0], want("mean"))
            agree(compiled(f, put(explicit, ARRAYS, "data", None))[0], want("mean"))
            agree(compiled(f, put(explicit, ARRAYS, ("data", "model"), None))[0], want("mean"))
        print("agreed")
    """
    assert on_eight_devices(program, COMMON).strip() == "agreed"


@pytest.mark.long
def test_auxiliary_on_explicit_axes(on_eight_devices: Callable[..., str]) -> None:
    program = """
        def extras(x, w, y):
            loss, aux = head(x, w, y, return_aux=True)
            return loss + (aux.log_sum_exp * aux.entropy).sum(), aux
        @jax.jit
        def run(x, w, y):
            # And a second derivative, of which the prediction has no part.
            loss = lambda x: head(x, w, y, return_aux=True)[0]
            return jax.grad(extras, (0, 1), has_aux=True)(x, w, y)[0], jax.jvp(jax.grad(loss), (x,), (x,))[1]
        explicit = mesh(AxisType.Explicit)
        with jax.set_mesh(explicit):
            x, w, _, y, _ = put(explicit, ARRAYS)
            got = run(x, w, y)
        agree(got, run(X, W, Y))
        print("agreed")
    """
    assert on_eight_devices(program, COMMON).strip() == "agreed"


@pytest.mark.exhaustive
def test_batches_of_sequences(on_eight_devices: Callable[..., str]) -> None:
    program = """
        shaped = [a.reshape(4, 16, *a.shape[1:]) if a.shape[0] == N else a for a in ARRAYS]
        for kind in (AxisType.Explicit, AxisType.Auto):
            this = mesh(kind)
            with jax.set_mesh(this):
                for r in REDUCTIONS if kind == AxisType.Explicit else ("mean",):
                    f = functools.partial(value_and_gradients, reduction=r)
                    got, _ = compiled(f, put(this, shaped))
                    value, (x_bar, *rest) = got
                    agree((value, (x_bar.reshape(N, D), *rest)), want(r))
        def extras(*args, **rest):
            return head(*args, return_aux=True, chunk=4, **rest)
        x, w, _, y, _ = shaped
        alone = jax.jit(extras)(x, w, y)
        this = mesh(AxisType.Explicit)
        with jax.set_mesh(this):
            x, w, _, y, _ = put(this, shaped)
            got = jax.jit(extras)(x, w, y)
        assert np.asarray(got[1].predicted).tolist() == np.asarray(alone[1].predicted).tolist()
        assert np.asarray(got[1].correct).tolist() == np.asarray(alone[1].correct).tolist()
        assert int(got[1].valid) == N - 1
        agree((got[0], got[1].log_sum_exp, got[1].entropy), (alone[0], alone[1].log_sum_exp, alone[1].entropy))
        print("agreed")
    """
    assert on_eight_devices(program, COMMON).strip() == "agreed"


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_shard_map(check_vma: bool, on_eight_devices: Callable[..., str]) -> None:
    program = """
        auto, specs = mesh(AxisType.Auto), (P("data"), P(None, "model"), P("model"), P("data"), P("data"))

        def by_hand(x, w, bias, y, weight, chunk=8):
            def local(x, w, bias, y, weight):
                total = jax.lax.psum((weight * (y != -100)).sum(), "data")

                def part(x, w, bias):
                    out = head(x, w, y, bias=bias, token_weight=weight, reduction="sum", chunk=chunk,
                               axis_name="model", **OPTIONS) / total
                    return jax.lax.psum(out, "data") if CHECK_VMA else out

                value, (x_bar, w_bar, bias_bar) = jax.value_and_grad(part, (0, 1, 2))(x, w, bias)
                if not CHECK_VMA:
                    value, w_bar, bias_bar = jax.lax.psum((value, w_bar, bias_bar), "data")
                return value, (x_bar, w_bar, bias_bar)

            out = (P(), specs[:3])
            return jax.shard_map(local, mesh=auto, in_specs=specs, out_specs=out, check_vma=CHECK_VMA)(
                x, w, bias, y, weight)

        counts = []
        for chunk in (2, 8):
            got, count = compiled(functools.partial(by_hand, chunk=chunk), put(auto, ARRAYS))
            agree(got, want("mean"))
            counts.append(count)
        assert counts[0] == counts[1], counts

        def none(*args):
            def local(x, w, bias, y, weight, cotangent):
                def part(x, w, bias):
                    out = head(x, w, y, bias=bias, token_weight=weight, reduction="none", chunk=8, axis_name="model",
                               **OPTIONS) @ cotangent
                    return jax.lax.psum(out, "data") if CHECK_VMA else out

                value, (x_bar, w_bar, bias_bar) = jax.value_and_grad(part, (0, 1, 2))(x, w, bias)
                if not CHECK_VMA:
                    value, w_bar, bias_bar = jax.lax.psum((value, w_bar, bias_bar), "data")
                return value, (x_bar, w_bar, bias_bar)

            out = (P(), specs[:3])
            f = jax.shard_map(local, mesh=auto, in_specs=(*specs, P("data")), out_specs=out, check_vma=CHECK_VMA)
            return f(*args, COTANGENT)

        agree(compiled(none, put(auto, ARRAYS))[0], want("none"))
        print("agreed")
    """
    assert on_eight_devices(program.replace("CHECK_VMA", str(check_vma)), COMMON).strip() == "agreed"


@pytest.mark.long
@pytest.mark.parametrize(
    "way",
    [
        pytest.param("auto", marks=pytest.mark.exhaustive),
        pytest.param("explicit", marks=pytest.mark.exhaustive),
        "check_vma",
        pytest.param("no check_vma", marks=pytest.mark.exhaustive),
    ],
)
def test_gradients_of_options(way: str, on_eight_devices: Callable[..., str]) -> None:
    program = """
        this = mesh(AxisType.Explicit if WAY == "explicit" else AxisType.Auto)

        def by_hand(options, x, w, y, reduction):
            def local(options, x, w, y):
                if WAY == "check_vma":  # what is the same on all devices has the gradient of all
                    return gradients_of_options(options, x, w, y, reduction, axis_name="model")
                return jax.lax.psum(gradients_of_options(options, x, w, y, reduction, axis_name="model"), "data")

            split = {name: P("model") if name == "class_weight" else P() for name in options}
            specs = (split, P("data"), P(None, "model"), P("data"))
            return jax.shard_map(local, mesh=this, in_specs=specs, out_specs=split, check_vma=WAY == "check_vma")(
                options, x, w, y)

        failed = []
        for r, chosen in CHOSEN.items():
            f = functools.partial(by_hand if "vma" in WAY else gradients_of_options, reduction=r)
            wanted = wanted_of_options()[r]
            with jax.set_mesh(this):
                x, w, _, y, _ = put(this, ARRAYS)
                got = jax.jit(f)(chosen, x, w, y)
            for name in chosen:
                try:
                    agree(got[name], wanted[name])
                except AssertionError:
                    failed.append((r, name, float(np.mean(got[name]) / np.mean(wanted[name]))))
        assert not failed, failed
        print("agreed")
    """
    assert on_eight_devices(program.replace("WAY", repr(way)), COMMON).strip() == "agreed"


def start(first: str, program: str) -> Any:
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(textwrap.dedent(part) for part in (first, COMMON, program))],
        env={
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": ":".join(sys.path),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def agrees(*processes: Any) -> None:
    try:
        for process in processes:
            out, errors = process.communicate(timeout=120)
            assert out.strip().endswith("agreed"), errors[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


# The program is that of one process, in which both reductions are tested; here it is devices that are far apart.
@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_processes(reduction: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Before any device is asked for.
    connect = f"""
        import jax
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize("localhost:{port}", num_processes=2, process_id=PROCESS)
    """
    program = """
        def everywhere(mesh, arrays):
            specs = (P("data"), P(None, "model"), P("model"), P("data"), P("data"))
            return [
                jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), lambda i, a=a: a[i])
                for a, spec in zip(arrays, specs)
            ]

        def local(got, want):
            for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                for shard in g.addressable_shards:
                    here = np.asarray(w)[shard.index]
                    np.testing.assert_allclose(np.asarray(shard.data), here, rtol=0, atol=1e-5 * np.abs(w).max())

        assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
        this = mesh(AxisType.Explicit)
        with jax.set_mesh(this):
            f = functools.partial(value_and_gradients, reduction=REDUCTION)
            local(compiled(f, everywhere(this, ARRAYS))[0], want(REDUCTION))
        print("agreed")
    """
    program = program.replace("REDUCTION", repr(reduction))
    agrees(*(start(connect.replace("PROCESS", str(i)), program) for i in range(2)))


@pytest.mark.long
def test_by_hand_over_one_axis_of_an_explicit_mesh(on_eight_devices: Callable[..., str]) -> None:
    # The classes over "model" with tokens on "data"; and the tokens over "data" with classes on "model".
    program = """
        def one(x, w, y, **options):
            return head(x, w, y, chunk=16, **options)

        want = jax.jit(jax.value_and_grad(one, (0, 1)))(X, W, Y)
        explicit = mesh(AxisType.Explicit)
        ways = [
            (functools.partial(one, axis_name="model"), "model", (P(), P(None, "model"), P())),
            (lambda *args: jax.lax.pmean(one(*args, ignore_index=None), "data"), "data", (P("data"), P(), P("data"))),
        ]
        with jax.set_mesh(explicit):
            x, w, _, y, _ = put(explicit, ARRAYS)
            for f, axis, specs in ways:
                if axis == "data":
                    y = abs(y) % V  # with as many tokens that count on each device
                    want = jax.jit(jax.value_and_grad(one, (0, 1)))(X, W, abs(Y) % V)
                f = jax.shard_map(f, mesh=explicit, in_specs=specs, out_specs=P(), axis_names={axis})
                agree(jax.jit(jax.value_and_grad(f, (0, 1)))(x, w, y), want)
        print("agreed")
    """
    assert on_eight_devices(program, COMMON).strip() == "agreed"


@pytest.mark.parametrize("differs", ["x", "w"])
@pytest.mark.parametrize("reduction", ["mean", "sum", pytest.param("none", marks=pytest.mark.long)])
def test_labels_that_are_the_same_where_something_else_is_not(differs: str, reduction: Any) -> None:
    # One device is enough: that something differs is a matter of types.
    x, w, y = np.eye(6, 4, dtype=np.float32), np.arange(20, dtype=np.float32).reshape(4, 5) / 8, np.arange(6) % 5

    def loss(x: Any, w: Any) -> Any:
        value, aux = linear_cross_entropy(x, w, y, reduction=reduction, return_aux=True)
        return value.sum() + aux.entropy.sum()

    of_both = jax.value_and_grad(loss, (0, 1))
    mesh = jax.make_mesh((1,), ("m",), axis_types=(AxisType.Auto,))
    specs = P("m") if differs == "x" else P(), P("m") if differs == "w" else P()

    def here(x: Any, w: Any) -> Any:
        value, gradients = of_both(x, w)
        return lax.psum(value, "m"), gradients

    divided = jax.jit(jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=(P(), specs)))
    for got, want in zip(jax.tree.leaves(divided(x, w)), jax.tree.leaves(of_both(x, w)), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-6)  # of two programs, a few ulp
