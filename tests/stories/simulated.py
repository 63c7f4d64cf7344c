"""Simulators and training states of JAX libraries, served to torch and run by JAX itself.

Each is a namespace: `reset(seed)` returns a state, `step(state, action)` the next one, and
`seen(state)` a vector of floats of it. Not part of `make setup`: brax, mujoco-mjx, gymnax, jumanji,
flax, optax and jax-md. Run as a program, it writes what JAX's own loop computes.

    python -m tests.stories.simulated NAME OUTPUT.npz
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SEEDS = (0, 1, 2)
DIFFERENTIATED = 10  # steps
_PENDULUM = """
<mujoco>
  <option timestep="0.01"><flag contact="disable"/></option>
  <worldbody>
    <body pos="0 0 1">
      <joint name="hinge" type="hinge" axis="0 1 0" damping="0.1"/>
      <geom type="capsule" fromto="0 0 0 0 0 -0.5" size="0.02" mass="1"/>
    </body>
  </worldbody>
  <actuator><motor joint="hinge" ctrlrange="-1 1"/></actuator>
</mujoco>
"""


def _vector(*arrays: Any) -> Any:
    return jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in arrays])


def _brax() -> SimpleNamespace:
    from brax import envs

    env = envs.get_environment("inverted_pendulum", backend="generalized")
    return SimpleNamespace(
        reset=lambda seed: env.reset(jax.random.key(seed)),
        # A tenth: with full force, brax itself leaves the rail and ends at NaN.
        step=lambda state, action: env.step(state, 0.1 * action[None]),
        seen=lambda state: _vector(state.obs, state.reward, state.pipeline_state.q),
    )


def _mjx() -> SimpleNamespace:
    import mujoco
    from mujoco import mjx

    model = mjx.put_model(mujoco.MjModel.from_xml_string(_PENDULUM))

    def reset(seed: Any) -> Any:
        angle = jax.random.uniform(jax.random.key(seed), (1,), minval=-1.0, maxval=1.0)
        return mjx.make_data(model).replace(qpos=angle)

    return SimpleNamespace(
        reset=reset,
        step=lambda data, action: mjx.step(model, data.replace(ctrl=action[None])),
        seen=lambda data: _vector(data.qpos, data.qvel, data.time),
    )


def _gymnax() -> SimpleNamespace:
    import gymnax

    env, parameters = gymnax.make("CartPole-v1")

    def reset(seed: Any) -> Any:
        key, used = jax.random.split(jax.random.key(seed))
        observation, state = env.reset(used, parameters)
        return observation, state, key

    def step(state: Any, action: Any) -> Any:
        key, used = jax.random.split(state[2])
        push = (action > 0).astype(jnp.int32)
        observation, env_state, *_ = env.step(used, state[1], push, parameters)
        return observation, env_state, key

    return SimpleNamespace(
        reset=reset, step=step, seen=lambda state: _vector(state[0], state[1].time)
    )


def _jumanji() -> SimpleNamespace:
    import jumanji

    env = jumanji.make("Snake-v1")

    def step(state: Any, action: Any) -> Any:
        return env.step(state, (2.0 + 2.0 * action).astype(jnp.int32) % 4)[0]

    return SimpleNamespace(
        reset=lambda seed: env.reset(jax.random.key(seed))[0],
        step=step,
        seen=lambda state: _vector(state.body_state, state.fruit_position.row),
    )


def _train_state() -> SimpleNamespace:
    import optax
    from flax import linen
    from flax.training.train_state import TrainState

    network, optimizer = linen.Dense(3), optax.adam(0.05)

    def reset(seed: Any) -> Any:
        return TrainState.create(
            apply_fn=network.apply,
            params=network.init(jax.random.key(seed), jnp.ones(2)),
            tx=optimizer,
        )

    def step(state: Any, action: Any) -> Any:
        def loss(params: Any) -> Any:
            x = jnp.stack([action, 1.0 - action])
            return jnp.square(state.apply_fn(params, x) - jnp.arange(3.0)).sum()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    def seen(state: Any) -> Any:
        return _vector(*jax.tree.leaves((state.params, state.opt_state, state.step)))

    return SimpleNamespace(reset=reset, step=step, seen=seen)


def _optax() -> SimpleNamespace:
    import optax

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))

    def reset(seed: Any) -> Any:
        weights = {"w": jax.random.normal(jax.random.key(seed), (4,))}
        return weights, optimizer.init(weights)

    def step(state: Any, action: Any) -> Any:
        gradient = jax.tree.map(lambda w: 2.0 * (w - action), state[0])
        updates, optimizer_state = optimizer.update(gradient, state[1], state[0])
        return optax.apply_updates(state[0], updates), optimizer_state

    return SimpleNamespace(
        reset=reset, step=step, seen=lambda state: _vector(*jax.tree.leaves(state))
    )


def _jax_md() -> SimpleNamespace:
    from jax_md import energy, simulate, space

    displacement, shift = space.periodic(6.0)
    init, apply = simulate.nvt_nose_hoover(
        energy.soft_sphere_pair(displacement), shift, dt=1e-2, kT=0.5
    )

    def reset(seed: Any) -> Any:
        place, move = jax.random.split(jax.random.key(seed))
        return init(move, jax.random.uniform(place, (16, 2), maxval=6.0))

    return SimpleNamespace(
        reset=reset,
        step=lambda state, action: apply(state, kT=0.5 + 0.1 * action),
        seen=lambda state: _vector(state.position, state.momentum),
    )


SIMULATORS: dict[str, Callable[[], SimpleNamespace]] = {
    "brax": _brax,
    "mjx": _mjx,
    "gymnax": _gymnax,
    "jumanji": _jumanji,
    "train_state": _train_state,
    "optax": _optax,
    "jax_md": _jax_md,
}
STEPS = {"train_state": 50, "optax": 50, "jax_md": 50}  # others: 100


def __getattr__(name: str) -> SimpleNamespace:
    if name not in SIMULATORS:
        raise AttributeError(name)
    made = globals()[name] = SIMULATORS[name]()
    return made


def main() -> None:
    name, output = sys.argv[1:]
    of = SIMULATORS[name]()
    pushes = np.sin(0.37 * np.arange(STEPS.get(name, 100))).astype(np.float32)
    step, steps = jax.jit(of.step), jax.jit(jax.vmap(of.step, in_axes=(0, None)))
    state, states = jax.jit(of.reset)(0), jax.jit(jax.vmap(of.reset))(jnp.array(SEEDS))
    for push in pushes:
        state, states = step(state, push), steps(states, push)

    def loss(scale: Any) -> Any:
        def follow(state: Any, push: Any) -> tuple[Any, None]:
            return of.step(state, scale * push), None

        last, _ = jax.lax.scan(follow, of.reset(0), pushes[:DIFFERENTIATED])
        return jnp.square(of.seen(last)).sum()

    slope = jax.jit(jax.grad(loss))(jnp.float32(0.5))
    np.savez(
        output,
        pushes=pushes,
        seeds=SEEDS,
        differentiated=DIFFERENTIATED,
        one=of.seen(state),
        batch=jax.vmap(of.seen)(states),
        slope=slope,
    )


if __name__ == "__main__":
    main()
