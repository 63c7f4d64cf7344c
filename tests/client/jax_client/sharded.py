"""Calls on four devices; run by test_sharding.py as a program of its own, since jax counts its
devices only once."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bridge_client import Session, connect
from bridge_client.jax import RemoteTorchFunction


def main(address: str) -> None:
    """Check each way to spread a call, and say so."""
    jax.config.update("jax_enable_x64", True)
    with connect(address) as session:
        mesh = Mesh(np.array(jax.devices()), ("data",))
        assert mesh.size == 4
        for check in (
            in_shard_map,
            where_specs_are_declared,
            with_parameters,
            state_and_keys,
            on_another_device,
            on_an_explicit_mesh,
        ):
            check(session, mesh)
            print("checked", check.__name__)


def rows(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape))


def spread(value: jax.Array, mesh: Mesh) -> jax.Array:
    return jax.device_put(value, NamedSharding(mesh, P("data")))


def expect(
    session: Session,
    f: object,
    arguments: tuple[Any, ...],
    expected: object,
    calls: int,
    *,
    sums: bool = False,
) -> None:
    """Check what a jitted function makes, in how many calls, and that nothing is gathered on the
    way."""
    compiled = jax.jit(f).lower(*arguments).compile()
    text = compiled.as_text()
    assert (
        "all-gather" not in text
        and "collective-permute" not in text
        and "all-to-all" not in text
    )
    assert ("all-reduce" in text) == sums
    before = session.stats()["calls"]
    seen = jax.block_until_ready(compiled(*arguments))
    assert session.stats()["calls"] - before == calls, session.stats()["calls"] - before
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
        seen,
        expected,
    )


def in_shard_map(session: Session, mesh: Mesh) -> None:
    f, x = RemoteTorchFunction(session, name="square"), rows(8, 3)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    expect(session, mapped, (spread(x, mesh),), x**2, 4)
    expect(session, jax.grad(lambda x: mapped(x).sum()), (spread(x, mesh),), 2 * x, 8)


def where_specs_are_declared(session: Session, mesh: Mesh) -> None:
    f, x = (
        RemoteTorchFunction(
            session, name="square", in_specs=P("data"), out_specs=P("data")
        ),
        rows(8, 3),
    )
    sharded = spread(x, mesh)
    expect(session, f, (sharded,), x**2, 4)
    assert jax.jit(f)(sharded).sharding.spec == P("data")
    expect(
        session, jax.grad(lambda x: f(jnp.sin(x)).sum()), (sharded,), jnp.sin(2 * x), 8
    )
    expect(
        session,
        lambda x: jax.jvp(jax.grad(lambda x: f(x).sum()), (x,), (x,))[1],
        (sharded,),
        2 * x,
        4,
    )
    np.testing.assert_allclose(f(sharded), x**2)  # at once
    before = session.stats()["calls"]
    np.testing.assert_allclose(f(x), x**2)  # on one device
    assert session.stats()["calls"] - before == 1


def with_parameters(session: Session, mesh: Mesh) -> None:
    one = RemoteTorchFunction(session, name="vit")
    spread_out = RemoteTorchFunction(
        session, name="vit", in_specs=(P("data"),), out_specs=P("data")
    )
    images, params = rows(8, 3, 8, 8), one.params

    def loss(f: RemoteTorchFunction) -> object:
        return jax.value_and_grad(
            lambda params, images: (f.apply(params, images) ** 2).sum()
        )

    expected = jax.jit(loss(one))(params, images)
    expect(
        session,
        loss(spread_out),
        (params, spread(images, mesh)),
        expected,
        8,
        sums=True,
    )


def state_and_keys(session: Session, mesh: Mesh) -> None:
    f = RemoteTorchFunction(
        session, name="normed", in_specs=P("data"), out_specs=P("data")
    )
    x, params, buffers = rows(8, 3), f.params, f.buffers
    _, changed = jax.jit(lambda x: f.apply(params, x, buffers=buffers, mutable=True))(
        spread(x, mesh)
    )
    shards = [
        f.apply(params, shard, buffers=buffers, mutable=True)[1]
        for shard in jnp.split(x, 4)
    ]
    for name in buffers:  # the mean of what each shard makes of it
        np.testing.assert_allclose(
            changed[name], np.mean([shard[name] for shard in shards], 0), rtol=1e-10
        )
    g = RemoteTorchFunction(
        session, name="dropped", in_specs=P("data"), out_specs=P("data")
    )
    ones, params, key = spread(jnp.ones((4, 4)), mesh), g.params, jax.random.key(0)
    made = np.asarray(jax.jit(lambda key: g.apply(params, ones, rng=key))(key))
    assert len({row.tobytes() for row in made != 0}) > 1  # a mask for each shard
    np.testing.assert_array_equal(
        jax.jit(lambda key: g.apply(params, ones, rng=key))(key), made
    )


def on_another_device(session: Session, mesh: Mesh) -> None:
    f = RemoteTorchFunction(session, name="square")
    for device in jax.devices()[::2]:
        x, before = jax.device_put(rows(64), device), session.stats()
        made, pull = jax.vjp(f, x)
        pulled = pull(made)[0]
        assert made.devices() == pulled.devices() == {device}
        np.testing.assert_allclose(pulled, 2 * x**3)
        after = session.stats()
        assert after["calls"] - before["calls"] == 2  # from the residual
        is_shared = (
            session.pool.address_of(made.unsafe_buffer_pointer(), made.nbytes)
            is not None
        )
        assert is_shared == (device is jax.devices()[0])
    assert not f(rows(3)).committed


def on_an_explicit_mesh(session: Session, _: Mesh) -> None:
    """Where shardings are part of the types, as in a mesh of jax.make_mesh."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    one, x = RemoteTorchFunction(session, name="square"), rows(8, 3)
    declared = RemoteTorchFunction(
        session, name="square", in_specs=P("data"), out_specs=P("data")
    )
    for f in (one, declared):
        gradient = jax.jit(jax.grad(lambda x, f=f: f(x).sum()))(spread(x, mesh))
        np.testing.assert_allclose(gradient, 2 * x)
    expect(session, declared, (spread(x, mesh),), x**2, 4)
    with jax.set_mesh(mesh):
        # Which is not spread yet.
        np.testing.assert_allclose(jax.jit(declared)(x), x**2)


if __name__ == "__main__":
    main(sys.argv[1])
