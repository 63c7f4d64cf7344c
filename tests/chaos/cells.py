"""The table of the chaos suite: events, phases, lanes, and the outcome of each cell.

docs/reliability.md shows the same table. Imports no framework.
"""

from typing import NamedTuple

PHASES = (
    "before attach",
    "while inputs are written",
    "in the queue",
    "in forward",
    "between forward and VJP",
    "in VJP",
    "before release",
)
# Phases in which a call is under way on the worker.
IN_RUN = ("in the queue", "in forward", "in VJP")
LANES = ("local", "grpc", "inproc")

# Events that end the client, the worker, or neither of them.
CLIENT_ENDS = ("client SIGKILL", "client exit")
WORKER_ENDS = (
    "worker SIGKILL",
    "worker SIGTERM",
    "restart, same model",
    "restart, another model",
)

# The outcomes by event, in the order of PHASES. An outcome is "right" (the values of the model that
# ran the forward), "recomputed" (the same, with a second forward on the worker), "released" (the
# client is gone, and nothing of it is left), or the class of an error.
REMOTE: dict[str, tuple[str, ...]] = {
    "client SIGKILL": ("released",) * 7,
    "client SIGSTOP": ("right",) * 7,
    "client exit": ("released",) * 7,
    "worker SIGKILL": ("WorkerUnavailable",) * 2
    + ("WorkerDied", "WorkerDied", "WorkerUnavailable", "WorkerDied")
    + ("WorkerUnavailable",),
    "worker SIGTERM": ("WorkerUnavailable",) * 7,
    "restart, same model": ("right",) * 2
    + ("recomputed", "recomputed", "recomputed", "right", "right"),
    "restart, another model": (
        *("right", "right", "WorkerDied", "WorkerDied"),
        *("ModelChanged", "WorkerDied", "right"),
    ),
    "deadline": ("CallTimeout",) * 7,
    "cancel": ("KeyboardInterrupt",) * 7,
    "slab full": ("-", *("OutOfMemory",) * 4, "right", "right"),
    "residual evicted": ("recomputed",) * 5 + ("right",) * 2,
    "queue full": ("WorkerBusy",) * 2 + ("right",) + ("WorkerBusy",) * 4,
}
EVENTS = tuple(REMOTE)

_NO_WORKER = "the model is in the client's process: there is no worker to end"
# In one process: the same for the events that exist there.
INPROC: dict[str, tuple[str, ...]] = {
    "client SIGKILL": ("-", "released", "-") + ("released",) * 4,
    "client SIGSTOP": ("-", "right", "-") + ("right",) * 4,
    "client exit": ("-", "released", "-", "-", "released", "-", "released"),
    "deadline": ("-", "CallerError", "-", "-", "CallerError", "-", "CallerError"),
    "cancel": (
        *("-", "KeyboardInterrupt", "-", "-", "KeyboardInterrupt", "-"),
        "KeyboardInterrupt",
    ),
}

# The phases of a run without --chaos, one per event and lane.
_BY_DEFAULT: dict[str, tuple[int, ...]] = {
    "client SIGKILL": (5, 3, 4),
    "client SIGSTOP": (2, 4, 3),
    "client exit": (3, 1, 4),
    "worker SIGKILL": (3, 5),
    "worker SIGTERM": (2, 3),
    "restart, same model": (0, 4),
    "restart, another model": (4, 1),
    "deadline": (5, 2, 4),
    # Not over gRPC: a Ctrl-C as a call begins may leave a lock of grpc locked, see the page.
    "cancel": (1, -1, 1),
    "slab full": (4, 3),
    "residual evicted": (6, 4),
    "queue full": (1, 0),
}


class Cell(NamedTuple):
    """One event in one phase over one lane, and its outcome."""

    event: str
    phase: str
    lane: str
    outcome: str

    @property
    def id(self) -> str:
        """The name of this cell's test."""
        return f"{self.event}-{self.phase}-{self.lane}".replace(" ", "_")


def why_not(event: str, phase: str, lane: str) -> str:
    """Return the reason for which a cell makes no sense; empty if the cell does."""
    if outcomes_of(event, lane)[PHASES.index(phase)] != "-":
        return ""
    if lane != "inproc":
        return "there are no slabs before there is a session"
    if event in WORKER_ENDS:
        return _NO_WORKER
    if event not in INPROC:
        return "in one process there is no slab, no budget for residuals, and no queue"
    if phase == "before attach":
        return "in one process there is nothing to attach to"
    if phase == "in the queue":
        return "in one process there is no queue"
    return "in one process the caller's thread runs the model, and cannot give it up"


def outcomes_of(event: str, lane: str) -> tuple[str, ...]:
    """Return the outcomes of an event over a lane, by phase; "-" where there is none."""
    if lane == "inproc":
        return INPROC.get(event, ("-",) * len(PHASES))
    return REMOTE[event]


def cells(*, in_full: bool) -> list[Cell]:
    """Return the cells that make sense; or one per event and lane, with all phases among them."""
    return [
        Cell(event, phase, lane, outcome)
        for event in EVENTS
        for number, lane in enumerate(LANES)
        for index, (phase, outcome) in enumerate(
            zip(PHASES, outcomes_of(event, lane), strict=True)
        )
        if outcome != "-"
        if in_full or index == (_BY_DEFAULT[event] + (-1,))[number]
    ]


def table() -> str:
    """Return the table as Markdown, for docs/reliability.md."""
    lines = [f"| event | lane | {' | '.join(PHASES)} |", "|---" * 9 + "|"]
    for event, by_phase in REMOTE.items():
        lines.append(f"| {event} | local, grpc | {' | '.join(by_phase)} |")
        if event in INPROC:
            lines.append(f"| | inproc | {' | '.join(INPROC[event])} |")
    return "\n".join(lines)
