"""The allocator never hands out a byte twice, keeps alignment, reuses, and gives everything
back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_wire.memory.allocator import ALIGNMENT, Allocator, rounded

PAGE = 4096
# Allocate so many bytes, or free the n-th of the live extents.
steps = st.lists(
    st.tuples(st.just("allocate"), st.integers(0, 3 * PAGE))
    | st.tuples(st.just("free"), st.integers(0, 1000)),
    max_size=80,
)
span_pages = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def with_spans(sizes_in_pages: list[int]) -> tuple[Allocator, list[tuple[int, int]]]:
    """Return an allocator of spans that do not touch each other, and the spans."""
    allocator, spans, start = Allocator(), [], PAGE
    for pages in sizes_in_pages:
        allocator.add(start, pages * PAGE)
        spans.append((start, pages * PAGE))
        start += (pages + 1) * PAGE
    return allocator, spans


def apply(
    allocator: Allocator, steps: list[tuple[str, int]], live: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Run the steps; return every extent that was given out, and leave the live ones in `live`."""
    given_out = []
    for action, number in steps:
        if action == "free" and live:
            allocator.free(*live.pop(number % len(live)))
        elif action == "allocate":
            size = rounded(number)
            start = allocator.allocate(size)
            if start is not None:
                assert not any(start < s + n and s < start + size for s, n in live), (
                    "overlaps a live extent"
                )
                live.append((start, size))
                given_out.append((start, size))
    return given_out


@given(st.integers(0, 2**62))
def test_extent_is_aligned_and_large_enough(nbytes: int) -> None:
    """An extent's size is a multiple of 64, of a page where the request is that large, and
    wastes less than a page."""
    size = rounded(nbytes)
    assert (
        size >= nbytes
        and size % ALIGNMENT == 0
        and size - nbytes < max(PAGE, ALIGNMENT + 1)
    )
    assert nbytes < PAGE or size % PAGE == 0
    assert rounded(size) == size


@settings(deadline=None, max_examples=200)
@given(span_pages, steps)
def test_live_extents_never_overlap(
    spans: list[int], steps: list[tuple[str, int]]
) -> None:
    """Whatever is allocated and freed, live extents are disjoint, aligned, and inside the ranges
    that were added."""
    allocator, ranges = with_spans(spans)
    for start, size in apply(allocator, steps, []):
        assert start % ALIGNMENT == 0
        assert any(
            first <= start and start + size <= first + room for first, room in ranges
        )


@settings(deadline=None, max_examples=200)
@given(span_pages, steps)
def test_free_bytes_are_what_is_not_live(
    spans: list[int], steps: list[tuple[str, int]]
) -> None:
    """The free bytes and those of the live extents are together those that were added."""
    allocator, ranges = with_spans(spans)
    live: list[tuple[int, int]] = []
    apply(allocator, steps, live)
    assert allocator.free_bytes + sum(size for _, size in live) == sum(
        size for _, size in ranges
    )


@settings(deadline=None, max_examples=200)
@given(span_pages, steps)
def test_everything_freed_coalesces_to_the_original_spans(
    spans: list[int], steps: list[tuple[str, int]]
) -> None:
    """Once all extents are freed, each range that was added can be had again in one piece,
    whatever went before."""
    allocator, ranges = with_spans(spans)
    live: list[tuple[int, int]] = []
    apply(allocator, steps, live)
    for extent in live:
        allocator.free(*extent)
    got = sorted(
        (allocator.allocate(size), size)
        for _, size in sorted(ranges, key=lambda span: -span[1])
    )
    assert got == ranges
    assert allocator.free_bytes == 0


def test_best_fit_leaves_the_large_span_whole() -> None:
    """A request is cut from the smallest span that holds it."""
    allocator, [large, small] = with_spans([8, 2])
    assert allocator.allocate(2 * PAGE) == small[0]
    assert allocator.allocate(8 * PAGE) == large[0]


def test_neighbours_merge_when_nothing_else_fits() -> None:
    """Two freed neighbours serve a request of their joint size."""
    allocator, [(start, _)] = with_spans([2])
    extents = [allocator.allocate(PAGE), allocator.allocate(PAGE)]
    for extent in extents:
        assert extent is not None
        allocator.free(extent, PAGE)
    assert allocator.allocate(2 * PAGE) == start


def test_ranges_that_do_not_touch_never_merge() -> None:
    """No extent reaches across the gap between two ranges."""
    allocator, _ = with_spans([2, 2])
    assert allocator.allocate(3 * PAGE) is None


@pytest.mark.parametrize("size", [ALIGNMENT, PAGE])
def test_empty_allocator_has_nothing(size: int) -> None:
    """Without a range, and when a range is used up, an allocation gives None."""
    allocator = Allocator()
    assert allocator.allocate(size) is None
    allocator.add(PAGE, size)
    assert allocator.allocate(size) == PAGE
    assert allocator.allocate(size) is None
