"""A worker whose models span several devices: the mesh, and how arrays are laid out on it.

How is said beside the model: `net_shardings` in the module of `net` maps paths, as torch shows them, to PartitionSpecs.
The model is constrained accordingly where its arguments come in; everything else, gradients and residuals included,
is XLA's to derive. So a transform needs no rule of its own.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bridge_server.runtime import Model
from bridge_wire.errors import CallerError, TargetError


class Layout:
    """Where a worker's arrays lie. Without axes: on the one device that jax prefers."""

    def __init__(self, axes: Mapping[str, int]) -> None:
        self._mesh = _mesh(axes) if axes else None

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
            raise CallerError(f"the model {model.name!r} has shardings; name the axes they are about with --mesh")
        paths = [parameter.path for parameter in model.parameters]
        for pattern, spec in shardings.items():
            if not isinstance(spec, PartitionSpec):
                raise TargetError(
                    f"the sharding of {pattern!r} in {model.name!r} is {spec!r}; expected a PartitionSpec"
                )
            if not re.match(r"(args|kwargs)\b", pattern) and not any(_matches(pattern, path) for path in paths):
                raise TargetError(f"{model.name!r} has a sharding of {pattern!r}, but its parameters are {paths}")
        values = [
            jax.device_put(value, NamedSharding(self._mesh, _spec_of(path, shardings) or PartitionSpec()))
            for path, value in zip(paths, model.values, strict=True)
        ]
        return dataclasses.replace(model, values=values, shardings=shardings)

    def constrained(self, arrays: Sequence[Any], paths: Sequence[str], model: Model) -> Sequence[Any]:
        """Return the arrays of these paths, laid out as the model wants them. While it is traced."""
        if self._mesh is None or not model.shardings:
            return arrays
        return [
            array
            if (spec := _spec_of(path, model.shardings)) is None
            else jax.lax.with_sharding_constraint(array, NamedSharding(self._mesh, spec))
            for array, path in zip(arrays, paths, strict=True)
        ]

    def jit(self, f: Callable[..., Any]) -> Any:
        # XLA's choice of layouts is told for each argument only if none is left out.
        return jax.jit(f, keep_unused=self._mesh is not None)

    def placing(self, compiled: Any) -> Callable[..., Any]:
        """Return the compiled function as one that spreads its arguments over the devices first."""
        if self._mesh is None:
            return compiled
        shardings, _ = compiled.input_shardings
        return lambda *arguments: compiled(*jax.device_put(arguments, shardings))


def _mesh(axes: Mapping[str, int]) -> Mesh:
    needed, devices = math.prod(axes.values()), jax.devices()
    if needed > len(devices):
        raise CallerError(
            f"--mesh {','.join(f'{name}={size}' for name, size in axes.items())} needs {needed} devices, and this "
            f"worker has {len(devices)} ({devices[0].platform}); a CPU counts as several with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices[:needed])


def _spec_of(path: str, shardings: Mapping[str, Any]) -> Any:
    """Return the spec of the first pattern that fits, or None."""
    return next((spec for pattern, spec in shardings.items() if _matches(pattern, path)), None)


def _matches(pattern: str, path: str) -> bool:
    """Whether the path is the pattern's, in which `*` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), path) is not None
