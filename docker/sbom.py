"""Write the packages of an image as a bill of materials in CycloneDX's form, without a network.

It has Python's packages of this interpreter and Debian's packages of the base. Two runs in one
image write the same bytes.

sbom.py FILE
"""

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

_STATUS = Path("/var/lib/dpkg/status")


def component(kind: str, name: str, version: str) -> dict[str, str]:
    url = f"pkg:{kind}/{name}@{quote(version, safe='')}"
    return {
        "type": "library",
        "bom-ref": url,
        "name": name,
        "version": version,
        "purl": url,
    }


def python_packages() -> Iterator[dict[str, str]]:
    for found in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
        yield component("pypi", name, found.version)


def debian_packages() -> Iterator[dict[str, str]]:
    if not _STATUS.exists():  # a base of another kind
        return
    for paragraph in _STATUS.read_text().split("\n\n"):
        fields = dict(re.findall(r"^(\w+): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            yield component("deb", f"debian/{fields['Package']}", fields["Version"])


components = [*python_packages(), *debian_packages()]
bill = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.5",
    "version": 1,
    "components": sorted(components, key=lambda each: each["purl"]),
}
Path(sys.argv[1]).write_text(json.dumps(bill, indent=1) + "\n")
