"""Attention by plain operators: the fused ones have a first reverse-mode derivative only, and need tensors with memory.

torch's switch is one for the whole process. While it is off, calls of other threads take a little longer, and return
the same.
"""

from collections.abc import Callable

from torch.backends import cuda, mha  # for every device, in spite of the name

from bridge_server.switches import Switch

_SWITCHES: tuple[tuple[Callable[[], bool], Callable[[bool], object]], ...] = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    (mha.get_fastpath_enabled, mha.set_fastpath_enabled),  # nn.TransformerEncoderLayer in eval mode
)


def _turn_off() -> Callable[[], None]:
    before = [is_enabled() for is_enabled, _ in _SWITCHES]
    for _, enable in _SWITCHES:
        enable(False)

    def turn_back() -> None:
        for (_, enable), was in zip(_SWITCHES, before, strict=True):
            enable(was)

    return turn_back


# Computes attention by operators that have every derivative and can be traced.
simple_attention = Switch(_turn_off)
