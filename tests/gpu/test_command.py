"""`make gpu`, without a GPU: it ends in time whatever its steps do, and each of them works as
far as it can here."""

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from bench import gpu_probe
from tests.conftest import ROOT, eventually
from tests.gpu.faking import environment

_COMMAND = ROOT / "tools" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The command as a module."""
    spec = spec_from_file_location("gpu_command", _COMMAND)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_steps_that_hang_or_crash_cost_no_more_than_their_time(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are named in the summary, what they said is kept, and the others run."""
    plan = (
        (
            gpu.Step("hangs", "torch", 2, ("python", "-c", _HANGS)),
            gpu.Step(
                "crashes",
                "jax",
                30,
                ("python", "-c", "import os; print('so far', flush=True); os.abort()"),
            ),
            gpu.Step("is missing", "jax", 30, ("no-such-program",)),
        ),
        (gpu.Step("works", "probe", 30, ("python", "-c", "print('an answer')")),),
        (gpu.Step("takes all", "bench", 60, ("python", "-c", _HANGS)),),
        (gpu.Step("comes too late", "bench", 60, ("python", "-c", "")),),
    )
    begun = time.monotonic()
    assert gpu.main(["--limit", "22", "--out", str(tmp_path / "out")], plan) == 1
    assert time.monotonic() - begun < 22 + 10
    summary = (tmp_path / "out" / "summary.txt").read_text()
    found = {
        re.split(r"(?:ok  |LOOK)  ", line)[1].partition(": ")[0]: line
        for line in summary.splitlines()
    }
    assert "LOOK" in found["hangs"] and "TIME UP" in found["hangs"]
    assert "SIGABRT" in found["crashes"] and "status 127" in found["is missing"]
    assert "ok" in found["works"] and found["works"].endswith("an answer")
    assert "TIME UP" in found["takes all"] and found["comes too late"].endswith(
        "NOT RUN: the time is up"
    )
    assert "so far" in (tmp_path / "out" / "jax.txt").read_text()
    assert len(list((tmp_path / "out").iterdir())) <= 8
    children = re.findall(
        r"^\d+$", (tmp_path / "out" / "torch.txt").read_text(), re.MULTILINE
    )
    assert len(children) == 1 and eventually(
        lambda: not Path(f"/proc/{children[0]}").exists()
    )


