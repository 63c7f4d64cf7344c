"""The scene of a cell: one worker at one address, the victim, and other clients of the worker."""

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bridge_client import Session, connect
from bridge_wire.errors import BridgeError
from tests.calls import floats, placed, prepare, values
from tests.chaos import hosted
from tests.chaos.cells import IN_RUN, WORKER_ENDS, Cell
from tests.chaos.victim import COTANGENT, COUNT, X
from tests.conftest import eventually
from tests.workers import Worker, held_by, slabs_mapped, start_program

_WITHIN_S = 60.0
_AT_ONCE = 4  # the victim's run, the other client's, and two more
_MAX_WAITING = 8
_RESIDUAL_BYTES = 1_000_000
_SLAB_BYTES = 64 << 20
_FACTORS = 1.0, 10.0
_WARM_SESSIONS = 16
_VICTIM = "from tests.chaos.victim import main; main()"


def _await(condition: Callable[[], bool], what: str) -> None:
    assert eventually(condition, _WITHIN_S), f"it never came true that {what}"


class Place:
    """One address, and the worker that listens there; its models' factor may change."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = f"unix:{directory}/worker.sock"
        self._count = itertools.count()
        self.factor = _FACTORS[0]
        self._quiet: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        """Start a worker of the present factor."""
        path = self.directory / f"{hosted.MODULE}.py"
        path.write_text(hosted.source(self.factor))
        self.worker = Worker(
            self.directory / str(next(self._count)),
            "--listen",
            self.address,
            f"--max-runs={_AT_ONCE}",
            f"--max-waiting={_MAX_WAITING}",
            f"--residual-bytes={_RESIDUAL_BYTES}",
            *(f"--jax-model={hosted.MODULE}:{name}" for name in hosted.NAMES),
            env=self.variables,
        )
        self._is_new = True

    @property
    def variables(self) -> dict[str, str]:
        """The variables of processes that import the models."""
        path = f"{self.directory}:{os.environ.get('PYTHONPATH', '')}"
        # The module changes within a second, and a compiled file would seem up to date.
        return {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def other_model(self) -> None:
        """Have the next worker host models with the other factor."""
        self.factor = next(each for each in _FACTORS if each != self.factor)

    def baseline(self) -> dict[str, int]:
        """Return what the quiet worker holds, once for each worker."""
        if self.worker.process.poll() is not None:  # a cell that failed has left none
            self.start()
        if self._is_new:
            self._quiet = self._warm()
        return self._quiet

    def _warm(self) -> dict[str, int]:
        """Compile everything, have gRPC start its threads, and return what the worker holds."""
        self.worker.wait_until_ready()
        with contextlib.ExitStack() as sessions:
            for lane in ("local", *["grpc"] * _WARM_SESSIONS):
                session = sessions.enter_context(connect(self.address, lane=lane))
            program = prepare(session, "gated", floats(COUNT))
            keeping = program.keeping((0,))
            pullback = keeping.pullback((0,), (0,))
            block = session.pool.lease(4 * COUNT)
            _, residual = session.run_keeping(keeping, [block])
            session.run_pullback(pullback, residual, [block])
            session.run(program.vjp((0,), (0,)), [block, block])
            for name in ("plain", "crowded"):
                model = prepare(session, name, floats(1))
                session.run(model, [placed(session, [X])])
        self._is_new = False
        _await(lambda: not any(self.measured().values()), "the new worker is quiet")
        return held_by(self.worker.pid)

    def measured(self) -> dict[str, int]:
        """Return the worker's numbers that are zero if it has no clients."""
        with connect(self.address, wait_s=_WITHIN_S) as session:
            numbers = session.measure()
        return {
            "sessions": numbers.sessions - 1,
            "lanes": numbers.lanes - 1,
            "running": numbers.running,
            "waiting": numbers.waiting,
            "residuals": numbers.residuals,
            "residual_bytes": numbers.residual_bytes,
            "slab_bytes": numbers.slab_bytes,
        }


