"""Runtimes whose models run on another device than the host: what is brought there and taken from
there, in order.

Without a GPU: JAX's second CPU device stands for one, and memory of the fake CUDA for a GPU's.
"""

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge_server.jax_runtime import JaxRuntime
from bridge_server.model_errors import remote
from bridge_server.runtime import Options, Runtime
from bridge_server.torch_runtime import TorchRuntime, types
from bridge_server.turns import Turn
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import OutOfMemory, RemoteModelError
from bridge_wire.memory.cuda import Device, device_of, gpu_at, gpus
from bridge_wire.specs import Spec
from tests.conftest import ROOT, python_of
from tests.runtimes import Hosted, placed

_ARRAYS = {"jax": jnp, "torch": torch}


def test_jax_models_run_on_a_device_that_is_not_the_hosts() -> None:
    """Host memory is brought to the device at each run, outputs and the model's own parameters
    come from there."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    command = [python_of(".venv-jax"), "-m", "tests.gpu.second_device"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=120)


class _Recorded(Turn):
    """A turn that notes which of its streams had to wait, and what was copied."""

    def __init__(self, device: Device) -> None:
        super().__init__(device, None)
        self.waits: list[int | None] = []
        self.copies: list[int] = []

    def wait(self, stream: int | None) -> None:
        self.waits.append(stream)

    def copy(self, target: int, source: int, nbytes: int, *owners: object) -> None:
        self.copies.append(nbytes)
        super().copy(target, source, nbytes, *owners)


@pytest.fixture
def device(fake_cuda: Any) -> Device:
    """The fake GPU."""
    return device_of(gpus()[0].uuid)


@pytest.fixture
def turn(device: Device) -> Iterator[_Recorded]:
    """A lane's turns on it."""
    made = _Recorded(device)
    yield made
    made.close()


@pytest.fixture(params=["jax", "torch"])
def framework(request: pytest.FixtureRequest) -> str:
    """Each of the frameworks."""
    return request.param


@pytest.fixture
def runtime(framework: str) -> Runtime:
    """A runtime of it, for which the fake's memory is the host's."""
    return {"jax": JaxRuntime, "torch": TorchRuntime}[framework](Options(x64=False))


class _Memory:
    """Memory of the fake GPU with an array in it, read when the turn's stream is done."""

    def __init__(self, turn: Turn, array: np.ndarray) -> None:
        self._turn, self.pointer = turn, turn.device.allocate(array.nbytes)
        self._like = array
        turn.device.copy(self.pointer, array.ctypes.data, array.nbytes, turn.stream)
        turn.finish()

    def read(self) -> np.ndarray:
        made = np.empty_like(self._like)
        self._turn.device.copy(
            made.ctypes.data, self.pointer, made.nbytes, self._turn.stream
        )
        self._turn.finish()
        return made


def test_a_run_reads_and_writes_gpu_memory_in_its_turn(
    framework: str, runtime: Runtime, turn: _Recorded
) -> None:
    """An input is read where it lies; outputs, row-major or not, are copied to theirs on the
    turn's stream."""
    arrays = _ARRAYS[framework]
    hosted = Hosted(runtime, lambda x, y: (arrays.sin(x) + y, x.T))
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), placed(np.float32([1, 2, 3]))
    program = hosted.call(x, y)
    there = _Memory(turn, x)
    turn.begin()
    # One input on the GPU, one in host memory.
    views = [
        runtime.view(there.pointer, program.inputs[0], there, turn),
        hosted.view(y, program.inputs[1]),
    ]
    outputs, _ = program.run(views, None)
    targets = [
        _Memory(turn, np.zeros(spec.shape, np.float32)) for spec in program.outputs
    ]
    for output, target in zip(outputs, targets, strict=True):
        runtime.write(output, target.pointer, 24, turn)
    turn.end()
    assert turn.copies == [24, 24]
    np.testing.assert_allclose(targets[0].read(), np.sin(x) + y, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(targets[1].read(), x.T)


def test_an_output_is_held_until_it_is_copied(
    framework: str, runtime: Runtime, turn: _Recorded, fake_cuda: Any
) -> None:
    """What a copy reads stays as it is while the turn's stream has not come to it, whatever runs
    meanwhile."""
    arrays = _ARRAYS[framework]
    hosted = Hosted(runtime, lambda x: arrays.sin(x))
    x = placed(np.linspace(0, 1, 1 << 16, dtype=np.float32))
    program = hosted.call(x)
    target = _Memory(turn, np.zeros_like(x))
    release = fake_cuda.hold(turn.stream)
    try:
        runtime.write(
            program.run([hosted.view(x, program.inputs[0])], None)[0][0],
            target.pointer,
            x.nbytes,
            turn,
        )
        # Would be given that memory.
        others = [hosted.run(program, np.full_like(x, i)) for i in range(8)]
    finally:
        release.set()
    np.testing.assert_allclose(target.read(), np.sin(x), rtol=1e-6, atol=1e-6)
    assert len(others) == 8


def test_no_stream_begins_before_the_clients_work_is_done(
    runtime: Runtime, turn: _Recorded
) -> None:
    """The turn's stream waits for the client when a run begins; what imports memory on another
    waits for itself."""
    turn.begin()
    assert turn.waits == [turn.stream]
    x = _Memory(turn, np.ones(3, np.float32))
    runtime.view(x.pointer, Spec(BY_NAME["float32"], (3,)), x, turn)
    is_own_stream = isinstance(runtime, JaxRuntime)  # torch runs on the turn's
    assert turn.waits == [turn.stream] + [None] * is_own_stream


def test_a_gpu_is_known_by_its_number_in_this_process(fake_cuda: Any) -> None:
    """Frameworks on the host have none."""
    assert gpu_at(0) == gpus()[0]
    assert gpu_at(1) is None
    assert JaxRuntime(Options()).gpu() is None
    assert TorchRuntime(Options()).gpu() is None
    assert TorchRuntime(Options()).stream() is None


def test_torch_runs_on_the_first_gpu_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, fake_cuda: Any
) -> None:
    """Within the fraction of its memory that was allowed; a guest stays where its user's tensors
    are."""
    limits: list[Any] = []

    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda *limit: limits.append(limit),
    )
    runtime = TorchRuntime(Options(gpu_memory_fraction=0.5))
    assert limits == [(0.5, torch.device("cuda", 0))]
    assert runtime.gpu() == gpus()[0]
    assert runtime.stream() == 0  # torch's stream, which a turn must not take for none
    assert runtime.describe().devices == ("cuda:0",)
    assert TorchRuntime(Options(embedded=True)).gpu() is None


