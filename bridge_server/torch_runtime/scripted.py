"""TorchScript in a model: its attributes, which it holds in C++, and its runs.

Python's deepcopy makes new tensors there, whatever its memo says, and Python's snapshots see none
of them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

# The argument of a function that changes nothing, by which its graph is known.
_MARK = "mark_of_the_bridge"
_unit = torch.jit.CompilationUnit(f"def mark({_MARK}):\n  return {_MARK}\n")


class Slot:
    """One attribute of a TorchScript module, without its submodules' attributes."""

    def __init__(self, module: ScriptModule, name: str) -> None:
        self._held = module._c
        self._name = name

    def get(self) -> Any:
        """Return the value; a list is a copy of the module's."""
        return self._held.getattr(self._name)

    def set(self, value: Any) -> None:
        self._held.setattr(self._name, value)


def slots_of(module: ScriptModule) -> list[Slot]:
    """Return the attributes: parameters, buffers, and those of TorchScript's other types."""
    cls: Any = torch._C.ConcreteModuleType
    layout = cls.from_jit_type(module._c._type())
    names = [
        *module._parameters.keys(),
        *layout.get_attributes(),
    ]
    return [Slot(module, name) for name in names]


class Place:
    """The places of a call's tensors in one attribute: it is one of them, or a list with them."""

    def __init__(
        self,
        slot: Slot,
        positions: Sequence[int | None],
    ) -> None:
        self._slot = slot
        self._positions = positions

    def fill(self, values: Sequence[Tensor]) -> None:
        """Put these tensors in their places."""
        value = self._slot.get()
        filled = [
            x if i is None else values[i]
            for x, i in zip(
                _items(value),
                self._positions,
                strict=True,
            )
        ]
        if not isinstance(value, list):
            (value,) = filled
        else:
            value = filled
        self._slot.set(value)


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def places_in(
    copied: nn.Module,
    original: nn.Module,
    state: Sequence[Tensor],
) -> Iterator[Place]:
    """Return the places of the original's state in a copy of it, or in itself."""
    positions = {id(x): i for i, x in enumerate(state)}
    parts = zip(
        original.named_modules(remove_duplicate=False),
        copied.named_modules(remove_duplicate=False),
        strict=True,
    )
    for (_, part), (_, filled) in parts:
        if not isinstance(part, ScriptModule):
            continue
        slots = zip(
            slots_of(part),
            slots_of(filled),
            strict=True,
        )
        for theirs, mine in slots:
            held = _items(theirs.get())
            found = [positions.get(id(x)) for x in held]
            if any(i is not None for i in found):
                yield Place(mine, found)


class Notes:
    """Whether TorchScript has run in this thread."""

    has_run = False


@contextlib.contextmanager
def noting_runs() -> Iterator[Notes]:
    """Note whether this thread runs TorchScript: then its last graph is another than the mark."""
    notes = Notes()
    _unit.mark(torch.zeros(()))
    yield notes
    last = torch._C._last_executed_optimized_graph()
    notes.has_run = _MARK not in str(last)