class Gates:
    """The gates of the models: files beside them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def shut(self, name: str) -> None:
        """Have the next run wait."""
        (self._directory / f"{name}.reached").unlink(missing_ok=True)
        (self._directory / name).touch()

    def open(self, *names: str) -> None:
        """Let runs go on."""
        for name in names:
            (self._directory / name).unlink(missing_ok=True)

    def is_reached(self, name: str) -> bool:
        return (self._directory / f"{name}.reached").exists()

    @property
    def crowded(self) -> int:
        """The number of runs that have come to the crowd's gate."""
        return len(list(self._directory.glob("*.crowded")))

    def forget_the_crowd(self) -> None:
        for path in self._directory.glob("*.crowded"):
            path.unlink()


class Innocent:
    """Another client, which calls all the time and checks each value. A context manager."""

    def __init__(self, place: Place, lane: str) -> None:
        self._place, self._lane = place, lane
        self.allowed = {place.factor}
        self.count = 0
        self._error: BaseException | None = None
        self._ends = threading.Event()
        self._may_call = threading.Event()
        self._may_call.set()
        self._calling = threading.Lock()  # held during a call
        self._thread = threading.Thread(target=self._call_all_the_time)

    def __enter__(self) -> "Innocent":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _call_all_the_time(self) -> None:
        try:
            # Its calls may be repeated: they are functions of their arguments.
            session = connect(
                self._place.address, lane=self._lane, retry_s=_WITHIN_S, retries=9
            )
            with session:
                keeping = prepare(session, "squared", floats(4)).keeping((0,))
                plain = prepare(session, "plain", floats(4))
                while not self._ends.wait(0.005):
                    self._may_call.wait()
                    with self._calling:
                        if self._may_call.is_set():
                            self._call(session, plain, keeping)
        except BaseException as error:
            self._error = error

    def _call(self, session: Session, plain: Any, keeping: Any) -> None:
        number = 1.0 + self.count % 97
        for program, power in ((plain, 1), (keeping, 2)):
            block = placed(session, [number] * 4)
            if program is plain:
                outputs = session.run(program, [block])
            else:
                outputs, residual = session.run_keeping(program, [block])
                session.drop_residual(residual)
            seen = values(*outputs)
            expected = [[factor * number**power] * 4 for factor in self.allowed]
            assert seen in expected, f"{seen} for {number}, not one of {expected}"
        self.count += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Have it begin no calls, so that the worker's processor idles."""
        self._may_call.clear()
        try:
            yield
        finally:
            self._may_call.set()

    def finish(self) -> None:
        """Wait for the end of a call that is under way while it is paused."""
        with self._calling:
            pass

    def check_progress(self) -> None:
        """Wait for a call that begins from now on, and pass its failure on."""
        target = self.count + 2
        _await(
            lambda: self.count >= target or self._error is not None,
            "another client's call was answered",
        )
        if self._error is not None:
            raise self._error


class Crowd:
    """Clients whose runs do not end until `disperse`: they fill the worker's queue."""

    def __init__(self, place: Place, gates: Gates, innocent: Innocent) -> None:
        self._place, self._gates, self._innocent = place, gates, innocent
        self._sessions: list[Session] = []
        self._threads: list[threading.Thread] = []
        self._wrong: list[object] = []

    def take_all_places(self, others: int = 0) -> None:
        """Occupy every place for runs but `others`, which are taken, while the innocent client is
        paused; nobody of the crowd waits."""
        self._gates.shut("crowd")
        most = _AT_ONCE - 1 - others
        self._add_running(most - self._gates.crowded)
        # The last place is for a client without a run.
        self._add_running(most + 1 - self._gates.crowded)

    def _add_running(self, calls: int) -> None:
        if calls <= 0:
            return
        target = self._gates.crowded + calls
        self._add(calls)
        _await(lambda: self._gates.crowded == target, f"{target} places are taken")

    def fill(self, others: int = 0) -> None:
        """Occupy every place for runs, and then for waiting runs."""
        with self._innocent.paused():
            self.take_all_places(others)
        while (waiting := self._place.measured()["waiting"]) < _MAX_WAITING:
            self._add(_MAX_WAITING - waiting)
            eventually(
                lambda: self._place.measured()["waiting"] >= _MAX_WAITING, within_s=1.0
            )

    def _add(self, calls: int) -> None:
        """Begin calls of a new client."""
        session = connect(self._place.address, lane="local", retry_s=_WITHIN_S)
        self._sessions.append(session)
        program = prepare(session, "crowded", floats(1))
        expected = [self._place.factor * X]

        def call() -> None:
            try:
                seen = values(*session.run(program, [placed(session, [X])]))
                if seen != expected:
                    self._wrong.append(seen)
            except BridgeError as error:
                self._wrong.append(error)

        for _ in range(calls):
            self._threads.append(threading.Thread(target=call))
            self._threads[-1].start()

    def disperse(self, *, may_fail: bool = False) -> None:
        """Let the runs end, and check their values. Idempotent.

        They may fail with a typed error if their worker has ended.
        """
        self._gates.open("crowd")
        for thread in self._threads:
            thread.join()
        for session in self._sessions:
            session.close()
        self._threads.clear()
        self._sessions.clear()
        self._gates.forget_the_crowd()
        wrong = [
            e for e in self._wrong if not may_fail or not isinstance(e, BridgeError)
        ]
        self._wrong.clear()
        assert not wrong, wrong


