"""The questions of docs/gpu.md: the ones that the probe asks, and what it makes of answers where
there is no GPU."""

import re
from typing import Any

import pytest

from bench import gpu_probe
from tests.conftest import ROOT


def test_the_page_has_the_questions_that_are_asked() -> None:
    """Word by word, and in that order."""
    rows = re.findall(
        r"^\| (.*\?) \| ", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE
    )
    assert rows == [question.text for question in gpu_probe.QUESTIONS.values()]


def test_without_a_gpu_nothing_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The status is 1, and the line says why."""
    monkeypatch.setattr(gpu_probe, "gpus", lambda: ())
    assert gpu_probe.main(["exchange"]) == 1
    assert "shows no GPU here" in capsys.readouterr().out


def test_the_machine_is_described_in_a_line(fake_cuda: Any) -> None:
    """Its GPUs, its CUDA, its system."""
    assert gpu_probe.described().startswith("Fake GPU 0; CUDA 13.0; Linux ")