class _ElsewhereTorch(TorchRuntime):
    """As on a GPU: by another name than the tensors of the host."""

    def __init__(self) -> None:
        super().__init__(Options())
        self._device, self._is_on_host = torch.device("cpu", 0), False


def test_torch_models_run_where_their_runtime_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Modules are moved there, inputs are brought there at each run, but for the key that the
    host reads."""
    moved: list[Any] = []
    brought: list[int] = []
    original, placing = torch.nn.Module.to, types.brought_to

    def to(module: torch.nn.Module, device: Any) -> Any:
        moved.append(device)
        return original(module, device)

    def brought_to(device: torch.device, inputs: Any, kept: int | None) -> list[Any]:
        assert device == torch.device("cpu", 0)
        brought.append(len(inputs) - (kept is not None))
        return placing(device, inputs, kept)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(types, "brought_to", brought_to)
    runtime = _ElsewhereTorch()
    hosted = Hosted(
        runtime, torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
    )
    assert moved == [torch.device("cpu", 0)]
    x, key = placed(np.ones((1, 3), np.float32)), placed(np.array([0, 7], np.uint32))
    program = hosted.call(x, rngs=["dropout"], keep=[1])
    views = [hosted.view(key, program.inputs[0]), hosted.view(x, program.inputs[1])]
    (y,), kept = program.run(views, None)
    pullback = hosted.pullback(program, [1])
    (gradient,) = hosted.run(pullback, np.ones((1, 2), np.float32), residual=kept)
    assert brought == [1, 1]
    assert hosted.written(y, program.outputs[0]).shape == (1, 2)
    assert gradient.shape == (1, 3)


def test_what_was_brought_to_the_gpu_counts_as_residual() -> None:
    """Unlike the client's own memory, which a graph on the host holds: there it is the worker's."""
    x = placed(np.ones(128, np.float32))
    kept = []
    for runtime in (TorchRuntime(Options()), _ElsewhereTorch()):
        hosted = Hosted(runtime, lambda x: x * x)
        program = hosted.call(x, keep=[0])
        hosted.run_keeping(program, x)
        kept.append(program.residual_nbytes)
    assert kept == [0, x.nbytes]


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class JaxRuntimeError(RuntimeError):
    """Named as XLA's."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            OutOfMemory,
        ),
        (
            JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes."
            ),
            OutOfMemory,
        ),
        (
            JaxRuntimeError(
                "INTERNAL: Error Execute: RESOURCE_EXHAUSTED: Out of memory"
            ),
            OutOfMemory,
        ),
        (
            JaxRuntimeError(
                "INTERNAL: CpuCallback error:\nRESOURCE_EXHAUSTED: says a model"
            ),
            RemoteModelError,
        ),
        (ValueError("RESOURCE_EXHAUSTED: says a model"), RemoteModelError),
    ],
)
def test_a_device_without_room_is_out_of_memory(error: Exception, kind: type) -> None:
    """The frameworks' own errors for it are told from a model's."""
    found = remote(error, "model 'f'")
    assert type(found) is kind
    assert "model 'f'" in str(found)
    assert str(error) in str(found)
