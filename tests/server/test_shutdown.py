"""Stop signals of a worker that is starting."""

import gc
import os
import signal

import pytest

from bridge_server.process.shutdown import StopSignals


def test_a_signal_within_a_callback_of_the_collector_prints_no_traceback(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python ignores the exception there, and the block is ended otherwise."""

    def interrupt(phase: str, _: object) -> None:
        if phase == "start":
            signal.raise_signal(signal.SIGTERM)

    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    monkeypatch.setattr("sys.unraisablehook", lambda each: print(each.exc_value))
    stop = StopSignals()
    stop._is_at_once = True
    gc.callbacks.append(interrupt)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(interrupt)
        signal.set_wakeup_fd(-1)
        os.close(stop._asked)
        os.close(stop._ask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stop._is_requested
    assert capfd.readouterr() == ("", "")