def test_a_rehearsal_on_the_faked_cuda_ends_in_time(tmp_path: Path) -> None:
    """As `make gpu LIMIT=60`: the first steps answer, later ones are said not to have run, and
    all files are there."""
    out = tmp_path / "out"
    command = [sys.executable, _COMMAND, "--rehearse", "--limit", "60", "--out", out]
    begun = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert time.monotonic() - begun < 70, done.stdout
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            *(
                f"{name}.txt"
                for name in (
                    "facts",
                    "probe",
                    "torch",
                    "jax",
                    "faults",
                    "programs",
                    "bench",
                    "summary",
                )
            )
        ]
    )
    summary = (out / "summary.txt").read_text()
    assert re.search(r"ok +doctor: .* 0 broken", summary), done.stdout
    assert re.search(r"ok +exchange: .* words: yes; events: yes; host: yes", summary), (
        done.stdout
    )
    assert summary == "".join(f"{line}\n" for line in done.stdout.splitlines()[:-1])


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables of processes that see one fake GPU."""
    directory = tmp_path_factory.mktemp("cuda")
    yield os.environ | environment(directory) | {"BRIDGE_TESTS_REHEARSE": "1"}
    shutil.rmtree(directory, ignore_errors=True)


# What the faked CUDA says; a GPU may answer otherwise.
_ANSWERS = {
    "exchange": "words: yes; events: yes; host: yes",
    "handles": "0 bytes: a memory handle has 0 bytes.*; the process continues",
    "export": (
        "preallocate=true: .*afterwards JAX computes; preallocate=false: .*afterwards JAX computes"
    ),
    "namespaces": "own PIDs: .*; equal PID numbers: ",
    "donation": "no: the result is right, .*; an array with another reference: computed 2.0",
    "deleter": "no: the deleter had not run|inconclusive: ",
    "events": r"yes: \d streams in 10 imports",
    "words": "yes: crossed True after .* released by this process True",
    "rerecorded": (
        "a later record on an idle stream: no effect, .*; on a delayed stream: no effect, "
    ),
    "opening": r"kernel there: event made \d.*; kernel here: event made \d.* memory freed \d",
    "destroyed": "destroyed: query 0, wait ok, synchronize ok, destroy ok; killed: query 0, ",
    "dead": "killed: the stream hangs; .*; destroyed: the stream continues",
    "mps": "not asked: ",
    "costs": r"copy of 1 MiB \d.*; opening 1 MiB by handle \d",
    "left": "of a process's 1 MiB, 0 MiB are left after its kill",
}


@pytest.mark.parametrize("name", gpu_probe.QUESTIONS)
def test_each_question_is_answered_on_the_faked_cuda(
    name: str, faked: dict[str, str]
) -> None:
    """In one line, which begins with its name."""
    command = [sys.executable, "-m", "bench.gpu_probe", name]
    done = subprocess.run(
        command, cwd=ROOT, env=faked, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert re.match(f"{name}: ({_ANSWERS[name]})", done.stdout.splitlines()[-1]), (
        done.stdout
    )


def test_the_plan_asks_every_question_and_keeps_to_its_files(gpu: ModuleType) -> None:
    """Once each; those that may leave a stream that stands still come last."""
    steps = [step for group in gpu.PLAN for step in group]
    asked = [step.name for step in steps if "bench.gpu_probe" in step.command]
    assert sorted(asked) == sorted(gpu_probe.QUESTIONS)
    assert {step.file for step in steps} <= set(gpu.FILES) and len(gpu.FILES) <= 7
    assert len({step.name for step in steps}) == len(steps)
    assert "dead" in [step.name for step in gpu.PLAN[-2]]


def test_the_tests_that_the_plan_names_exist(gpu: ModuleType) -> None:
    """Each file, and each word of a selection in it."""
    commands = [
        step.command for group in gpu.PLAN for step in group if "pytest" in step.command
    ]
    assert len(commands) >= 7
    for command in commands:
        (file,) = [word for word in command if word.startswith("tests/")]
        text = (ROOT / file).read_text() + (
            ROOT / "tests/gpu/on_gpu/machine.py"
        ).read_text()
        if "-k" in command:
            words = set(command[command.index("-k") + 1].split()) - {"not", "and", "or"}
            assert words and all(word in text for word in words), command


def test_wheels_are_unpacked_without_pip(gpu: ModuleType, tmp_path: Path) -> None:
    """Those of this interpreter and machine; the others are named."""
    tag, machine = (
        f"cp{sys.version_info.major}{sys.version_info.minor}",
        os.uname().machine,
    )
    fit = (
        "a-1-py3-none-any",
        f"b-1-{tag}-{tag}-manylinux_2_17_{machine}",
        f"c-1-cp37-abi3-linux_{machine}",
    )
    unfit = ("d-1-cp27-cp27m-any", f"e-1-{tag}-{tag}-macosx_11_0_riscv")
    for name in (*fit, *unfit):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as archive:
            archive.writestr(f"{name[0]}.py", "")
    assert gpu.unpack(tmp_path, tmp_path / "packages") == [
        f"{name}.whl" for name in unfit
    ]
    assert sorted(path.name for path in (tmp_path / "packages").iterdir()) == [
        "a.py",
        "b.py",
        "c.py",
    ]


def test_make_needs_no_environment_where_an_interpreter_is_named() -> None:
    """A borrowed machine has neither pip nor the time for it."""
    settings = ["PYTHON=python3", "LIMIT=60", "WHEELS=/wheels", "OUT=/out"]
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu", *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == [
        "python3",
        "tools/gpu.py",
        "--limit",
        "60",
        "--wheels",
        "/wheels",
        "--out",
        "/out",
    ]


def test_the_command_needs_python_alone() -> None:
    """What it imports itself is of the standard library."""
    program = "import sys; sys.path.insert(0, 'tools'); import gpu; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
