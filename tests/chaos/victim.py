"""The client to which events happen: a process that announces each phase, and waits for a word.

One JSON object a line on stdout, one command a line on stdin. Imports a framework only for a model
of its own process.

    python -c "from tests.chaos.victim import main; main()" ADDRESS LANE RETRY_S
"""

import array
import contextlib
import faulthandler
import gc
import importlib
import json
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from bridge_client import Session, connect
from bridge_client.programs import Program, tag_of
from bridge_wire.errors import BridgeError, OutOfMemory, ResidualGone
from bridge_wire.memory.pool import Block
from tests.calls import floats, placed, prepare, values
from tests.chaos.hosted import MODULE

COUNT = 150_000  # 600 kB of 1 MB: the largest residual of all clients
X, COTANGENT = 3.0, 2.0
LIMIT_S = 0.7


def main() -> None:
    """Run the phases, then everything again without a disturbance."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    victim = Victim(*sys.argv[1:])
    # Caught here, so that no traceback references blocks.
    with contextlib.suppress(SystemExit):
        victim.make_a_call()
        victim.pause("recover")
        victim.recover()
        victim.pause("end")
    victim.close()


class Victim:
    """A client's call: attach, forward, VJP, release."""

    def __init__(self, address: str, lane: str, retry_s: str) -> None:
        self._address, self._lane, self._retry_s = address, lane, float(retry_s)
        self._session: Session | None = None
        self._limit_s: float | None = None
        self._hog: list[Block] = []
        self._held: list[Any] = []  # the blocks of the forward and the VJP
        self._commands: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def session(self) -> Session:
        assert self._session is not None, "a step before attach"
        return self._session

    def _listen(self) -> None:
        """Obey at once where a call may be under way; the others are for `pause`."""
        at_once: dict[str, Callable[[], None]] = {
            "limit": self._set_limit,
            "fill": self._fill,
            "close": self._close_session,
        }
        for line in sys.stdin:
            command = line.strip()
            if command in at_once:
                at_once[command]()
                _say(obeyed=command)
            else:
                self._commands.put(command)

    def _set_limit(self) -> None:
        self._limit_s = LIMIT_S
        if self._session is not None:
            self._session.timeout_s = LIMIT_S

    def _fill(self) -> None:
        """Lease all memory that the session may have."""
        nbytes = 1 << 24
        while nbytes >= 64:
            try:
                self._hog.append(self.session.pool.lease(nbytes))
            except OutOfMemory:
                nbytes //= 2

    def _close_session(self) -> None:
        self.session.close()

    def pause(self, phase: str) -> None:
        """Announce a phase and wait for a command."""
        _say(at=phase)
        if self._commands.get() == "exit":
            sys.exit()
        _say(calling=phase)

    def make_a_call(self) -> None:
        """Announce the outcome of each step, up to the first error."""
        for step in (self._attach, self._forward, self._backward, self._release):
            try:
                step(self.pause)
            except (BridgeError, KeyboardInterrupt) as error:
                _say(error=type(error).__name__, text=str(error))
                return
        _say(error="")

    def recover(self) -> None:
        """Make the call once more, in the same session if there is one."""
        self._drop()
        self._hog.clear()
        self._limit_s = None
        if self._session is None or self._session.is_closed:
            self._session = None
            self._attach(_no_pause)
        self.session.timeout_s = None
        self._forward(_no_pause)
        self._backward(_no_pause)
        self._release(_no_pause)

    def close(self) -> None:
        """Release everything, and tell the blocks that stay."""
        self._drop()
        self._hog.clear()
        if self._session is None or self._session.is_closed:
            return
        deadline = time.monotonic() + 10
        while (left := self._blocks()) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._session.close()
        _say(blocks=left)

    def _drop(self) -> None:
        """Release what the call holds, as a framework's finalizers would."""
        if self._held:
            self.session.drop_residual(self._held[1])
        self._held.clear()

    def _blocks(self) -> int:
        gc.collect()
        return self.session.stats()["blocks"]

    # Steps ----------------------------------------------------------------------------------------

    def _attach(self, pause: Callable[[str], None]) -> None:
        pause("before attach")
        if self._lane == "inproc":
            self._session = _of_this_process()
        else:
            self._session = connect(
                self._address,
                lane=self._lane,
                timeout_s=self._limit_s,
                wait_s=self._retry_s,
                retry_s=self._retry_s,
            )
        self._program = prepare(self.session, "gated", floats(COUNT))
        self._keeping = self._program.keeping((0,))
        self._pullback = self._keeping.pullback((0,), (0,))
        self._program.vjp((0,), (0,))
        self._goodbye = prepare(self.session, "plain", floats(1))

    def _forward(self, pause: Callable[[str], None]) -> None:
        x = self.session.pool.lease(4 * COUNT)
        half = _packed(X)[: 2 * COUNT]
        x.buffer[: 2 * COUNT] = half
        pause("while inputs are written")
        x.buffer[2 * COUNT :] = half
        outputs, residual = self.session.run_keeping(self._keeping, [x])
        self._held = [x, residual]
        _say(forward=_only(outputs))

    def _backward(self, pause: Callable[[str], None]) -> None:
        pause("between forward and VJP")
        x, residual = self._held
        g = self.session.pool.lease(4 * COUNT)
        g.buffer[:] = _packed(COTANGENT)
        recomputed = False
        try:
            gradients = self.session.run_pullback(self._pullback, residual, [g])
        except ResidualGone:
            recomputed = True
            vjp: Program = self._program.on_model(tag_of(residual)).vjp((0,), (0,))
            gradients = self.session.run(vjp, [x, g])
        _say(gradient=_only(gradients), recomputed=recomputed)

    def _release(self, pause: Callable[[str], None]) -> None:
        pause("before release")
        self._drop()
        outputs = self.session.run(self._goodbye, [placed(self.session, [X])])
        _say(goodbye=_only(outputs))


def _of_this_process() -> Session:
    from bridge_client.inproc import host

    hosted = importlib.import_module(MODULE)
    models = {name: getattr(hosted, name) for name in ("gated", "plain")}
    return host(jax_model=models)


def _packed(number: float) -> bytes:
    return array.array("f", [number]).tobytes() * COUNT


def _only(blocks: list[Block]) -> float:
    """Return the number that an output holds everywhere; NaN if there are several."""
    (block,) = blocks
    first = block.buffer.tobytes()[:4]
    if block.buffer.tobytes() != first * (block.nbytes // 4):
        return float("nan")
    return values(block)[0]


def _no_pause(_: str) -> None:
    pass


def _say(**message: Any) -> None:
    # One write, where print makes two: another thread may say something too.
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
