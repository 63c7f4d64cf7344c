"""Layout of a worker's arrays: its device, or a mesh of devices and the shardings on it.

Programs on the host read the client's memory in place. For programs on other devices, each run
copies the inputs, since the memory's contents change between runs.

Shardings stand beside the model: `net_shardings` in the module of `net` maps paths, as torch shows
them, to PartitionSpecs. The runtime constrains the model's arguments; XLA derives all other
shardings, including those of gradients and residuals. So transforms need no rules of their own.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bridge_server.jax_runtime.transforms import replaced
from bridge_server.runtime import Model
from bridge_wire.errors import CallerError, TargetError


class Layout:
    """Devices and shardings of a worker's arrays; without axes, the one device that jax prefers."""

    def __init__(self, axes: Mapping[str, int]) -> None:
        self._mesh = _mesh(axes) if axes else None

    @functools.cached_property
    def device(self) -> jax.Device:
        """The device that models run on; on a mesh, the first device."""
        if self._mesh is not None:
            return self._mesh.devices.flat[0]
        preferred = jax.config.jax_default_device  # type: ignore[attr-defined]
        if isinstance(preferred, jax.Device):
            return preferred
        return jax.local_devices(backend=preferred)[0]

    @functools.cached_property
    def is_on_host(self) -> bool:
        """Whether programs read inputs from host memory and leave outputs there."""
        if self.device.platform != "cpu":
            return False
        return (
            self._mesh is not None or self.device == jax.local_devices(backend="cpu")[0]
        )

    @functools.cached_property
    def ordinal(self) -> int | None:
        """The number, in this process, of the GPU that models run on; None for other devices."""
        is_gpu = self._mesh is None and self.device.platform == "gpu"
        return self.device.local_hardware_id if is_gpu else None

    def holding(self, model: Model) -> Model:
        """Return the model with its own parameters on the device."""
        if self._mesh is not None or self.is_on_host:
            return model
        return dataclasses.replace(
            model, values=jax.device_put(list(model.values), self.device)
        )

    def context(self) -> AbstractContextManager[Any]:
        """Return the context for traces, in which models may name the axes of the mesh."""
        return (
            contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
        )

    def shard(self, model: Model, shardings: Mapping[str, Any]) -> Model:
        """Return the model with its shardings, and with its own parameters sharded.

        Raises:
          CallerError: there is no mesh.
          TargetError: a sharding is no PartitionSpec, or names no parameter.
        """
        if self._mesh is None:
            raise CallerError(
                f"the model {model.name!r} has shardings; name the axes they are about with --mesh"
            )
        paths = [parameter.path for parameter in model.parameters]
        for pattern, spec in shardings.items():
            _check(model.name, pattern, spec, paths)
        values = []
        for path, value in zip(paths, model.values, strict=True):
            spec = _spec_of(path, shardings) or PartitionSpec()
            values.append(jax.device_put(value, NamedSharding(self._mesh, spec)))
        return dataclasses.replace(model, values=values, shardings=shardings)

    def constrained(
        self, arrays: Sequence[Any], paths: Sequence[str], model: Model
    ) -> Sequence[Any]:
        """Constrain traced arrays with these paths to the model's shardings."""
        if self._mesh is None or not model.shardings:
            return arrays
        constrained = list(arrays)
        for i, path in enumerate(paths):
            spec = _spec_of(path, model.shardings)
            if spec is not None:
                sharding = NamedSharding(self._mesh, spec)
                constrained[i] = jax.lax.with_sharding_constraint(arrays[i], sharding)
        return constrained

    def jit(self, f: Callable[..., Any]) -> Any:
        # A compiled program reports the sharding of every argument only if it drops none.
        return jax.jit(f, keep_unused=self._mesh is not None)

    def placing(self, run: Any) -> Callable[..., Any]:
        """Return a function that moves its arguments to the devices and then runs `run`.

        On a mesh, `run` must be compiled.
        """
        if self._mesh is not None:
            shardings, _ = run.input_shardings
            return lambda *arguments: run(*jax.device_put(arguments, shardings))
        return run if self.is_on_host else functools.partial(_run_on, self.device, run)


def _run_on(device: jax.Device, run: Callable[..., Any], own: Any, *arrays: Any) -> Any:
    """Run a function after moving its arrays in host memory to a device."""
    positions = [i for i, x in enumerate(arrays) if isinstance(x, np.ndarray)]
    if not positions:
        return run(own, *arrays)
    on_device = jax.device_put([arrays[i] for i in positions], device)
    try:
        return run(own, *replaced(arrays, positions, on_device))
    finally:
        # After the run, the client may write to the host memory, even if the run has not read it.
        jax.block_until_ready(on_device)


def _mesh(axes: Mapping[str, int]) -> Mesh:
    needed = math.prod(axes.values())
    devices = jax.devices()
    if needed > len(devices):
        mesh = ",".join(f"{name}={size}" for name, size in axes.items())
        raise CallerError(
            f"--mesh {mesh} needs {needed} devices, and this worker has {len(devices)}"
            f" ({devices[0].platform}); a CPU counts as several with"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices[:needed]
    )


def _check(model: str, pattern: str, spec: Any, paths: Sequence[str]) -> None:
    if not isinstance(spec, PartitionSpec):
        raise TargetError(
            f"the sharding of {pattern!r} in {model!r} is {spec!r}; expected a PartitionSpec"
        )
    is_of_arguments = re.match(r"(args|kwargs)\b", pattern)
    if not is_of_arguments and not any(_matches(pattern, path) for path in paths):
        raise TargetError(
            f"{model!r} has a sharding of {pattern!r}, but its parameters are {paths}"
        )


def _spec_of(path: str, shardings: Mapping[str, Any]) -> Any:
    """Return the spec of the first pattern that matches, or None."""
    return next(
        (spec for pattern, spec in shardings.items() if _matches(pattern, path)), None
    )


def _matches(pattern: str, path: str) -> bool:
    """Return whether a path matches a pattern, in which `*` matches any text."""
    regex = ".*".join(map(re.escape, pattern.split("*")))
    return re.fullmatch(regex, path) is not None
