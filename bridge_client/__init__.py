"""The client: sessions with workers.

Importing it imports no framework; `.torch` and `.jax` import theirs.
"""

import os

# Must be set before grpc is first imported: without it, a channel made in a forked child (a
# DataLoader worker) fails.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

from bridge_client.remote.connecting import connect
from bridge_client.remote.link import Tls
from bridge_client.remote.spawning import spawn
from bridge_client.session import Session

__all__ = ["Session", "Tls", "connect", "spawn"]
