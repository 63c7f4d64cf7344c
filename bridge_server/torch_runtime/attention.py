"""Attention by plain operators: fused operators lack higher derivatives and need memory.

Fused operators have a first reverse-mode derivative only. torch's switches apply to the whole
process: while the fused operators are off, other threads' calls take a little longer and return the
same.
"""

from collections.abc import Callable, Sequence

from torch import nn
from torch.backends import cuda, mha  # for every device, in spite of the name

from bridge_server.process_settings import Switch

_Setting = tuple[Callable[[], bool], Callable[[bool], object]]
_FUSED: Sequence[_Setting] = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)
# In eval mode without gradients, nn.TransformerEncoder gives padded positions other values than
# under autograd.
HAVE_FAST_PATH = (
    nn.MultiheadAttention,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
)
_FAST_PATH: Sequence[_Setting] = ((mha.get_fastpath_enabled, mha.set_fastpath_enabled),)


def _turned_off(settings: Sequence[_Setting]) -> Callable[[], None]:
    before = [is_enabled() for is_enabled, _ in settings]
    for _, enable in settings:
        enable(False)

    def turn_back() -> None:
        for (_, enable), was in zip(settings, before, strict=True):
            enable(was)

    return turn_back


# Computes attention by operators that have every derivative and can be traced.
simple_attention = Switch(lambda: _turned_off((*_FUSED, *_FAST_PATH)))
# Computes a call's values in the same way as its derivatives.
no_fast_path = Switch(lambda: _turned_off(_FAST_PATH))
