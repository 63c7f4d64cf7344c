"""Client package: sessions with workers.

Imports no framework; `bridge_client.torch` imports torch, `bridge_client.jax` imports jax.
"""

import os
from typing import Any

# Must be set before the first import of grpc: otherwise a channel created in a forked child (a
# DataLoader worker) fails.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

from bridge_client.remote.connecting import connect
from bridge_client.remote.link import Tls
from bridge_client.remote.spans import profile
from bridge_client.remote.spawning import spawn
from bridge_client.session import Session
from bridge_wire import __version__

__all__ = ["__version__", "Session", "Tls", "connect", "profile", "spawn"]


def load_ipython_extension(shell: Any) -> None:
    """Add the magic %%bridge_model to a notebook: %load_ext bridge_client."""
    from bridge_client.commands import notebook

    notebook.load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Close the workers of %%bridge_model: %unload_ext bridge_client."""
    from bridge_client.commands import notebook

    notebook.unload(shell)
