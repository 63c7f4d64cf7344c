"""The sources keep the house's measures: size, language, rooms and error texts.

Each measure is also shown to fail. The tests' own prose has its present count as its limit, to be
lowered and never raised.
"""

import graphlib
import re
from pathlib import Path

import pytest

from bridge_wire import errors
from tests import house
from tests.house import PACKAGES, ROOT, Raised

TOKENS = 8.0  # per code line
LINES = 50  # of a function's body
CLAUSES = 3.0  # per 1,000 words
CLAUSES_OF_OTHERS = {
    "bench": 3.0,
    "exact": 3.0,
    "tests": 11.6,
    "tools": 3.0,
    "examples": 3.0,
}
CLAUSES_OF_PAGES = 3.0
ROOMS, FLOORS, ARROWS = 14, 7, 30
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def order_of_rooms(package: str) -> list[str]:
    """Return the rooms of a package in the order of docs/design.md, top to bottom."""
    page = (ROOT / "docs" / "design.md").read_text()
    table = page.split(f"**`{package}`**")[1].split("\n\n**`")[0].split("\n## ")[0]
    names = re.findall(r"^\| `([\w./]+)`", table, re.MULTILINE)
    return [name.removesuffix(".py").rstrip("/") for name in names]


def errors_raised(package: str) -> list[Raised]:
    return [
        error
        for path in house.sources(package)
        for error in house.raised(path.read_text(), str(path.relative_to(ROOT)))
    ]


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_code_lines_are_light(package: str) -> None:
    """A package has few tokens per code line."""
    code = house.package_code(package)
    assert code.tokens / code.lines <= TOKENS


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short(package: str) -> None:
    """No function's body is longer than the limit."""
    long = [
        (path.name, name, lines)
        for path in house.sources(package)
        for name, lines in house.functions(path.read_text())
        if lines > LINES
    ]
    assert not long


def test_tokens_are_counted_without_prose_and_layout() -> None:
    """Comments, docstrings, blank lines and indentation are no tokens of code."""
    counted = house.code(
        '"""A module."""\n\n\ndef f(x):  # why\n    """Do."""\n    return x + 1\n'
    )
    assert (counted.tokens, counted.lines) == (6 + 4, 2)
    assert counted.prose.split("\n") == ["A module.", "why", "Do."]


def test_bodies_are_counted_without_docstrings() -> None:
    """A function's size is that of its statements."""
    source = 'def f():\n    """Do.\n\n    More.\n    """\n    a = 1\n    return a\n'
    assert list(house.functions(source)) == [("f:1", 2)]


# Language -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "limit"),
    [*((package, CLAUSES) for package in PACKAGES), *CLAUSES_OF_OTHERS.items()],
)
def test_docstrings_and_comments_name_things(package: str, limit: float) -> None:
    """The docstrings and comments of a package have few clauses with *what* and *who*."""
    assert house.clauses_per_1000_words(house.package_code(package).prose) <= limit


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_things(page: Path) -> None:
    """A page of the documentation has few clauses with *what* and *who*."""
    assert house.clauses_per_1000_words(page.read_text()) <= CLAUSES_OF_PAGES


def test_clauses_are_counted_outside_of_code() -> None:
    """A word in a code span or a fenced block is none of the text's."""
    assert (
        house.clauses_per_1000_words("Say what `who` is.\n```\nwhoever\n```\n")
        == 1000 / 3
    )


# Rooms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_stand_in_floors(package: str) -> None:
    """A package has few rooms, floors and arrows; none runs up, and there is no circle."""
    drawn = house.rooms(ROOT / package)
    assert not house.upward(drawn, order_of_rooms(package))
    assert len(drawn) <= ROOMS
    assert sum(map(len, drawn.values())) <= ARROWS
    assert house.floors(drawn) <= FLOORS


def write_rooms(folder: Path, imports: dict[str, str]) -> dict[str, set[str]]:
    for room, imported in imports.items():
        (folder / "house").mkdir(exist_ok=True)
        (folder / "house" / f"{room}.py").write_text(imported)
    return house.rooms(folder / "house")


def test_arrows_are_drawn_from_every_form_of_import(tmp_path: Path) -> None:
    """Absolute imports of a room, from it, and within a function are arrows; others are none."""
    drawn = write_rooms(
        tmp_path,
        {
            "top": "import house.middle\nimport os\n",
            "middle": "def f():\n    from house.low import x\n",
            "low": "from house import floor\nfrom other.top import y\n",
            "floor": "",
        },
    )
    assert drawn == {
        "top": {"middle"},
        "middle": {"low"},
        "low": {"floor"},
        "floor": set(),
    }
    assert house.floors(drawn) == 4


def test_arrow_up_is_found(tmp_path: Path) -> None:
    """An import of a higher room is an arrow up."""
    drawn = write_rooms(tmp_path, {"top": "", "low": "from house.top import x\n"})
    assert house.upward(drawn, ["top", "low"]) == {("low", "top")}


def test_circle_is_found(tmp_path: Path) -> None:
    """Rooms that import each other have no floors."""
    drawn = write_rooms(tmp_path, {"a": "import house.b\n", "b": "import house.a\n"})
    with pytest.raises(graphlib.CycleError):
        house.floors(drawn)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_errors_say_something(package: str) -> None:
    """Every raise of one of the bridge's errors has a text."""
    assert not [error.place for error in errors_raised(package) if error.is_empty()]


@pytest.mark.parametrize("package", PACKAGES)
def test_errors_name_things(package: str) -> None:
    """The texts of errors name what was seen and expected, and do not allude to it."""
    indirect = [error for error in errors_raised(package) if error.is_indirect()]
    assert not indirect


def test_every_error_is_looked_for() -> None:
    """The walk knows the whole tree, and finds most of the raises that a search finds."""
    assert {errors.BridgeError.__name__, "CallerError", "WorkerDied"} <= house.ERRORS
    assert sum(len(errors_raised(package)) for package in PACKAGES) > 300


@pytest.mark.parametrize(
    "text",
    [
        '"the token has characters that are not printable ASCII, as no worker\'s has"',
        '"one descriptor was to come, not 2"',
        'f"{name} has outputs of shapes {seen}, where {shapes} were foretold"',
        'f"uses its parameter {name} by another way than its registration"',
        '"the memory is nobody\'s"',
        '"whoever asks must close"',
        '"say what " f"it {name} is"',
    ],
)
def test_allusion_is_found(text: str) -> None:
    """Each turn of phrase that the house replaced is found, in any form of string."""
    (error,) = house.raised(f"raise errors.CallerError({text})")
    assert error.is_indirect() and not error.is_empty()


@pytest.mark.parametrize("raising", ["raise CallerError", "raise CallerError('')"])
def test_empty_error_is_found(raising: str) -> None:
    """A raise without a text is found."""
    (error,) = house.raised(raising)
    assert error.is_empty()


def test_plain_error_passes() -> None:
    """A text that says what was seen and expected passes, and other exceptions do not count."""
    source = (
        'raise CallerError(f"expected one descriptor, got {n}")\nraise ValueError\n'
    )
    (error,) = house.raised(source)
    assert not error.is_indirect() and not error.is_empty()
