"""Live test of shared memory with a child process, in place of a client and a worker.

`python -m bridge_wire.doctor.exchange FD` runs the child; FD is its end of the socket.
"""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

from bridge_wire.errors import ProtocolError, WorldError
from bridge_wire.lane.framed_socket import FramedSocket
from bridge_wire.memory.slabs import PAGE, create_slab, map_received

NBYTES = 256
CHILD_S = 60.0  # time limit of a child's start, on a busy machine


def with_child() -> None:
    """Share a slab with a child process; each side must read the other side's bytes.

    Raises:
      OutOfMemory: the system cannot allocate a slab.
      WorldError: the child did not receive the slab, or sees other memory.
    """
    slab = create_slab(PAGE, 0)
    try:
        written = os.urandom(NBYTES)
        slab.view[:NBYTES] = written
        with lane_to_child(__spec__.name) as lane:
            lane.send(b"memory", (slab.fd,))
            read = lane.receive(CHILD_S)
            if read is None:
                raise WorldError(
                    "the child process exited and did not receive the memory"
                )
        if read != written or slab.view[NBYTES : 2 * NBYTES] != written[::-1]:
            raise WorldError("the child process and this process see different bytes")
    finally:
        slab.close()


@contextlib.contextmanager
def lane_to_child(module: str, *arguments: str) -> Iterator[FramedSocket]:
    """Run `python -m MODULE FD ARGUMENTS` with the peer of the yielded socket as FD.

    The child is killed at the end of the context.

    Raises:
      WorldError: the child did not start, or exited during the exchange.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    lane = FramedSocket(ours)
    try:
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        with child:
            try:
                yield lane
            finally:
                child.kill()
    except OSError as error:  # includes TimeoutError
        raise WorldError(
            f"the child process did not receive the memory: {error or type(error).__name__}"
        ) from error
    finally:
        lane.close()


def _be_the_child(fd: int) -> None:
    lane = FramedSocket(socket.socket(fileno=fd), takes_descriptors=True)
    try:
        lane.receive(CHILD_S)
        descriptors = lane.take_descriptors()
        if len(descriptors) != 1:
            raise ProtocolError(f"expected one file descriptor, got {len(descriptors)}")
        slab = map_received(descriptors[0], PAGE, 0)
        read = bytes(slab.view[:NBYTES])
        slab.view[NBYTES : 2 * NBYTES] = read[::-1]
        lane.send(read)
        lane.receive(CHILD_S)  # stays until the parent has read
    finally:
        lane.close()


if __name__ == "__main__":
    _be_the_child(int(sys.argv[1]))
