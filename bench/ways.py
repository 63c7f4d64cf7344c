"""The ways to call one function from torch, each as a step of forward and VJP.

Imports torch and jax.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import torch
from torch import Tensor

from bench import ROOT, WIDTH, models
from bench.ping import Ping
from bridge_client import Session, connect, spawn
from bridge_client.remote.session import RemoteSession
from bridge_client.torch import RemoteJaxFunction

_AGREEMENT = 1e-4
_COUNTED_STEPS = 3

_STATES = ("reset", "step", "reset_tuple", "step_tuple")


class Step:
    """Forward and VJP of one function at one size; leaves the gradients in `leaves`."""

    def __init__(
        self,
        call: Callable[[Tensor], Tensor],
        x: Tensor,
        cotangent: Tensor,
        parameters: Sequence[Tensor] = (),
        session: Session | None = None,
    ) -> None:
        self.call = call
        self.x = x.detach().requires_grad_()
        self.leaves = [self.x, *parameters]
        self._cotangent = cotangent
        self._session = session

    def __call__(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.call(self.x).backward(self._cotangent)

    def bytes_made(self) -> int:
        """Return the bytes of the output and the gradients."""
        return self._cotangent.nbytes + sum(leaf.nbytes for leaf in self.leaves)

    def bytes_copied(self) -> float | None:
        """Return the bridge's copied bytes in one step; None for a step without the bridge."""
        if self._session is None:
            return None
        before = self._session.stats()["bytes_copied"]
        for _ in range(_COUNTED_STEPS):
            self()
        return (self._session.stats()["bytes_copied"] - before) / _COUNTED_STEPS


class Workbench:
    """Context manager of a worker in .venv-jax, a session over each lane, and a ping server."""

    def __enter__(self) -> "Workbench":
        with contextlib.ExitStack() as stack:
            self._local = stack.enter_context(
                spawn(
                    jax_model={
                        name: f"bench.models:{name}" for name in (*_NATIVE, *_STATES)
                    },
                    python=ROOT / ".venv-jax/bin/python",
                    cwd=ROOT,
                    require="memfd",
                )
            )
            self._grpc = stack.enter_context(
                connect(_address_of(self._local), lane="grpc")
            )
            self._ping = stack.enter_context(Ping())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def session(self) -> Session:
        """The session over the local lane."""
        return self._local

    def steps(self, function: str, nbytes: int) -> dict[str, Callable[[], None]]:
        """Return a step for each way by its name in `report.WAYS`, all on the same values."""
        x = torch.randn(nbytes // 4)
        x = x.view(-1, WIDTH) if function == "mlp" else x
        cotangent = torch.randn_like(x)
        steps: dict[str, Callable[[], None]] = {
            "native": native(function, x, cotangent),
            "jax2torch": jax2torch(function, x, cotangent),
            "local": remote(self._local, function, x, cotangent),
            "slab": remote(
                self._local,
                function,
                _in_slab(x, self._local),
                _in_slab(cotangent, self._local),
            ),
            "grpc": remote(self._grpc, function, x, cotangent),
            "inproc": inproc(function, x, cotangent),
            "ping": self._ping,
        }
        return steps


def _address_of(session: Session) -> str:
    assert isinstance(session, RemoteSession)
    return session.address


def check_agreement(steps: Mapping[str, Callable[[], None]]) -> None:
    """Raise RuntimeError unless every way has the same output and the same gradients."""
    native = steps["native"]
    assert isinstance(native, Step)
    expected = _values(native)
    for way, step in steps.items():
        if not isinstance(step, Step):
            continue
        for i, (value, reference) in enumerate(
            zip(_values(step), expected, strict=True)
        ):
            if (value - reference).abs().max() > _AGREEMENT * reference.abs().max():
                raise RuntimeError(
                    f"{way} disagrees with native torch in {f'gradient {i}' if i else 'the output'}"
                )


def _values(step: Step) -> list[Tensor]:
    step()
    gradients = [leaf.grad for leaf in step.leaves if leaf.grad is not None]
    return [step.call(step.x).detach(), *gradients]


# Native torch -------------------------------------------------------------------------------------


def _torch_mlp(x: Tensor, *parameters: Tensor) -> Tensor:
    biases, kernels = parameters[::2], parameters[1::2]
    for bias, kernel in zip(biases[:-1], kernels[:-1], strict=True):
        x = torch.addmm(bias, x, kernel).relu()
    return torch.addmm(biases[-1], x, kernels[-1])


_NATIVE: Mapping[str, Callable[..., Tensor]] = {
    "affine": lambda x: 2 * x + 1,
    "sine": lambda x: torch.sin(x) * 2,
    "mlp": _torch_mlp,
}


def native(function: str, x: Tensor, cotangent: Tensor) -> Step:
    parameters = _parameters(models.flat(function)[1])
    return Step(lambda x: _NATIVE[function](x, *parameters), x, cotangent, parameters)


def _parameters(arrays: Sequence[jax.Array]) -> list[Tensor]:
    return [_to_torch(array).clone().requires_grad_() for array in arrays]


# jax2torch-style: the baseline of the budget ------------------------------------------------------


class _Jax2Torch(torch.autograd.Function):
    """jax.vjp of a jitted function on each call, with DLPack both ways, like jax2torch."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., jax.Array], *inputs: Tensor
    ) -> Tensor:
        output, ctx.pullback = jax.vjp(function, *map(_to_jax, inputs))
        return _to_torch(output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return None, *map(_to_torch, ctx.pullback(_to_jax(cotangent)))


def jax2torch(function: str, x: Tensor, cotangent: Tensor) -> Step:
    jitted, arrays = models.flat(function)
    parameters = _parameters(arrays)
    return Step(
        lambda x: _Jax2Torch.apply(jitted, x, *parameters), x, cotangent, parameters
    )


def _to_jax(tensor: Tensor) -> jax.Array:
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def _to_torch(array: jax.Array) -> Tensor:
    return torch.utils.dlpack.from_dlpack(array)


# This project -------------------------------------------------------------------------------------


def inproc(function: str, x: Tensor, cotangent: Tensor) -> Step:
    module = RemoteJaxFunction(getattr(models, function))
    return Step(module, x, cotangent, list(module.parameters()))


def remote(session: Session, function: str, x: Tensor, cotangent: Tensor) -> Step:
    module = RemoteJaxFunction(session, name=function)
    return Step(module, x, cotangent, list(module.parameters()), session)


def _in_slab(tensor: Tensor, session: Session) -> Tensor:
    block = session.pool.lease(tensor.nbytes)
    return (
        torch.frombuffer(block.buffer, dtype=tensor.dtype)
        .view(tensor.shape)
        .copy_(tensor)
    )
