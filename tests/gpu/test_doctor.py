"""What the doctors tell of GPUs: of none, and of some that are none."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge_client import spawn
from bridge_client.cli import main
from bridge_client.commands import doctor
from bridge_client.remote.link import Terms
from bridge_server.cli import main as bridge_server
from bridge_wire.doctor import cuda_exchange, gpu_checks
from bridge_wire.doctor.checks import BROKEN, OK, SLOW, Check, ok
from bridge_wire.errors import CudaError, WorldError
from bridge_wire.memory import cuda
from bridge_wire.memory.cuda import device_of, gpus
from tests.conftest import ROOT, eventually, python_of
from tests.gpu.faking import installed

_UUID = bytes(range(16))
_TWO = "GPU-10111213-1415-1617-1819-1a1b1c1d1e1f"
_MEMORY = "memory of cuda:0"
_CROSSED = "256 random bytes crossed to a child and back"


def _found() -> dict[str, Check]:
    return {check.name: check for check in gpu_checks.checks()}


def _says(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    """Put a program in nvidia-smi's place."""
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{lines}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


# Without a GPU ------------------------------------------------------------------------------------


def _without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *_: object) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda.ctypes, "CDLL", refuse)
    cuda.driver.cache_clear()


def test_a_host_without_a_gpu_is_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No driver is one line, and no fault."""
    _without_a_library(monkeypatch)
    monkeypatch.setattr(gpu_checks, "_VERSION_FILE", tmp_path / "none")
    assert list(gpu_checks.checks()) == [ok("NVIDIA driver", "no NVIDIA driver")]


def test_a_container_that_was_given_no_gpu_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel has the driver, but its library is not here."""
    _without_a_library(monkeypatch)
    (tmp_path / "version").write_text("NVRM version")
    monkeypatch.setattr(gpu_checks, "_VERSION_FILE", tmp_path / "version")
    (check,) = gpu_checks.checks()
    assert (
        check.verdict == SLOW
        and "not visible" in check.found
        and "--gpus" in check.remedy
    )


def test_a_driver_that_does_not_start_is_told(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the setting that may be the cause."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (check,) = gpu_checks.checks()
    assert check.verdict == SLOW and "cuInit with error 100" in check.found
    assert check.remedy.startswith("change CUDA_VISIBLE_DEVICES=''; ")


# With one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [main, bridge_server], ids=["client", "worker"])
def test_both_doctors_find_a_gpu_well(
    command: Callable[[list[str]], int],
    fake_cuda: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Driver, device, CuPy, and memory that crosses to another process."""
    monkeypatch.setenv("BRIDGE_ALLOCATOR", "system")
    _says(tmp_path / "bin", monkeypatch, f"echo '{fake_cuda.ONE}, 580.65.06, Default'")
    assert command(["doctor", "--json"]) == 0
    checks = {
        check["name"]: Check(**check)
        for check in json.loads(capsys.readouterr().out)["checks"]
    }
    assert checks["NVIDIA driver"] == ok("NVIDIA driver", "580.65.06, for CUDA 13.0")
    assert checks["GPUs"] == ok("GPUs", f"cuda:0 Fake GPU 0 {fake_cuda.ONE}")
    assert checks["CuPy"] == ok("CuPy", "cupy-cuda13x 14.2.0")
    assert checks["GPU allocators"].verdict == OK
    assert checks["MPS"].found.startswith("off")
    assert checks[_MEMORY] == ok(_MEMORY, f"{_CROSSED}, in order by words")
    assert fake_cuda.held() == {}


def test_gpus_are_told_without_nvidia_smi(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel tells the driver's version where it can; a program that fails is as good as
    none."""
    version = tmp_path / "version"
    monkeypatch.setattr(gpu_checks, "_VERSION_FILE", version)
    monkeypatch.setattr(gpu_checks, "exchanged", lambda gpu: ok(_MEMORY, ""))
    for program in ("exit 9", "echo No devices were found", "echo a, b"):
        _says(tmp_path, monkeypatch, program)
        assert _found()["NVIDIA driver"].found == "unknown version, for CUDA 13.0"
        assert fake_cuda.ONE in _found()["GPUs"].found
    monkeypatch.setenv("PATH", "")
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:10:52 UTC 2025",
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build "
            " (root@host)"
        ),
    ):
        version.write_text(
            line + "\nGCC version:  gcc version 12.3.0 (Ubuntu 12.3.0)\n"
        )
        assert _found()["NVIDIA driver"].found == "580.65.06, for CUDA 13.0"