class Evictors:
    """Three clients, each with a residual of 400 kB: the victim's 600 kB are the most, and go."""

    def __init__(self, address: str) -> None:
        self._sessions = contextlib.ExitStack()
        nbytes = _RESIDUAL_BYTES * 4 // 10
        for _ in range(3):
            session = self._sessions.enter_context(connect(address, lane="local"))
            keeping = prepare(session, "squared", floats(nbytes // 4)).keeping((0,))
            session.run_keeping(keeping, [session.pool.lease(nbytes)])

    def close(self) -> None:
        self._sessions.close()


class Victim:
    """The victim's process, and what it has said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: dict[str, Any] = {}
        self._lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def next(self) -> dict[str, Any]:
        """Return the next message; an empty one at the process's end."""
        try:
            line = self._lines.get(timeout=_WITHIN_S)
        except queue.Empty:
            raise AssertionError(f"the victim is silent:\n{self.account()}") from None
        message: dict[str, Any] = json.loads(line) if line else {}
        self.said.update(message)
        return message

    def account(self) -> str:
        """Return what the victim said and its stacks, for a failure; it ends."""
        assert self.process.stderr is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)  # until it has written its stacks
        self.process.kill()
        return f"{self.said}\n{self.process.stderr.read()}"

    def until(self, key: str, *wanted: object) -> dict[str, Any]:
        """Let the victim go on through its pauses up to a message; the end is one."""
        while message := self.next():
            if message.get(key) in wanted or (not wanted and key in message):
                return message
            if "at" in message:
                self.before_going_on()
                self.tell("go")
        return {}

    def before_going_on(self) -> object:
        """Do what is to be done at each further pause; an event may replace this."""

    def has_spoken(self) -> bool:
        return not self._lines.empty()


@contextlib.contextmanager
def victim_of(place: Place, cell: Cell, retry_s: float) -> Iterator[Victim]:
    """A victim's process."""
    arguments = place.address, cell.lane, str(retry_s)
    variables = place.variables | {"BRIDGE_SLAB_MAX_BYTES": str(_SLAB_BYTES)}
    if cell.lane == "inproc":
        variables["JAX_PLATFORMS"] = "cpu"
    with start_program(_VICTIM, *arguments, **variables) as process:
        victim = Victim(process)
        try:
            yield victim
        finally:
            process.kill()
            victim.reader.join()


def _do_nothing() -> None:
    pass


class Scene:
    """A cell under way."""

    def __init__(
        self, place: Place, cell: Cell, victim: Victim, innocent: Innocent
    ) -> None:
        self.place, self.cell, self.victim = place, cell, victim
        self.innocent = innocent
        self.gates = Gates(place.directory)
        self.crowd = Crowd(place, self.gates, innocent)
        self.evictors: Evictors | None = None
        self.factors = {place.factor}  # of the models that the victim may meet
        self._is_stopped = False

    @property
    def is_in_run(self) -> bool:
        return self.cell.phase in IN_RUN

    @property
    def is_remote(self) -> bool:
        return self.cell.lane != "inproc"

    def reach(self) -> None:
        """Have the victim come to the cell's phase."""
        phase, victim = self.cell.phase, self.victim
        if not self.is_in_run:
            assert victim.until("at", phase), self.victim.account()
            return
        before = (
            "between forward and VJP"
            if phase == "in VJP"
            else "while inputs are written"
        )
        assert victim.until("at", before), self.victim.account()
        with contextlib.ExitStack() as waiting:
            if phase == "in the queue":
                # Alone: what waits is the victim.
                waiting.enter_context(self.innocent.paused())
                self.innocent.finish()
                self.crowd.take_all_places()
            else:
                self.gates.shut(self._gate)
            if self.cell.event == "deadline":
                self.obeyed("limit")
            victim.tell("go")
            assert victim.next() == {"calling": before}
            _await(self._is_reached, f"the victim is {phase}")

    @property
    def _gate(self) -> str:
        return "backward" if self.cell.phase == "in VJP" else "forward"

    def _is_reached(self) -> bool:
        if self.cell.event == "deadline" and self.victim.has_spoken():
            return True
        if self.cell.phase == "in the queue":
            return self.place.measured()["waiting"] >= 1
        return self.gates.is_reached(self._gate)

    def obeyed(self, command: str) -> None:
        """Have the victim do something while a call may be under way."""
        self.victim.tell(command)
        # A call under way may end first, as with its session, and the victim go on to a pause.
        while (message := self.victim.next()) and message != {"obeyed": command}:
            pass
        assert message, self.victim.account()

    def open_gates(self) -> None:
        """Let every run under way or in the queue go on."""
        self.gates.open("forward", "backward")
        if self.cell.phase == "in the queue":
            self.crowd.disperse(may_fail=self.cell.event in WORKER_ENDS)

    def go_on(self) -> None:
        """Let the victim go on after a pause."""
        if not self.is_in_run:
            self.victim.before_going_on()
            self.victim.tell("go")

    def outcome(self) -> str:
        """Return the outcome of the victim's call."""
        if not self.victim.until("error"):
            return "released"
        if error := self.victim.said["error"]:
            return str(error)
        return "recomputed" if self.victim.said["recomputed"] else "right"

    def check_values(self) -> None:
        """Check that each value is its model's, and the gradient is the forward's model's."""
        said, seen = self.victim.said, set()
        if "forward" in said:
            seen.add(said["forward"] / X**2)
        if "gradient" in said:
            seen.add(said["gradient"] / (2 * X * COTANGENT))
        assert len(seen) <= 1 and seen <= self.factors, (said, self.factors)
        if "goodbye" in said:
            assert said["goodbye"] / X in self.factors, said

    def recover(self) -> None:
        """Have the victim call again, undisturbed, with the present worker, and end."""
        victim = self.victim
        assert victim.until("at", "recover"), self.victim.account()
        victim.said.clear()
        victim.before_going_on = _do_nothing
        self.factors = {self.place.factor}
        victim.tell("go")
        assert victim.until("at", "end"), self.victim.account()
        assert {"forward", "gradient", "goodbye"} <= set(victim.said), victim.said
        self.check_values()
        victim.tell("go")
        assert victim.until("blocks") == {"blocks": 0}, self.victim.account()
        assert victim.process.wait(_WITHIN_S) == 0, self.victim.account()

    def clear(self) -> None:
        """Undo everything that would keep others from going on. Idempotent."""
        self.gates.open("forward", "backward")
        self.continue_worker()
        self.crowd.disperse(may_fail=self.cell.event in WORKER_ENDS)
        if self.evictors is not None:
            self.evictors.close()
            self.evictors = None

    def add_evictors(self) -> None:
        """Have others keep so many residuals that the victim's is evicted."""
        self.evictors = Evictors(self.place.address)

    def stop_worker(self) -> None:
        """Have the worker stand still."""
        self.place.worker.process.send_signal(signal.SIGSTOP)
        self._is_stopped = True

    def continue_worker(self) -> None:
        """Have the worker go on. Idempotent."""
        if self._is_stopped:
            self.place.worker.process.send_signal(signal.SIGCONT)
        self._is_stopped = False


def is_quiet(place: Place, baseline: dict[str, int]) -> bool:
    """Whether the worker holds what it held before."""
    now = held_by(place.worker.pid)
    return (
        not any(place.measured().values())
        and slabs_mapped(place.worker.pid) == 0
        and all(now[kind] <= baseline[kind] for kind in baseline)
    )
