"""The ways from JAX to a torch function: in this process, in a worker, traced.

Imports both frameworks.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from torch import nn

from bridge_client import spawn
from bridge_client.inproc import trace_torch
from bridge_client.jax import RemoteTorchFunction
from bridge_wire.errors import BridgeError
from exact import ROOT
from exact.cases import Entry
from exact.torch_db import Subject

# The exceptions that count as a refusal. jit raises JAX's own for Python code that reads values.
TYPED = (BridgeError, NotImplementedError)
TRACED_TYPED = (
    *TYPED,
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
)

# A function of flat arrays (parameters, buffers, then inputs) that returns a list of leaves.
Function = Callable[..., list[Any]]


class InProcess:
    name = "inproc"
    typed: tuple[type[BaseException], ...] = TYPED
    is_traced = False

    def function(
        self, entry: Entry, index: int, subject: Subject, key: Any
    ) -> Function:
        return _called(RemoteTorchFunction(subject.target), key, {})

    def close(self) -> None:
        pass


class Traced:
    """`trace_torch` under jit."""

    name = "traced"
    typed = TRACED_TYPED
    is_traced = True

    def function(
        self, entry: Entry, index: int, subject: Subject, key: Any
    ) -> Function:
        traced = trace_torch(subject.target)
        if isinstance(subject.target, nn.Module):
            # Parameters, then buffers, in the order of the values.
            names = [name for name, _ in subject.target.named_parameters()]
            buffers = [name for name, _ in subject.target.named_buffers()]

            def module(*values: Any) -> list[Any]:
                params, state, args = _split(values, names, buffers)
                return jax.tree.leaves(traced(params, *args, buffers=state, rng=key))

            return jax.jit(module)
        return jax.jit(lambda *args: jax.tree.leaves(traced(*args, rng=key)))

    def close(self) -> None:
        pass


class Worker:
    """Two workers: one with a function for any operator's sample, one with the modules."""

    name = "worker"
    typed = TYPED
    is_traced = False

    def __init__(self, modules: Sequence[str], *, x64: bool) -> None:
        self._args = ["--x64"] if x64 else []
        self._modules = modules
        self._opened: dict[str, Any] = {}
        self._sessions = contextlib.ExitStack()

    def function(
        self, entry: Entry, index: int, subject: Subject, key: Any
    ) -> Function:
        if entry.database == "module":
            name = module_name(entry, index)
            models = dict.fromkeys([*self._modules, name])
            session = self._session(
                "modules", {name: f"exact.hosted:{name}" for name in models}
            )
            return _called(RemoteTorchFunction(session, name=name), key, {})
        session = self._session("operators", {"sample": "exact.hosted:sample"})
        return _called(RemoteTorchFunction(session), key, {"entry": f"{entry}/{index}"})

    def _session(self, what: str, models: dict[str, str]) -> Any:
        if what not in self._opened:
            session = spawn(
                torch_model=models,
                python=sys.executable,
                cwd=ROOT,
                startup_timeout_s=300,
            )
            self._opened[what] = self._sessions.enter_context(session)
        return self._opened[what]

    def close(self) -> None:
        self._sessions.close()


def module_name(entry: Entry, index: int) -> str:
    return f"m_{entry.name}_{entry.dtype}_{entry.kind}_{index}"


def _called(remote: RemoteTorchFunction, key: Any, statics: dict[str, Any]) -> Function:
    params, buffers = (
        [info.path for info in remote._model.parameters if info.trainable is t]
        for t in (True, False)
    )

    def function(*values: Any) -> list[Any]:
        if key is None and not params and not buffers:
            return jax.tree.leaves(remote(*values, **statics))
        own, state, args = _split(values, params, buffers)
        return jax.tree.leaves(
            remote.apply(own, *args, buffers=state, rng=key, **statics)
        )

    return function


def _split(
    values: Sequence[Any], params: Sequence[str], buffers: Sequence[str]
) -> tuple[Any, Any, Sequence[Any]]:
    rest = iter(values)
    own = dict(zip(params, itertools.islice(rest, len(params)), strict=True))
    state = dict(zip(buffers, itertools.islice(rest, len(buffers)), strict=True))
    return own, state, list(rest)


def open_way(
    name: str, modules: Sequence[str], *, x64: bool
) -> InProcess | Traced | Worker:
    if name == "worker":
        return Worker(modules, x64=x64)
    return InProcess() if name == "inproc" else Traced()
