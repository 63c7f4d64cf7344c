"""The choice of a worker's device: what a process sees from then on, and what is refused.

With a fake CUDA.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge_server.process import devices
from bridge_wire.errors import CallerError
from bridge_wire.memory.cuda import device_of, gpus
from tests.conftest import ROOT, python_of
from tests.gpu.faking import environment, installed

ONE, TWO = (
    "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f",
    "GPU-10111213-1415-1617-1819-1a1b1c1d1e1f",
)
_VARIABLES = (
    "BRIDGE_DEVICE",
    "CUDA_VISIBLE_DEVICES",
    "JAX_PLATFORMS",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)

Choose = Callable[..., None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Chooses a device in this process, whose variables are put back afterwards."""
    for name in _VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)

    def choose(
        device: str | None,
        fraction: float | None = None,
        *,
        is_spread: bool = False,
        **variables: str,
    ) -> None:
        os.environ.update(variables)
        devices.choose(device, fraction, is_spread=is_spread)

    return choose


@pytest.fixture
def two_gpus(tmp_path: Path) -> Any:
    """A machine with two GPUs."""
    with installed(tmp_path, ONE, TWO) as fake:
        yield fake


@pytest.mark.parametrize(
    ("device", "visible", "left"),
    [
        ("cuda:1", None, "1"),
        ("cuda:1", "1,0", "0"),
        ("cuda:0", TWO, TWO),
        (TWO, None, "1"),
        (TWO[:12].lower(), "1,0", "1"),
        ("cuda", "1,0", "1,0"),
        (None, "1,0", "1,0"),
    ],
)
def test_a_process_sees_the_device_that_was_chosen(
    choose: Choose, two_gpus: Any, device: str | None, visible: str | None, left: str
) -> None:
    """By its number among those that are visible, or by its UUID; what the user has narrowed
    stays narrowed."""
    choose(
        device,
        **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}),
        BRIDGE_DEVICE="cuda:1",
    )
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left
    # A worker that this one starts would count anew.
    assert ("BRIDGE_DEVICE" in os.environ) == (device is None)


@pytest.mark.parametrize("device", ["cuda:2", "GPU-ff", "GPU-"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    choose: Choose, two_gpus: Any, device: str
) -> None:
    """A prefix that fits several is none."""
    with pytest.raises(CallerError) as raised:
        choose(device)
    assert (
        f"--device {device} is not visible; this process may use cuda:0 ({ONE}, Fake GPU 0), cuda:1"
        in str(raised.value)
    )


def test_where_there_is_no_gpu_every_one_is_refused(
    choose: Choose, two_gpus: Any
) -> None:
    """`cuda` too."""
    with pytest.raises(CallerError, match="this process may use no NVIDIA GPU"):
        choose("cuda", CUDA_VISIBLE_DEVICES="")


def test_on_the_cpu_neither_framework_finds_a_gpu(choose: Choose) -> None:
    """Whatever the environment says."""
    choose("cpu", CUDA_VISIBLE_DEVICES="0", JAX_PLATFORMS="cuda")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_one_device_and_a_mesh_exclude_each_other(
    choose: Choose, two_gpus: Any
) -> None:
    """All visible ones, or the host's, can be a mesh."""
    choose("cuda", is_spread=True)
    with pytest.raises(CallerError, match="use --device cuda"):
        choose("cuda:0", is_spread=True)


def test_memory_is_taken_as_it_is_needed(choose: Choose) -> None:
    """Unless the user has said otherwise to XLA."""
    choose(None)
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    choose(None, 0.25, XLA_PYTHON_CLIENT_PREALLOCATE="true")
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.25"
    choose(None, 0.25)  # in a worker that this one starts


@pytest.mark.parametrize(
    "name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"]
)
def test_two_fractions_are_refused(choose: Choose, name: str) -> None:
    """XLA takes either of its variables, which the option would contradict."""
    with pytest.raises(
        CallerError, match=rf"--gpu-memory-fraction 0.5 and the variable {name}=0.9"
    ):
        choose(None, 0.5, **{name: "0.9"})


def test_a_fraction_of_no_gpu_is_refused(choose: Choose) -> None:
    """There is nothing to take."""
    with pytest.raises(CallerError, match="remove one of the two"):
        choose("cpu", 0.5)


def test_a_worker_on_a_gpu_is_ready_to_share_it_before_a_client_asks(
    two_gpus: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CuPy is loaded when it starts; where that fails, models are served all the same."""
    runtime: Any = type("OnGpu", (), {"gpu": lambda self: gpus()[1]})()
    devices.make_ready(runtime)
    assert device_of.cache_info().currsize == 1 and not caplog.records
    device_of.cache_clear()
    monkeypatch.setenv("FAKE_CUDA_FAILS", "memGetInfo:100")
    devices.make_ready(runtime)
    assert "copied through host memory" in caplog.text and "NoDevice" in caplog.text


def _refusal(
    tmp_path: Path, *args: str, venv: str = ".venv-torch", **variables: str
) -> str:
    """Return what a worker says that refuses to start, where there are two fake GPUs."""
    command = [
        python_of(venv),
        "-m",
        "bridge_server",
        "--torch-model",
        "tests.server.torch_server.models:square",
        *args,
    ]
    made = {**os.environ, **environment(tmp_path, ONE, TWO), **variables}
    done = subprocess.run(
        command, cwd=ROOT, env=made, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    return done.stderr


def test_the_choice_is_made_once_by_the_process_that_stays(tmp_path: Path) -> None:
    """A worker executes itself anew for its allocator; the second GPU is not looked for among one.

    No GPU, no torch.
    """
    assert "--device cuda:1, but torch finds cpu:0 only" in _refusal(
        tmp_path, BRIDGE_DEVICE="cuda:1"
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--device", "cuda:x"],
            "'cuda:x' is not a device; expected cpu, cuda, cuda:1",
        ),
        (["--device=GPU-zz"], "'GPU-zz' is not a device"),
        (
            ["--gpu-memory-fraction", "1.5"],
            "'1.5' is not a fraction; expected more than 0",
        ),
        (["--gpu-memory-fraction", "nan"], "'nan' is not a fraction"),
        (["--gpu-memory-fraction=half"], "'half' is not a fraction"),
    ],
)
def test_what_is_no_device_and_no_fraction_is_refused(
    tmp_path: Path, args: list[str], said: str
) -> None:
    """With what was seen, and what was expected."""
    assert said in _refusal(tmp_path, *args)
