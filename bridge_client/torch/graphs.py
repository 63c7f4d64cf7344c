"""Programs and functions by number: torch's graphs and compiled code hold numbers only."""

import functools
import hashlib
import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from bridge_client.arguments import Args, Kwargs
from bridge_client.session import Session
from bridge_client.torch.families import AnyProgram, Family


class Traceable(Protocol):
    """A function whose calls torch.compile can trace."""

    def call_traced(
        self,
        own: Sequence[Tensor],
        arguments: tuple[Args, Kwargs],
        mode: int,
        is_stateful: bool,
    ) -> Any: ...


_lock = threading.Lock()
_issued: set[int] = set()  # every number that a program ever had
_numbers: "weakref.WeakKeyDictionary[AnyProgram, int]" = weakref.WeakKeyDictionary()
_programs: "weakref.WeakValueDictionary[int, AnyProgram]" = (
    weakref.WeakValueDictionary()
)
_pinned: dict[int, AnyProgram] = {}  # until their session is closed
_pinned_of: dict[Session, list[int]] = {}

_functions: "weakref.WeakValueDictionary[int, Traceable]" = (
    weakref.WeakValueDictionary()
)
_function_numbers = itertools.count()


def pinned(number: int) -> AnyProgram:
    """Return the program with this number."""
    return _pinned.get(number) or _programs[number]


def pin(program: AnyProgram) -> int:
    """Keep a program that a graph is going to name, until its session is closed; return its number.

    The number follows from the program's inputs and outputs: torch keeps compiled code on disk, and
    another process finds the code again by the graph. No two programs of a process share a number.
    """
    session: Session = program.session
    with _lock:
        number = _numbers.get(program)
        if number is None:
            number = _new_number(program)
            _numbers[program], _programs[number] = number, program
        if session not in _pinned_of:
            _pinned_of[session] = []
            session.at_close(functools.partial(_unpin, session))
        if number not in _pinned:
            _pinned[number] = program
            _pinned_of[session].append(number)
    return number


def described(program: AnyProgram) -> bytes:
    """Return the call, the types of its outputs, and a family's formulas, as bytes."""
    call = program.request.SerializeToString(deterministic=True)
    outputs = ", ".join(map(str, program.outputs))
    sizes = repr((program.named, program.told)) if isinstance(program, Family) else ""
    return call + outputs.encode() + sizes.encode()


def number_of(function: Traceable) -> int:
    """Return a new number for a function, by which compiled code names it."""
    number = next(_function_numbers)
    _functions[number] = function
    return number


def function_of(number: int) -> Traceable:
    """Return the function with this number."""
    return _functions[number]


def _new_number(program: AnyProgram) -> int:
    digest = hashlib.sha256(described(program)).digest()
    number = int.from_bytes(digest[:7], "little") + 1
    while number in _issued:
        number += 1
    _issued.add(number)
    return number


def _unpin(session: Session) -> None:
    """Release the programs of a session that is being closed."""
    with _lock:
        for number in _pinned_of.pop(session, ()):
            _pinned.pop(number, None)
