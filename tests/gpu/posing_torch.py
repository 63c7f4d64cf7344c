"""Runtimes whose models run on the host, posing as ones on the GPU that is none.

Imports no framework.
"""

from collections.abc import Callable
from typing import Any

from bridge_wire.memory.cuda import gpus


def pose(replace: Callable[[Any, str, Any], None], runtime: Any) -> None:
    """Let a runtime say that it is on the first GPU; `replace` sets an attribute. What it reads it
    has waited for: the host's torch knows no streams.
    """
    view = runtime.view

    def view_in_turn(
        self: Any, pointer: int, spec: Any, owner: Any, turn: Any = None
    ) -> Any:
        if turn is not None:
            turn.wait(None)
        return view(self, pointer, spec, owner, turn)

    replace(runtime, "gpu", lambda self: gpus()[0])
    replace(runtime, "view", view_in_turn)
