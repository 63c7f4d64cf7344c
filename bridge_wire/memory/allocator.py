"""Best-fit allocator of address ranges. Bookkeeping only: the module touches no memory."""

# XLA reads an array in place only at an alignment of 64 bytes. Extents above a page are whole
# pages.
ALIGNMENT = 64
_PAGE = 4096


def rounded(nbytes: int) -> int:
    """Return the extent size for a request of `nbytes` bytes."""
    unit = ALIGNMENT if nbytes < _PAGE else _PAGE
    return max(unit, -(-nbytes // unit) * unit)


class Allocator:
    """Best-fit allocator. Merges adjacent freed extents only when a request does not fit.

    Sizes come from `rounded`. Not thread-safe.
    """

    def __init__(self) -> None:
        self._spans: list[
            tuple[int, int]
        ] = []  # (start, size), sorted, no two adjacent
        self._freed: list[tuple[int, int]] = []

    def add(self, start: int, size: int) -> None:
        """Add a range of free addresses, not adjacent to any other range."""
        self._spans.append((start, size))
        self._spans.sort()

    def allocate(self, size: int) -> int | None:
        """Return the start of a free extent of this size, or None."""
        start = self._carve(size)
        if start is None and self._freed:
            self._coalesce()
            start = self._carve(size)
        return start

    def free(self, start: int, size: int) -> None:
        """Free an extent returned by `allocate`."""
        self._freed.append((start, size))

    @property
    def free_bytes(self) -> int:
        return sum(size for _, size in self._spans + self._freed)

    def _carve(self, size: int) -> int | None:
        fitting = [(room, i) for i, (_, room) in enumerate(self._spans) if room >= size]
        if not fitting:
            return None
        room, i = min(fitting)
        start, _ = self._spans[i]
        if room == size:
            del self._spans[i]
        else:
            self._spans[i] = (start + size, room - size)
        return start

    def _coalesce(self) -> None:
        merged: list[tuple[int, int]] = []
        for start, size in sorted(self._spans + self._freed):
            if merged and sum(merged[-1]) == start:
                start, size = merged[-1][0], merged.pop()[1] + size
            merged.append((start, size))
        # Assigned last, so that Ctrl-C cannot lose extents that are not merged yet.
        self._spans, self._freed = merged, []
