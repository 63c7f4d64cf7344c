"""Each event in each phase over each lane: right values or a typed error, and nothing is left.

By default one phase per event and lane; `--chaos` runs all of them.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from tests.chaos.cells import (
    CLIENT_ENDS,
    EVENTS,
    LANES,
    PHASES,
    WORKER_ENDS,
    Cell,
    cells,
    table,
    why_not,
)
from tests.chaos.scene import (
    Innocent,
    Place,
    Scene,
    is_quiet,
    victim_of,
)
from tests.conftest import ROOT, eventually
from tests.workers import Background

_RETRY_S = 60.0
# Elsewhere the victim's own patience would hide the event.
_PATIENT = (
    "client SIGSTOP",
    "restart, same model",
    "restart, another model",
    "residual evicted",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        chosen = cells(in_full=metafunc.config.getoption("chaos"))
        metafunc.parametrize("cell", chosen, ids=[cell.id for cell in chosen])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The worker of all cells; an event that ends it leaves a successor."""
    place = Place(tmp_path_factory.mktemp("chaos"))
    yield place
    place.worker.kill()


# Events -------------------------------------------------------------------------------------------


def _kill_client(scene: Scene) -> None:
    scene.victim.process.kill()
    scene.open_gates()


def _stop_client(scene: Scene) -> None:
    """Stop it, and let it continue after others have been served."""
    scene.victim.process.send_signal(signal.SIGSTOP)
    scene.open_gates()
    if scene.is_remote:
        scene.innocent.check_progress()
    scene.victim.process.send_signal(signal.SIGCONT)
    scene.go_on()


def _exit_client(scene: Scene) -> None:
    """Exit, closing the session, if need be while a call of another thread is under way.

    That call, or over the local lane the next one, is an error.
    """
    victim = scene.victim
    if scene.is_in_run:
        scene.obeyed("close")
        scene.open_gates()
        if "error" not in victim.said:
            assert victim.until("error"), scene.victim.account()
        assert victim.said["error"] == "SessionClosed", scene.victim.account()
        if victim.said["at"] != "recover":
            victim.until("at", "recover")
    victim.tell("exit")
    assert victim.process.wait(60) == 0, scene.victim.account()


def _kill_worker(scene: Scene) -> None:
    scene.place.worker.kill()
    scene.open_gates()
    scene.go_on()


def _drain_worker(scene: Scene) -> None:
    """End it in order: runs under way and in the queue are answered."""
    scene.place.worker.terminate()
    scene.open_gates()

    def end() -> None:
        assert scene.place.worker.wait() == 0

    scene.victim.before_going_on = end
    scene.go_on()


def _restart(scene: Scene) -> None:
    scene.place.worker.terminate()
    scene.open_gates()
    assert scene.place.worker.wait() == 0
    scene.place.start()
    scene.go_on()


def _restart_with_another_model(scene: Scene) -> None:
    scene.place.worker.kill()
    scene.place.other_model()
    for factors in (scene.factors, scene.innocent.allowed):
        factors.add(scene.place.factor)
    scene.open_gates()
    scene.place.start()
    scene.go_on()


def _deadline(scene: Scene) -> None:
    """The worker stands still, or the run under way does not end, past the call's limit."""
    if not scene.is_in_run:
        scene.obeyed("limit")
        if scene.is_remote:
            scene.stop_worker()
        scene.go_on()


def _cancel(scene: Scene) -> None:
    """Ctrl-C while a call is under way; in one process, where it is no call, between two calls."""
    if scene.is_remote and not scene.is_in_run:
        scene.stop_worker()
        scene.go_on()
        assert scene.victim.next() == {"calling": scene.cell.phase}
        # Until the call waits: as it begins, Ctrl-C may leave a lock of grpc's locked for ever.
        time.sleep(0.5)
    scene.victim.process.send_signal(signal.SIGINT)


def _fill_slab(scene: Scene) -> None:
    scene.obeyed("fill")
    scene.open_gates()
    scene.go_on()


def _evict(scene: Scene) -> None:
    """Other clients keep residuals, in the queue behind the victim."""
    coming = Background(scene.add_evictors)
    if scene.cell.phase != "in the queue":
        coming.result()
    scene.victim.before_going_on = coming.result
    scene.open_gates()
    scene.go_on()


def _fill_queue(scene: Scene) -> None:
    is_running = scene.cell.phase in ("in forward", "in VJP")
    if scene.is_in_run:
        scene.crowd.fill(others=int(is_running))
    if scene.cell.phase != "in the queue":
        scene.victim.before_going_on = scene.crowd.fill
    scene.open_gates()
    scene.go_on()


_STRIKE: Mapping[str, Callable[[Scene], None]] = {
    "client SIGKILL": _kill_client,
    "client SIGSTOP": _stop_client,
    "client exit": _exit_client,
    "worker SIGKILL": _kill_worker,
    "worker SIGTERM": _drain_worker,
    "restart, same model": _restart,
    "restart, another model": _restart_with_another_model,
    "deadline": _deadline,
    "cancel": _cancel,
    "slab full": _fill_slab,
    "residual evicted": _evict,
    "queue full": _fill_queue,
}


# Cells --------------------------------------------------------------------------------------------


def test_a_cell(place: Place, cell: Cell) -> None:
    """The victim's outcome is the table's; other clients' values are right; nothing is left."""
    baseline = place.baseline()
    retry_s = _RETRY_S if cell.event in _PATIENT else 0.0
    innocent = Innocent(place, "grpc" if cell.lane == "local" else "local")
    with contextlib.ExitStack() as others:
        if cell.lane != "inproc":
            others.enter_context(innocent)
            innocent.check_progress()
        victim = others.enter_context(victim_of(place, cell, retry_s))
        scene = Scene(place, cell, victim, innocent)
        others.callback(scene.clear)
        scene.reach()
        _STRIKE[cell.event](scene)
        outcome = scene.outcome()
        assert outcome == cell.outcome, victim.account()
        scene.check_values()
        scene.clear()
        _have_a_worker(place, cell)
        if cell.event not in CLIENT_ENDS:
            scene.recover()
        if cell.lane != "inproc":
            innocent.check_progress()
    if cell.event in WORKER_ENDS:
        baseline = place.baseline()
    assert eventually(lambda: is_quiet(place, baseline), 30), (
        f"{baseline} before, {place.measured()} now"
    )


def _have_a_worker(place: Place, cell: Cell) -> None:
    """Start a successor after an event that left none."""
    if cell.event in ("worker SIGKILL", "worker SIGTERM"):
        place.worker.wait()
        place.start()
    place.worker.wait_until_ready()


# The table ----------------------------------------------------------------------------------------


def test_every_cell_has_an_outcome_or_a_reason() -> None:
    for event in EVENTS:
        for phase in PHASES:
            for lane in LANES:
                named = any(
                    cell[:3] == (event, phase, lane) for cell in cells(in_full=True)
                )
                assert named != bool(why_not(event, phase, lane)), (event, phase, lane)


def test_a_default_run_has_all_events_phases_and_lanes() -> None:
    chosen = cells(in_full=False)
    assert {cell.event for cell in chosen} == set(EVENTS)
    assert {cell.phase for cell in chosen} == set(PHASES)
    assert {cell.lane for cell in chosen} == set(LANES)


def test_the_page_shows_the_table_and_the_counts() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert table() in page, table()
    count = len(cells(in_full=True))
    whole = len(EVENTS) * len(PHASES) * len(LANES)
    counts = f"{whole} cells: {count} are run, {whole - count} make no sense"
    assert counts in page, counts
