#!/usr/bin/env python3
"""Generator of bridge_wire/pb from proto/bridge/v1/bridge.proto; --check compares the files only.

`pyproject.toml` pins the generator, grpcio-tools, in the extra `dev`. Generated code needs its
generator's version or a newer one, so the pin is also the minimum version of the project's grpcio
and protobuf.

    tools/generate_proto.py [--check]
"""

import argparse
import sys
import tempfile
import tomllib
from importlib import metadata, resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "proto" / "bridge" / "v1"
PACKAGE = "bridge_wire/pb"
WRITTEN_BY_HAND = {"__init__.py", "py.typed"}


def pinned_version() -> str:
    """Return the version of grpcio-tools that the extra `dev` pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = "grpcio-tools=="
    requirements: list[str] = project["optional-dependencies"]["dev"]
    return next(
        line.removeprefix(name) for line in requirements if line.startswith(name)
    )


def require_pinned_generator() -> None:
    """Exit unless the pinned generator is installed, since other versions generate other code."""
    pinned = pinned_version()
    try:
        installed = metadata.version("grpcio-tools")
    except metadata.PackageNotFoundError:
        installed = "not installed"
    if installed != pinned:
        sys.exit(
            f"grpcio-tools is {installed}, but the code is generated with {pinned}; run `make"
            " proto`"
        )


def generate() -> dict[str, bytes]:
    """Return the generated files by name.

    protoc gets the source's folder under the package's path, so that the generated files import
    each other as `bridge_wire.pb` without a patch.
    """
    from grpc_tools import protoc  # after the check for a missing generator

    with tempfile.TemporaryDirectory() as folder:
        status = protoc.main(
            [
                "protoc",
                f"-I{PACKAGE}={SOURCE}",
                f"-I{resources.files('grpc_tools') / '_proto'}",
                f"--python_out={folder}",
                f"--pyi_out={folder}",
                f"--grpc_python_out={folder}",
                f"{PACKAGE}/bridge.proto",
            ]
        )
        if status != 0:
            sys.exit(
                f"protoc failed on {SOURCE / 'bridge.proto'} (exit status {status})"
            )
        return {
            path.name: path.read_bytes() for path in Path(folder, PACKAGE).iterdir()
        }


def checked_in() -> dict[str, bytes]:
    """Return the package's files by name, without the handwritten files."""
    files = [path for path in (ROOT / PACKAGE).glob("*") if path.is_file()]
    return {
        path.name: path.read_bytes()
        for path in files
        if path.name not in WRITTEN_BY_HAND
    }


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """Return one line for each file that is missing, superfluous or not byte-equal."""
    wrong = {
        **{name: "is missing" for name in expected.keys() - found.keys()},
        **{
            name: "is not generated from the source"
            for name in found.keys() - expected.keys()
        },
        **{
            name: f"differs ({len(found[name])} bytes, {len(expected[name])} expected)"
            for name in expected.keys() & found.keys()
            if found[name] != expected[name]
        },
    }
    return [f"{PACKAGE}/{name} {what}" for name, what in sorted(wrong.items())]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Generate bridge_wire/pb from the .proto file."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a file differs"
    )
    options = parser.parse_args()
    require_pinned_generator()
    expected = generate()
    if options.check:
        wrong = differences(expected, checked_in())
        if wrong:
            print(
                "\n".join([*wrong, "Run `make proto` and commit the result."]),
                file=sys.stderr,
            )
        return 1 if wrong else 0
    for name, content in expected.items():
        (ROOT / PACKAGE).mkdir(parents=True, exist_ok=True)
        (ROOT / PACKAGE / name).write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
