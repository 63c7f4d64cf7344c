"""Where the time of a call goes: OpenTelemetry's spans, and profiles that Perfetto opens."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bridge_client import connect, profile
from bridge_client.cli import main
from bridge_client.remote import spans
from bridge_client.session import Session
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import CallerError
from tests.conftest import ROOT

_PROGRAM = """
import sys, torch
from bridge_client import connect
from bridge_client.torch import RemoteJaxFunction
with connect(sys.argv[1]) as session:
    RemoteJaxFunction(session, name="sine")(torch.ones(3))
sys.exit(3)
"""


@pytest.fixture
def session(jax_worker: Session, lane: str) -> Iterator[Session]:
    with connect(jax_worker.address, lane=lane) as session:
        yield session


def _called(session: Session) -> None:
    x = torch.ones(3, requires_grad=True)
    RemoteJaxFunction(session, name="sine")(x).sum().backward()


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


def test_a_trace_has_both_sides(
    session: Session, exporter: InMemorySpanExporter
) -> None:
    """The calls lie below the caller's span, the worker's parts below each call and within it."""
    with trace.get_tracer("test").start_as_current_span("step"):
        _called(session)
    finished = exporter.get_finished_spans()
    named = {span.context.span_id: span for span in finished}
    (step,) = [span for span in finished if span.name == "step"]
    runs = [span for span in finished if span.name.startswith("bridge sine")]
    assert runs
    for run in runs:
        assert run.parent.span_id == step.context.span_id
        parts = [
            span
            for span in finished
            if span.parent and named.get(span.parent.span_id) is run
        ]
        assert [part.name for part in parts] == ["queue", "compute", "copy"]
        assert all(part.context.trace_id == step.context.trace_id for part in parts)
        assert run.start_time <= parts[0].start_time
        assert parts[-1].end_time <= run.end_time
        assert parts[1].end_time > parts[1].start_time
    assert any(span.name.startswith("bridge prepare") for span in finished)


def test_without_a_provider_nothing_is_timed(session: Session) -> None:
    assert not spans.are_wanted()
    _called(session)


def test_a_profile_has_both_sides(session: Session, tmp_path: Path) -> None:
    """Complete events of two processes, the worker's within the client's."""
    path = tmp_path / "trace.json"
    _called(session)
    with profile(path):
        _called(session)
    _called(session)
    events = json.loads(path.read_text())["traceEvents"]
    names = {
        event["args"]["name"]: event["pid"] for event in events if event["ph"] == "M"
    }
    assert set(names) == {"client", f"worker {session.address}"}
    complete = [event for event in events if event["ph"] == "X"]
    of_client = [event for event in complete if event["pid"] == os.getpid()]
    runs = [event["name"] for event in of_client if "prepare" not in event["name"]]
    assert len(runs) == 2  # a forward and its pullback
    for event in complete:
        assert event["dur"] >= 0
        assert any(
            whole["ts"] <= event["ts"] + 1
            and event["ts"] + event["dur"] <= whole["ts"] + whole["dur"] + 1
            for whole in of_client
        )


def test_a_profile_that_cannot_be_written(tmp_path: Path) -> None:
    context = profile(tmp_path / "none" / "trace.json")
    with pytest.raises(CallerError, match="cannot be written: No such file"), context:
        pass


def test_the_command_profiles_another(jax_worker: Session, tmp_path: Path) -> None:
    """Its status is that of the command."""
    path = tmp_path / "trace.json"
    command = [sys.executable, "-c", _PROGRAM, jax_worker.address]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bridge_client",
            "profile",
            "-o",
            str(path),
            "--",
            *command,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3, done.stderr
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    assert "compute" in names


def test_a_command_to_profile_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["profile"])
    assert "COMMAND" in capsys.readouterr().err