def test_gpus_that_are_hidden_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the setting that hides them."""
    with installed(tmp_path) as fake:
        monkeypatch.setattr(gpu_checks, "exchanged", lambda gpu: ok(_MEMORY, ""))
        _says(
            tmp_path / "bin",
            monkeypatch,
            f"echo '{fake.ONE}, 580, Default'; echo '{fake.TWO}, 580, Default'",
        )
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        assert _found()["GPUs"].found.endswith(
            f"(CUDA_VISIBLE_DEVICES='0'); hidden: {fake.TWO}"
        )


def test_a_gpu_for_one_process_at_a_time_is_told(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Client and worker could not both use it."""
    monkeypatch.setattr(gpu_checks, "exchanged", lambda gpu: ok(_MEMORY, ""))
    _says(
        tmp_path / "bin", monkeypatch, f"echo '{fake_cuda.ONE}, 580, Exclusive_Process'"
    )
    check = _found()["mode of cuda:0"]
    assert check.verdict == SLOW and f"-i {fake_cuda.ONE} -c DEFAULT" in check.remedy


def test_mps_is_told(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether its daemon's pipes are there."""
    monkeypatch.setattr(gpu_checks, "exchanged", lambda gpu: ok(_MEMORY, ""))
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert "daemon" in _found()["MPS"].found


# CuPy and settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packages", "driver", "verdict", "said"),
    [
        ({}, "13.0", SLOW, "pip install torch-jax-bridge[cuda]"),
        ({"cupy-cuda13x": "14.2"}, "13.0", OK, "cupy-cuda13x 14.2"),
        ({"cupy-cuda12x": "13.6"}, "13.0", OK, "cupy-cuda12x 13.6"),
        ({"cupy-cuda13x": "14.2"}, "12.4", SLOW, "or cupy-cuda12x"),
        ({"cupy": "14.2"}, "12.4", OK, "cupy 14.2"),
        (
            {"cupy-cuda12x": "13.6", "cupy-cuda13x": "14.2"},
            "13.0",
            SLOW,
            "pip uninstall cupy-cuda12x cupy-cuda13x",
        ),
    ],
    ids=["none", "fits", "older", "newer than the driver", "built here", "two"],
)
def test_cupy_is_there_once_and_for_the_drivers_cuda(
    packages: dict[str, str],
    driver: str,
    verdict: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Anything else is slow, since tensors then travel through the host."""
    monkeypatch.setattr(gpu_checks, "installed", packages.get)
    check = gpu_checks._cupy(driver)
    assert check.verdict == verdict and said in check.found + check.remedy


def test_without_cupy_nothing_is_exchanged(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what is missing."""
    monkeypatch.setattr(gpu_checks, "installed", lambda package: None)
    assert _found()["CuPy"].verdict == SLOW and _MEMORY not in _found()


@pytest.mark.parametrize(
    ("settings", "verdict", "said"),
    [
        ({}, OK, "no setting"),
        (
            {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            OK,
            "XLA_PYTHON_CLIENT_PREALLOCATE=false",
        ),
        (
            {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            OK,
            "expandable_segments:True",
        ),
        (
            {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"},
            SLOW,
            "a worker disables preallocation",
        ),
        (
            {"XLA_PYTHON_CLIENT_PREALLOCATE": "no"},
            SLOW,
            "XLA_PYTHON_CLIENT_PREALLOCATE=no: JAX takes most",
        ),
        (
            {"XLA_CLIENT_MEM_FRACTION": ".5", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"},
            BROKEN,
            "refuses to start",
        ),
    ],
)
def test_settings_of_the_allocators_are_told(
    settings: dict[str, str], verdict: str, said: str
) -> None:
    """As they are; what hinders others, or JAX itself, with the remedy."""
    check = gpu_checks._allocators(settings)
    assert check.verdict == verdict and said in check.found + check.remedy


# The exchange -------------------------------------------------------------------------------------


def test_without_words_the_exchange_is_in_order_by_events(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever words fail; the check says why, and is well."""
    for variable, value, said in (
        ("FAKE_CUDA_WORDS", "0", "neither write nor await"),
        ("FAKE_CUDA_FAILS", "streamWaitValue64:801", "cudaErrorNotSupported"),
        ("FAKE_CUDA_FAILS", "streamWriteValue64:801", "cudaErrorNotSupported"),
    ):
        monkeypatch.setenv(variable, value)
        check = gpu_checks.exchanged(gpus()[0])
        assert check.verdict == OK and check.found.startswith(
            f"{_CROSSED}, in order by events; not by words: "
        )
        assert said in check.found
        monkeypatch.delenv(variable)
    assert fake_cuda.held() == {}


def test_without_either_the_exchange_waits_on_the_host(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever events fail: the check is slow, and says which way it went."""
    monkeypatch.setenv("FAKE_CUDA_WORDS", "0")
    for function in ("ipcGetEventHandle", "ipcOpenEventHandle"):
        monkeypatch.setenv("FAKE_CUDA_FAILS", f"{function}:801")
        check = gpu_checks.exchanged(gpus()[0])
        assert check.verdict == SLOW and check.found.startswith(
            f"{_CROSSED}, in order only by waiting"
        )
        assert "cudaErrorNotSupported" in check.found
    assert fake_cuda.held() == {}


@pytest.mark.parametrize(
    ("release", "version", "remedy"),
    [
        ("6.8.0", "#1 SMP", "`ipc: service:namespaces`) for events"),
        ("5.15.153.1-microsoft-standard-WSL2", "#1 SMP", "WSL2 has no CUDA IPC"),
        ("4.4.0", "#1 SMP Sun Jan 10 15:06:54 PST 2016", "gVisor passes no CUDA IPC"),
    ],
    ids=["a container", "WSL2", "gVisor"],
)
def test_memory_that_no_other_process_opens_is_slow(
    release: str,
    version: str,
    remedy: str,
    fake_cuda: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With CUDA's error, and the remedy for the system that it runs on."""
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.setattr(platform, "version", lambda: version)
    monkeypatch.setenv("FAKE_CUDA_FAILS", "ipcOpenMemHandle:400")
    check = gpu_checks.exchanged(gpus()[0])
    assert (
        check.verdict == SLOW
        and "cudaErrorInvalidResourceHandle" in check.found
        and remedy in check.remedy
    )
    assert fake_cuda.held() == {}


def test_a_child_that_ends_or_sees_other_memory_is_found(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither passes for an exchange."""
    echo = (
        "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.recv(999);"
        " s.sendall({}); s.recv(1)"
    )
    answer = "bytes([1, 1, 0, 0]) + b'+' + bytes(256)"
    python = sys.executable
    for child, error, said in (
        ("exit 3", WorldError, "did not receive"),
        (
            f'exec {python} -c "{echo.format(answer)}" $3',
            CudaError,
            "different bytes in GPU memory",
        ),
    ):
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{child}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        with pytest.raises(error, match=said):
            cuda_exchange.with_child(_UUID, "events")
    assert fake_cuda.held() == {}


@pytest.mark.parametrize("kind", ["words", "events"])
def test_the_child_does_not_read_too_early(
    kind: str, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is late on this process's stream is there when the child reads; with the stream of
    another it is not."""
    side, writes, answer = (
        cuda_exchange._Side,
        cuda_exchange._Side.write,
        cuda_exchange._answer,
    )

    def late(self: Any, pointer: int, data: bytes) -> None:
        fake_cuda.sleep(self._stream, 0.5)
        writes(self, pointer, data)

    monkeypatch.setattr(side, "write", late)
    cuda_exchange.with_child(_UUID, kind)

    def held(self: Any, pointer: int, data: bytes) -> None:
        released = fake_cuda.hold(self._stream)

        def answered(lane: Any) -> Any:
            try:
                return answer(lane)
            finally:  # also if the child fails: nothing else ends the copy
                released.set()

        monkeypatch.setattr(cuda_exchange, "_answer", answered)
        writes(self, pointer, data)

    monkeypatch.setattr(side, "write", held)
    hand_over, idle = side.hand_over, device_of(_UUID).new_stream()

    def hand_over_idle(self: Any) -> bytes:
        late, self._stream = self._stream, idle
        try:
            return hand_over(self)
        finally:
            self._stream = late

    monkeypatch.setattr(side, "hand_over", hand_over_idle)
    with pytest.raises(CudaError, match="different bytes in GPU memory"):
        cuda_exchange.with_child(_UUID, kind)


def test_the_child_tells_cudas_error_and_not_the_handle(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails in the child arrives as text."""
    monkeypatch.setenv("FAKE_CUDA_FAILS", "ipcOpenMemHandle:400")
    with pytest.raises(
        CudaError, match=rf"{fake_cuda.ONE} refused: .*cudaErrorInvalidResourceHandle"
    ):
        cuda_exchange.with_child(_UUID, "events")


def test_doctor_imports_no_framework_beside_a_gpu(fake_cuda: Any) -> None:
    """Only CuPy."""
    program = """
import sys
from bridge_wire.doctor import gpu_checks
assert len(list(gpu_checks.checks())) > 4
print(*(name for name in ("torch", "jax", "numpy", "cupy") if name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("cupy\n", "")


# A worker on a GPU --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, way: str) -> Iterator[str]:
    """The address of a worker that runs its models on the fake GPU, as this process's doctor
    sees it."""
    with (
        installed(tmp_path_factory.mktemp("machine")),
        spawn(
            jax_model="tests.gpu.models:sine", python=python_of(".venv-jax"), cwd=ROOT
        ) as session,
    ):
        yield session.address


def _its_gpu(address: str) -> Check:
    checks = {check.name: check for check in doctor.examine(address, Terms())}
    assert checks["path"].verdict == checks["shared memory"].verdict == OK
    return checks["its GPU"]


def test_memory_on_the_workers_gpu_is_exchanged_live(worker: str, way: str) -> None:
    """The worker sees what this process writes there, and nothing is left of it."""
    fake = sys.modules["fake_cuda"]
    before = fake.held()
    said = (
        "memory cuda_ipc; the worker sees 256 random bytes as they were written,"
        f" in order by {way}"
    )
    assert _its_gpu(worker) == ok("its GPU", f"Fake GPU 0 {fake.ONE}: {said}")
    assert eventually(lambda: fake.held() == before)


def test_a_worker_without_words_whose_events_do_not_open_is_slow(
    worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call then waits for the GPU."""
    monkeypatch.setenv(
        "FAKE_CUDA_FAILS", "ipcOpenEventHandle:801,streamWaitValue64:801"
    )
    check = _its_gpu(worker)
    assert (
        check.verdict == SLOW
        and "each call waits for the GPU on the host" in check.found
        and check.remedy
    )


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CUDA_VISIBLE_DEVICES", "", "cuInit with error 100"),
        ("FAKE_CUDA_GPUS", _TWO, "cannot see GPU-0001"),
        ("FAKE_CUDA_FAILS", "ipcGetMemHandle:801", "cudaErrorNotSupported"),
        ("FAKE_CUDA_FAILS", "malloc:2", "is out of memory"),
    ],
)
def test_a_gpu_that_is_the_workers_alone_is_slow(
    variable: str, value: str, said: str, worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason, and a worker that lives on."""
    monkeypatch.setenv(variable, value)
    cuda.driver.cache_clear()
    cuda.device_of.cache_clear()
    check = _its_gpu(worker)
    assert (
        check.verdict == SLOW
        and said in check.found
        and gpu_checks.BY_HOST in check.found
    )
    cuda.device_of.cache_clear()
