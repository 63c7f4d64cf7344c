"""Write one file EXTRA.txt for each extra of a pyproject.toml, with a requirement per line.

Each file also has the project's own requirements. docker/Dockerfile runs this.

requirements.py PYPROJECT FOLDER
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
folder = Path(sys.argv[2])
folder.mkdir(exist_ok=True)
for extra, requirements in project["optional-dependencies"].items():
    lines = sorted({*project["dependencies"], *requirements})
    (folder / f"{extra}.txt").write_text("\n".join(lines) + "\n")
