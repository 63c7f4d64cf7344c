"""The questions of docs/gpu.md: the ones that the probe asks, and what it makes of answers where there is no GPU."""

import re
import subprocess
import sys
from typing import Any

import pytest

from bench import gpu_probe
from tests.conftest import ROOT


def test_the_page_has_the_questions_that_are_asked() -> None:
    """Word by word, and in that order."""
    rows = re.findall(r"^\| (.*\?) \| ", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
    assert rows == [question.text for question in gpu_probe.QUESTIONS.values()]


def test_without_a_gpu_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The status is 1, and the line says why."""
    monkeypatch.setattr(gpu_probe, "gpus", lambda: ())
    assert gpu_probe.main([]) == 1
    assert "there is no GPU here" in capsys.readouterr().out


def test_a_question_is_answered_in_a_line(fake_cuda: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, which is the one that CUDA's errors would break."""
    assert gpu_probe._asked("exchange") == "yes, in order by events"
    told = gpu_probe._asked("handles")
    assert (
        told.startswith("0 bytes: a handle of 0 bytes")
        and "random: the NVIDIA driver answers cuIpcOpenMemHandle_v2 with error 1" in told
    )
    assert "error 201, cudaErrorDeviceUninitialized" in told and told.endswith("the process goes on")
    assert gpu_probe.described().startswith("Fake GPU 0; CUDA 13.0; Linux ")


def test_a_question_that_ends_the_process_is_answered_by_how_it_ended(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the last line that it said, or after some time."""
    run = subprocess.run
    for program, said in (
        ("import os, sys; print('aborts', file=sys.stderr, flush=True); os.abort()", "ended with SIGABRT: aborts"),
        ("raise SystemExit('no | idea')", "ended with 1: no / idea"),
        ("import time; time.sleep(60)", "no answer in 1 s"),
    ):
        monkeypatch.setattr(gpu_probe, "_ANSWER_S", 1.0)
        command = [sys.executable, "-c", program]
        monkeypatch.setattr(gpu_probe.subprocess, "run", lambda _, command=command, **options: run(command, **options))
        assert gpu_probe._asked("exchange").endswith(said)
