"""Attention by plain operators: the fused ones have a first reverse-mode derivative only, and need tensors with memory.

torch's switch is one for the whole process. While it is off, calls of other threads take a little longer, and return
the same.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

from torch.backends import cuda, mha  # for every device, in spite of the name

_SWITCHES: tuple[tuple[Callable[[], bool], Callable[[bool], object]], ...] = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    (mha.get_fastpath_enabled, mha.set_fastpath_enabled),  # nn.TransformerEncoderLayer in eval mode
)
_lock = threading.Lock()
_before: list[bool] = []
_users = 0


@contextlib.contextmanager
def simple_attention() -> Iterator[None]:
    """Compute attention by operators that have every derivative and can be traced. May be nested, also in threads."""
    global _users
    with _lock:
        if not _users:
            _before[:] = [is_enabled() for is_enabled, _ in _SWITCHES]
            for _, enable in _SWITCHES:
                enable(False)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for (_, enable), was in zip(_SWITCHES, _before, strict=True):
                    enable(was)
