"""A wheel of the running bridge, for environments of workers: no package index may have it."""

import functools
import hashlib
import io
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import bridge_wire
from bridge_wire import __version__
from bridge_wire.errors import CallerError

_PROJECT = "torch-jax-bridge"
_NAME = f"torch_jax_bridge-{__version__}"
_PACKAGES = ("bridge_wire", "bridge_server", "bridge_client")
_OLDEST = (1980, 1, 1, 0, 0, 0)  # equal files make equal wheels


class Wheel(NamedTuple):
    """The file's name, its content, and the content's SHA-256 in hex."""

    name: str
    content: bytes
    digest: str


@functools.cache
def own_wheel() -> Wheel:
    """Return a wheel with the packages as they lie on this process's disk.

    Raises:
      CallerError: the bridge is not installed here, so that its requirements are unknown.
    """
    files = dict(_sources())
    info = f"{_NAME}.dist-info"
    files[f"{info}/METADATA"] = _metadata().encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: bridge\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in files).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _OLDEST)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    return Wheel(f"{_NAME}-py3-none-any.whl", content, digest)


def _sources() -> list[tuple[str, bytes]]:
    folder = Path(bridge_wire.__file__).parent.parent
    return [
        (str(path.relative_to(folder)), path.read_bytes())
        for package in _PACKAGES
        for path in sorted((folder / package).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]


def _metadata() -> str:
    try:
        ours = metadata.distribution(_PROJECT).metadata
    except metadata.PackageNotFoundError as error:
        raise CallerError(
            "the requirements of torch-jax-bridge are unknown, since it is not installed here:"
            " install it with pip, or pass python= an interpreter that has it"
        ) from error
    required = ours.get_all("Requires-Dist") or []
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {_PROJECT}",
        f"Version: {__version__}",
        f"Requires-Python: {ours['Requires-Python']}",
        *(f"Requires-Dist: {each}" for each in required if "extra ==" not in each),
    ]
    return "\n".join(lines) + "\n"
