"""PEP 723 headers of models' files: their dependencies and Python version. Runs no file."""

import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bridge_wire.errors import CallerError

# The expression of PEP 723, for blocks of type `script` only.
_BLOCK = re.compile(
    r"^# /// script\s*\n(?P<content>(?:^#(?:| .*)\n)+?)^# ///\s*$", re.MULTILINE
)
_READ = {"dependencies", "requires-python"}


@dataclass(frozen=True, slots=True)
class Header:
    """The requirements of a file, and its Python versions, such as ">=3.12"; empty is any."""

    dependencies: tuple[str, ...]
    requires_python: str = ""


def headers_of(
    targets: Iterable[str], cwd: str | os.PathLike[str] | None
) -> list[Header]:
    """Return the headers of the files that targets name, relative to a directory.

    Targets that are modules have none. A missing file has none: the worker tells that error.

    Raises:
      CallerError: a header is malformed, or has settings that are not supported.
    """
    paths = dict.fromkeys(_paths(targets, Path(cwd or "")))
    found = (_header(path) for path in paths)
    return [header for header in found if header is not None]


def _paths(targets: Iterable[str], folder: Path) -> Iterator[Path]:
    for target in targets:
        name, equals, rest = target.partition("=")
        place = rest if equals and "/" not in name else target
        source = place.rpartition(":")[0]
        path = folder / os.path.expanduser(source)
        if source.endswith(".py") and path.is_file():
            yield path


def _header(path: Path) -> Header | None:
    text = path.read_text("utf-8-sig", errors="replace").replace("\r\n", "\n")
    blocks = [match["content"] for match in _BLOCK.finditer(f"{text}\n")]
    if not blocks:
        return None
    if len(blocks) > 1:
        raise CallerError(
            f"{path} has {len(blocks)} `# /// script` headers; expected one"
        )
    lines = (line[2:] for line in blocks[0].splitlines())
    try:
        return _checked(tomllib.loads("\n".join(lines)))
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise CallerError(
            f"the `# /// script` header of {path} is malformed: {error}"
        ) from error


def _checked(table: dict[str, object]) -> Header:
    unknown = sorted(table.keys() - _READ)
    if unknown:
        raise ValueError(
            f"it has {', '.join(unknown)}, but only dependencies and requires-python are read;"
            " set uv's variables, such as UV_INDEX_URL, in place of [tool.uv]"
        )
    dependencies = table.get("dependencies", [])
    versions = table.get("requires-python", "")
    if not isinstance(dependencies, list) or not isinstance(versions, str):
        raise ValueError("expected a list of dependencies, and a text requires-python")
    return Header(tuple(map(str, dependencies)), versions)
