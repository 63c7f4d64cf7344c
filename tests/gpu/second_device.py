"""JAX models on another device than the host's memory belongs to: what a GPU is to them, without
one.

Run by test_runtimes in an interpreter that forces two CPU devices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bridge_server.jax_runtime import JaxRuntime
from bridge_server.runtime import Options
from tests.runtimes import Hosted, placed

SECOND = jax.devices("cpu")[1]


def runs_there(runtime: JaxRuntime) -> None:
    hosted = Hosted(
        runtime,
        lambda x, unused, scale: (jnp.sin(x) * scale, jnp.ones(2, jnp.bfloat16)),
    )
    x = placed(np.arange(6, dtype=np.float32).reshape(2, 3))
    unused = placed(np.ones(4, np.float16))
    program = hosted.call(x, unused, 2.0)
    number = placed(np.float64(3.0))
    views = [
        hosted.view(array, spec)
        for array, spec in zip((x, unused, number), program.inputs, strict=True)
    ]
    for _ in range(2):
        outputs, _ = program.run(views, None)
        assert {device for y in outputs for device in y.devices()} == {SECOND}
        np.testing.assert_allclose(
            hosted.written(outputs[0], program.outputs[0]),
            np.sin(x) * 3,
            rtol=1e-6,
            atol=1e-6,
        )
        np.testing.assert_array_equal(
            hosted.written(outputs[1], program.outputs[1]).astype(np.float32), [1, 1]
        )
        x += 1  # what a view shows is read at each run
    assert runtime.exclusive(outputs, views, None) == [None, None]


def keeps_there(runtime: JaxRuntime) -> None:
    # A model may be loaded elsewhere.
    own = jax.device_put(np.float32([1, 2, 3]), jax.devices("cpu")[0])
    hosted = Hosted(runtime, (lambda w, x: jnp.sin(w * x), own))
    (w,) = runtime.prepare_parameters(hosted.model).run((), None)[0]
    assert w.devices() == {SECOND}
    x = np.float32([0.1, 0.2, 0.3])
    program = hosted.call(x, keep=[0])
    (y,), kept = hosted.run_keeping(program, x)
    np.testing.assert_allclose(y, np.sin(own * x), rtol=1e-6, atol=1e-6)
    (gradient,) = hosted.run(
        hosted.pullback(program, [0]), np.ones(3, np.float32), residual=kept
    )
    np.testing.assert_allclose(gradient, own * np.cos(own * x), rtol=1e-6, atol=1e-6)


def runs_without_arrays(runtime: JaxRuntime) -> None:
    hosted = Hosted(runtime, lambda: jnp.arange(3.0))
    (y,) = hosted.run(hosted.call())
    assert y.tolist() == [0, 1, 2]


if __name__ == "__main__":
    jax.config.update("jax_default_device", SECOND)
    for how in (Options(), Options(jit=False)):
        made = JaxRuntime(how)
        runs_there(made)
        keeps_there(made)
        runs_without_arrays(made)
