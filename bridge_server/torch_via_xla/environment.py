"""Loads the torchax environment, and keeps torch as it was.

Imports both frameworks; torchax only with the first trace, since its import changes torch.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from bridge_server.torch_runtime.attention import simple_attention
from bridge_wire.errors import CallerError

_loading = threading.Lock()


def environment() -> Any:
    """Return the environment in which torch code is traced.

    Raises:
      CallerError: torchax is not installed.
    """
    with _loading:
        return _loaded()


@functools.cache
def _loaded() -> Any:
    with _as_torchax_expects():
        try:
            from bridge_server.torch_via_xla import bridge_environment
        except ImportError as error:
            raise CallerError(
                f"tracing torch code needs torchax: pip install torchax ({error})"
            ) from error
        return bridge_environment.make()


@contextlib.contextmanager
def _as_torchax_expects() -> Iterator[None]:
    """Provide every operator that torchax's tables name, and undo the import's other effects.

    torchax 0.0.13 names overloads of ATen with Dimname, which torch 2.13 has removed. No code can
    call these overloads, so a string stands in for each.
    """
    packet = torch._ops.OpOverloadPacket
    original = packet.__getattr__

    def with_stand_ins(self: Any, key: str) -> Any:
        try:
            return original(self, key)
        except AttributeError:
            if key.startswith("_") or not str(self).startswith("aten."):
                raise
            return f"{self}.{key}, which this torch lacks"

    with (
        simple_attention,  # torchax turns fused attention off for good
        patch.object(packet, "__getattr__", with_stand_ins),
        # torch has no code for a device named "jax": with one, torch.compile fails on every model.
        patch.object(torch.utils, "rename_privateuse1_backend"),
        patch.object(torch, "_register_device_module"),
        patch.dict(os.environ),
    ):
        yield
