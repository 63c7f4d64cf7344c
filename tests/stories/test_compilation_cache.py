"""Compiled code is kept between the starts of a worker, in a directory of its user alone."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from bridge_client.torch import RemoteJaxFunction
from bridge_server.process import compiled
from bridge_wire.errors import CallerError
from tests.workers import Worker, serving

_MODEL = """
import pathlib

import jax
import jax.numpy as jnp

HERE = pathlib.Path(__file__).parent
LAYERS = 30


def note(event, **_):
    if "/compilation_cache/cache_" in event:
        with open(HERE / "events", "a") as file:
            print(event.rpartition("/")[2], file=file)


jax.monitoring.register_event_listener(note)


def deep(x):
    for i in range(LAYERS):
        x = jnp.tanh(x @ jnp.full((8, 8), 1.0 / (i + 8)))
    return x
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model, and with the user's cache."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "1")
    for variable in ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.py").write_text(_MODEL)
    return tmp_path


def test_a_second_start_compiles_nothing(place: Path) -> None:
    first = _counted(place)
    assert first["cache_misses"] >= 2, "a forward and a backward"
    assert first["cache_hits"] == 0
    second = _counted(place)
    assert second["cache_misses"] == 0
    assert second["cache_hits"] >= first["cache_misses"]
    directory = place / "cache" / "torch-jax-bridge" / "compiled"
    assert directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "flags", [["--no-compilation-cache"], ["--compilation-cache="]], ids=["no", "empty"]
)
def test_the_cache_can_be_turned_off(place: Path, flags: list[str]) -> None:
    assert _counted(place, *flags) == Counter()
    assert not (place / "cache").exists()


def test_jaxs_own_variable_is_respected(place: Path) -> None:
    own = {"JAX_COMPILATION_CACHE_DIR": str(place / "own")}
    _counted(place, **own)
    assert not (place / "cache").exists()


def test_without_a_usable_home_a_worker_says_so_and_serves(place: Path) -> None:
    (place / "cache").write_text("no directory")
    assert _counted(place) == Counter()
    lines = (place / "logs" / "stderr").read_text().splitlines()
    assert sum("compiled code is not kept" in line for line in lines) == 1


def test_a_directory_that_others_can_write_to_is_refused(place: Path) -> None:
    shared = place / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with Worker(
        place, f"{place}/model.py:deep", f"--compilation-cache={shared}"
    ) as worker:
        assert worker.process.wait(60) == 2
    assert "is not a directory of this user" in worker.stderr


def test_entries_read_longest_ago_are_removed_at_the_start(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_MOST_BYTES", 250)
    for name, read in (("old", 1), ("new", 3), ("older", 0), ("newer", 4)):
        entry = place / name
        entry.write_bytes(bytes(100))
        os.utime(entry, (read, 5))
    (place / "model.py").unlink()
    compiled._shorten(place)
    assert {path.name for path in place.iterdir()} == {"new", "newer"}


def test_the_doctor_shows_the_directory(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled.described() == str(compiled.default())
    monkeypatch.setenv("BRIDGE_COMPILATION_CACHE", "/elsewhere")
    assert compiled.described() == "/elsewhere"
    monkeypatch.setenv("BRIDGE_COMPILATION_CACHE", "")
    assert compiled.described() == "off"
    monkeypatch.delenv("BRIDGE_COMPILATION_CACHE")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    assert compiled.described() == "off"


def test_another_users_directory_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(CallerError, match="not a directory of this user"):
        compiled.keep(str(place / "theirs"))


def _counted(place: Path, *flags: str, **env: str) -> Counter[str]:
    """Start a worker, call its model forward and backward, and return JAX's events."""
    events = place / "events"
    events.write_text("")
    listen = f"--listen=unix:{place}/worker.sock"
    with serving(
        place / "logs", f"{place}/model.py:deep", listen, *flags, env=env
    ) as worker:
        x = torch.ones(4, 8, requires_grad=True)
        RemoteJaxFunction(worker.address)(x).sum().backward()
    assert x.grad.abs().max() > 0
    return Counter(events.read_text().split())
