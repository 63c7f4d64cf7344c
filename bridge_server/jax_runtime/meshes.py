"""Where a worker's models run: on which device, or on a mesh of several, and how arrays are laid
out on it.

Programs on the host read the client's memory as it lies there. For all others it is brought to
their device at each run: what it holds changes from one to the next.

How is said beside the model: `net_shardings` in the module of `net` maps paths, as torch shows
them, to PartitionSpecs. The model is constrained accordingly where its arguments come in;
everything else, gradients and residuals included, is XLA's to derive. So a transform needs no rule
of its own.
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
    """Where a worker's arrays lie. Without axes: on the one device that jax prefers."""

    def __init__(self, axes: Mapping[str, int]) -> None:
        self._mesh = _mesh(axes) if axes else None

    @functools.cached_property
    def device(self) -> jax.Device:
        """The device that models run on; on a mesh, its first."""
        if self._mesh is not None:
            return self._mesh.devices.flat[0]
        preferred = jax.config.jax_default_device  # type: ignore[attr-defined]
        if isinstance(preferred, jax.Device):
            return preferred
        return jax.local_devices(backend=preferred)[0]

    @functools.cached_property
    def is_on_host(self) -> bool:
        """Whether programs take arrays in the host's memory as they are, and leave theirs there."""
        if self.device.platform != "cpu":
            return False
        return self._mesh is not None or self.device == jax.local_devices(backend="cpu")[0]

    @functools.cached_property
    def ordinal(self) -> int | None:
        """The number, in this process, of the GPU that models run on; None for all else."""
        is_gpu = self._mesh is None and self.device.platform == "gpu"
        return self.device.local_hardware_id if is_gpu else None

    def holding(self, model: Model) -> Model:
        """Return the model with its own parameters on the device."""
        if self._mesh is not None or self.is_on_host:
            return model
        return dataclasses.replace(model, values=jax.device_put(list(model.values), self.device))

    def context(self) -> AbstractContextManager[Any]:
        """Return the context in which models are traced: they may name the axes of the mesh."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def spread(self, model: Model, shardings: Mapping[str, Any]) -> Model:
        """Return the model with its shardings, and with its own parameters laid out so.

        Raises:
          CallerError: there is no mesh.
          TargetError: a sharding is none, or of a parameter that there is not.
        """
        if self._mesh is None:
            raise CallerError(
                f"the model {model.name!r} has shardings; name the axes they are about with --mesh"
            )
        paths = [parameter.path for parameter in model.parameters]
        for pattern, spec in shardings.items():
            if not isinstance(spec, PartitionSpec):
                raise TargetError(
                    f"the sharding of {pattern!r} in {model.name!r} is {spec!r}; expected a"
                    " PartitionSpec"
                )
            if not re.match(r"(args|kwargs)\b", pattern) and not any(
                _matches(pattern, path) for path in paths
            ):
                raise TargetError(
                    f"{model.name!r} has a sharding of {pattern!r}, but its parameters are {paths}"
                )
        values = [
            jax.device_put(
                value, NamedSharding(self._mesh, _spec_of(path, shardings) or PartitionSpec())
            )
            for path, value in zip(paths, model.values, strict=True)
        ]
        return dataclasses.replace(model, values=values, shardings=shardings)

    def constrained(
        self, arrays: Sequence[Any], paths: Sequence[str], model: Model
    ) -> Sequence[Any]:
        """Return the arrays of these paths, laid out as the model wants them.

        While it is traced.
        """
        if self._mesh is None or not model.shardings:
            return arrays
        return [
            (
                array
                if (spec := _spec_of(path, model.shardings)) is None
                else jax.lax.with_sharding_constraint(array, NamedSharding(self._mesh, spec))
            )
            for array, path in zip(arrays, paths, strict=True)
        ]

    def jit(self, f: Callable[..., Any]) -> Any:
        # XLA's choice of layouts is told for each argument only if none is left out.
        return jax.jit(f, keep_unused=self._mesh is not None)

    def placing(self, run: Any) -> Callable[..., Any]:
        """Return a function, compiled if there is a mesh, as one that brings its arguments to
        the devices first."""
        if self._mesh is not None:
            shardings, _ = run.input_shardings
            return lambda *arguments: run(*jax.device_put(arguments, shardings))
        return run if self.is_on_host else functools.partial(_run_on, self.device, run)


def _run_on(device: jax.Device, run: Callable[..., Any], own: Any, *arrays: Any) -> Any:
    """Run a function on arrays of which those in the host's memory are brought to a device
    first."""
    positions = [i for i, x in enumerate(arrays) if isinstance(x, np.ndarray)]
    if not positions:
        return run(own, *arrays)
    brought = jax.device_put([arrays[i] for i in positions], device)
    try:
        return run(own, *replaced(arrays, positions, brought))
    finally:
        jax.block_until_ready(
            brought
        )  # from now on the client may write there again, whether or not it was used


def _mesh(axes: Mapping[str, int]) -> Mesh:
    needed, devices = math.prod(axes.values()), jax.devices()
    if needed > len(devices):
        raise CallerError(
            f"--mesh {','.join(f'{name}={size}' for name, size in axes.items())} needs {needed}"
            f" devices, and this worker has {len(devices)} ({devices[0].platform}); a CPU counts as"
            f" several with XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices[:needed]
    )


def _spec_of(path: str, shardings: Mapping[str, Any]) -> Any:
    """Return the spec of the first pattern that fits, or None."""
    return next((spec for pattern, spec in shardings.items() if _matches(pattern, path)), None)


def _matches(pattern: str, path: str) -> bool:
    """Whether the path is the pattern's, in which `*` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), path) is not None
