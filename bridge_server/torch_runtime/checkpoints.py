"""torch.utils.checkpoint with `use_reentrant=True`, run as with False: the same values.

The reentrant one has gradients only by `.backward()`, without inputs named, and none where no
argument needs a gradient but a parameter does (torch 2.13: a warning, and then zeros here).
"""

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import CheckpointFunction, checkpoint

from bridge_server.process_settings import Switch


def _not_reentrant(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=preserve_rng_state,
    )


def _turn() -> Callable[[], None]:
    # Of the class itself; its base's is found again when this one is gone.
    CheckpointFunction.apply = staticmethod(_not_reentrant)  # type: ignore[method-assign]

    def turn_back() -> None:
        del CheckpointFunction.apply

    return turn_back


# The switch applies to the whole process; other threads' checkpoints have the same values.
without_reentry = Switch(_turn)
