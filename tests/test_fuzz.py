"""A few thousand of `make fuzz`'s inputs, and the proof that the fuzzer sees a fault when there
is one."""

import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from bridge_server.serving.residuals import Residuals
from bridge_server.serving.session import Session
from bridge_wire import specs, trees
from bridge_wire.lane import frames
from tests import fuzz

INPUTS = 3000


@pytest.mark.parametrize("seed", [1, 2])
def test_random_input_does_no_harm(seed: int) -> None:
    """No input makes the decoders raise what is no BridgeError, or leaves anything behind in the
    worker."""
    fuzz.run(INPUTS, seed)


def test_input_that_was_not_seen_before_does_no_harm() -> None:
    """The same holds for inputs that differ in each run of the tests; a failure names the seed."""
    fuzz.run(INPUTS, int.from_bytes(os.urandom(4), "little"))


def fails(*_: object, **__: object) -> Any:
    raise ValueError("planted")


def does_nothing(*_: object, **__: object) -> None:
    pass


@pytest.mark.parametrize(
    ("where", "name", "instead"),
    [
        (specs, "decode", fails),
        (trees, "leaf_paths", fails),
        (frames.FrameDecoder, "next", fails),
        (Session, "run", fails),
        (Session, "_locate", fails),
        (Residuals, "drop_all", does_nothing),
    ],
    ids=["specs", "trees", "frames", "runs", "addresses", "residuals left"],
)
def test_fuzzer_sees_a_planted_fault(
    where: Any, name: str, instead: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one function of the decoders or of the worker broken, the fuzzer fails within a few
    inputs."""
    monkeypatch.setattr(where, name, instead)
    with pytest.raises(fuzz.Fault):
        fuzz.run(600, seed=1)


def test_fuzzer_sees_a_leaked_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One descriptor that is not closed makes the fuzzer fail."""
    opened = []
    original = Session.discard

    def leaking(session: Session) -> None:
        original(session)
        opened.append(os.dup(0))

    monkeypatch.setattr(Session, "discard", leaking)
    try:
        with pytest.raises(fuzz.Fault, match="descriptors"):
            fuzz.run(600, seed=1)
    finally:
        for fd in opened:
            os.close(fd)


def test_same_seed_gives_the_same_inputs() -> None:
    """An input is a function of the seed and its number, so that a failure can be had again."""
    kinds = fuzz._MESSAGES
    one, other = (
        [fuzz.serialized(kind, random.Random("7/3")) for kind in kinds]
        for _ in range(2)
    )
    assert one == other
