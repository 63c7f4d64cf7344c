"""The programs and outputs that the documentation's pages show."""

import re
from pathlib import Path

_PROGRAM = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OUTPUT = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def save_programs(page: Path, folder: Path) -> None:
    """Write the page's Python programs, each of which begins with its file's name, into a
    folder."""
    for name, text in _PROGRAM.findall(page.read_text()):
        (folder / name).write_text(text)


def shown_after(page: Path, name: str) -> str:
    """Return the output that a page shows after the program of this name."""
    program = f"```python\n# {name}\n"
    after = page.read_text().split(program)[1].split("```\n", 1)[1]
    output = _OUTPUT.search(after)
    assert output, f"{page.name} shows no output after {name}"
    return output[1]
