"""Runner of all GPU checks and benchmarks within a time limit: `make gpu LIMIT=480`.

On a bare machine: `python3 tools/gpu.py --limit 480 --wheels FOLDER --out FOLDER`. The runner needs
Python only. Its steps need JAX, torch and CuPy for CUDA in the same interpreter, and take other
packages from the folder of wheels.

The most important steps come first. Each step runs under `timeout`, which ends the step at its own
or the total limit, so that no step can block the others. summary.txt has one line per step; seven
other files have the steps' output.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FILES = ("facts", "probe", "torch", "jax", "faults", "programs", "bench")
_KILL_S = 3  # from a step's timeout to its kill
_LEAST_S = 5  # no step begins with less time left
_MOST_BYTES = 400_000  # limit for the kept output of one step
_TESTS = "tests/gpu/on_gpu"
_JAX_CASES = f"{_TESTS}/jax_client/cases.py"
_CALLS, _ORDER, _FAULTS, _PROGRAMS, _SETTINGS = (
    f"{_TESTS}/torch_client/test_{name}.py"
    for name in ("calls", "order", "faults", "programs", "settings")
)
_PYTEST = (
    "-m",
    "pytest",
    "--gpu",
    "-q",
    "-ra",
    "--tb=short",
    "--durations=10",
    "-p",
    "no:cacheprovider",
)
_PACKAGES = "^(jax|torch|triton|nvidia|cupy|grpc|protobuf|pytest|numpy|optree|flax)"
_FACTS = f"""
uname -rv; nvidia-smi; nvidia-smi -q -d COMPUTE; free -m; nproc; df -h /dev/shm; id; which gcc nvcc
env | grep -E '^(JAX|XLA|CUDA|PYTORCH|LD_|BRIDGE)'; "$0" -V
"$0" -m pip list 2>/dev/null | grep -iE '{_PACKAGES}'
true
"""
_BENCH = ("python", "-m", "bench.gpu", "--sizes", "1KiB,64MiB", "--rounds", "5")


class Step(NamedTuple):
    """A command with a limit in seconds and an output file; "python" stands for the interpreter."""

    name: str
    file: str
    seconds: int
    command: tuple[str, ...]
    variables: Mapping[str, str] = {}


def _ask(name: str, seconds: int = 45) -> Step:
    return Step(name, "probe", seconds, ("python", "-m", "bench.gpu_probe", name))


def _test(
    name: str, file: str, seconds: int, *arguments: str, **variables: str
) -> Step:
    return Step(name, file, seconds, ("python", *_PYTEST, *arguments), variables)


# The steps of a group run concurrently. The most important groups come first; groups that may leave
# a hanging stream come last.
PLAN: Sequence[Sequence[Step]] = (
    (Step("facts", "facts", 30, ("sh", "-c", _FACTS, "python")),),
    (
        Step(
            "import jax",
            "facts",
            60,
            (
                "python",
                "-c",
                "import jax; print(jax.numpy.ones(3).sum(), jax.devices())",
            ),
        ),
        Step(
            "import torch",
            "facts",
            60,
            ("python", "-c", "import torch; print(torch.cuda.is_available())"),
        ),
        Step("doctor", "facts", 60, ("python", "-m", "bridge_client", "doctor")),
    ),
    (_ask("exchange", 30),),
    (_ask("handles"), _ask("donation"), _ask("destroyed"), _ask("words")),
    (_ask("rerecorded"), _ask("events"), _ask("deleter", 60), _ask("opening", 60)),
    (
        _test("torch calls", "torch", 130, _CALLS, "-k", "not inductor"),
        _test(
            "jax",
            "jax",
            150,
            _JAX_CASES,
            "-k",
            "not context_that_breaks and not allocator and not no_room",
            TESTS_BLOCKED="torch torchax",
            PYTHONPATH=str(ROOT / "tests/gpu/apart"),
            XLA_PYTHON_CLIENT_PREALLOCATE="false",
        ),
    ),
    # The following steps measure time and memory, so each runs alone.
    (_test("order by words", "torch", 60, _ORDER),),
    (_test("order by events", "torch", 60, _ORDER, BRIDGE_GPU_ORDER="events"),),
    (_test("faults", "faults", 100, _FAULTS),),
    (
        _test("programs", "programs", 90, _PROGRAMS, "-k", "not many_calls"),
        _test(
            "settings",
            "programs",
            90,
            _SETTINGS,
            "-k",
            "PREALLOCATE or platform or expandable",
        ),
    ),
    (Step("bench", "bench", 60, _BENCH, {"BRIDGE_SLAB_MAX_BYTES": str(8 << 30)}),),
    (_ask("costs"),),
    (_ask("left"),),
    (_ask("export", 60), _ask("mps", 30), _ask("namespaces", 60), _ask("dead", 75)),
    (Step("afterwards", "facts", 10, ("nvidia-smi",)),),
)


class Run:
    """A run of a plan that ends before its limit."""

    def __init__(
        self, out: Path, limit_s: float, python: str, variables: Mapping[str, str]
    ) -> None:
        self._out, self._python = out, python
        self._begun = time.monotonic()
        self._end = self._begun + limit_s
        self._variables = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
        self._lock = threading.Lock()
        self.failed: list[str] = []
        out.mkdir(parents=True, exist_ok=True)
        for name in (*FILES, "summary"):
            (out / f"{name}.txt").write_text("")

    def all(self, plan: Sequence[Sequence[Step]]) -> None:
        """Run the groups in sequence, and the steps of a group concurrently."""
        for group in plan:
            threads = [
                threading.Thread(target=self._guarded, args=(step,), daemon=True)
                for step in group
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _guarded(self, step: Step) -> None:
        try:
            self._step(step)
        except Exception as error:
            self._note(
                step, f"COULD NOT RUN: {type(error).__name__}: {error}", is_well=False
            )

    def _step(self, step: Step) -> None:
        left = int(self._end - time.monotonic()) - _KILL_S
        if left < _LEAST_S:
            self._note(step, "NOT RUN: the time is up", is_well=False)
            return
        seconds = min(step.seconds, left)
        command = [self._python if word == "python" else word for word in step.command]
        log, begun = self._out / f".{step.name}.log", time.monotonic()
        with log.open("wb") as target:
            process = subprocess.Popen(
                ["timeout", "-k", str(_KILL_S), str(seconds), *command],
                cwd=ROOT,
                env={**self._variables, **self._with_path(step.variables)},
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(seconds + 2 * _KILL_S)
            except subprocess.TimeoutExpired:
                # A process in a GPU call may be unkillable.
                status = None
        _end_group(process.pid)
        took = time.monotonic() - begun
        said = log.read_bytes()[-_MOST_BYTES:].decode(errors="replace")
        log.unlink()
        how = _ended(status)
        with self._lock, (self._out / f"{step.file}.txt").open("a") as file:
            file.write(f"=== {step.name}: {how}, {took:.0f} s\n{said}\n")
        last = (said.strip().splitlines() or ["no output"])[-1]
        self._note(step, f"{how}, {took:.0f} s: {last[:300]}", is_well=status == 0)

    def _with_path(self, variables: Mapping[str, str]) -> Mapping[str, str]:
        """Put a step's own PYTHONPATH before the runner's."""
        if "PYTHONPATH" not in variables:
            return variables
        path = os.pathsep.join([variables["PYTHONPATH"], self._variables["PYTHONPATH"]])
        return {**variables, "PYTHONPATH": path}

    def _note(self, step: Step, what: str, *, is_well: bool) -> None:
        line = (
            f"{time.monotonic() - self._begun:5.0f} s  {'ok  ' if is_well else 'LOOK'} "
            f" {step.name}: {what}"
        )
        with self._lock:
            if not is_well:
                self.failed.append(step.name)
            with (self._out / "summary.txt").open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)


def _ended(status: int | None) -> str:
    if status is None:
        return "DOES NOT END"
    # `timeout` ended the step.
    if status in (
        124,
        128 + signal.SIGKILL,
        -signal.SIGKILL,
    ):
        return "TIME UP"
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


def _end_group(pid: int) -> None:
    """Kill a step's remaining processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def unpack(wheels: Path, target: Path) -> list[str]:
    """Unpack wheels without pip; return the names of wheels for other interpreters or machines."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    unfit = []
    for wheel in sorted(wheels.glob("*.whl")):
        python, abi, platform = wheel.stem.split("-")[-3:]
        is_of_machine = platform == "any" or os.uname().machine in platform
        is_of_python = python.startswith("py3") or tag in python or abi == "abi3"
        if not (is_of_machine and is_of_python):
            unfit.append(wheel.name)
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return unfit


def main(
    argv: Sequence[str] | None = None, plan: Sequence[Sequence[Step]] = PLAN
) -> int:
    """Run the plan. Return the exit status: 1 if a step failed or did not run, else 0."""
    parser = argparse.ArgumentParser(
        "tools/gpu.py",
        description="Run all GPU checks and benchmarks within a time limit.",
    )
    parser.add_argument(
        "--limit", type=int, default=480, help="seconds for all steps (default: 480)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "out" / "gpu",
        help="folder for the output files (default: out/gpu)",
    )
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels that this interpreter lacks"
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="interpreter for the steps (default: this one)",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run on the fake CUDA to check the steps themselves",
    )
    options = parser.parse_args(argv)
    packages = options.out / ".packages"
    paths = [str(ROOT)]
    variables = {}
    if options.rehearse:
        machine = options.out / ".fake"
        machine.mkdir(parents=True, exist_ok=True)
        paths.insert(0, str(ROOT / "tests/gpu/fake"))
        variables = {"FAKE_CUDA_DIR": str(machine), "BRIDGE_TESTS_REHEARSE": "1"}
    if options.wheels is not None:
        for name in unpack(options.wheels, packages):
            print(f"skipped {name}: for another interpreter or machine", flush=True)
        paths.append(str(packages))
    variables["PYTHONPATH"] = os.pathsep.join(
        [*paths, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    run = Run(options.out, options.limit, options.python, variables)
    try:
        run.all(plan)
    finally:
        for folder in (packages, options.out / ".fake"):
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{len(run.failed)} steps to look at; the output of all is in {options.out}",
        flush=True,
    )
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
