"""The command `bridge_client`: looks at a worker from the client's side."""

import argparse
import sys
from collections.abc import Sequence
from os import environ
from pathlib import Path

from bridge_client.connecting import connect
from bridge_client.link import Tls
from bridge_client.session import Session
from bridge_wire import __version__
from bridge_wire.errors import BridgeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 on failure; 2, by argparse, on misuse."""
    parser = argparse.ArgumentParser("bridge_client", description="Look at a bridge worker.")
    parser.add_argument("--version", action="version", version=f"bridge_client {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    describe = commands.add_parser("describe", help="show a worker's models, and how its tensors would travel")
    describe.add_argument("address", help="unix:PATH or HOST:PORT")
    describe.add_argument(
        "--token", help="for a worker with --token-file (BRIDGE_TOKEN)", default=environ.get("BRIDGE_TOKEN")
    )
    describe.add_argument("--tls-ca", metavar="PEM", help="use TLS, and trust this authority", type=Path)
    options = parser.parse_args(argv)
    try:
        tls = Tls(options.tls_ca.read_bytes()) if options.tls_ca else None
        with connect(options.address, token=options.token, tls=tls) as session:
            print(_description(session))
    except (BridgeError, OSError) as error:
        print(f"bridge_client: {error}", file=sys.stderr)
        return 1
    return 0


def _description(session: Session) -> str:
    lines = [f"lane={session.lane} memory={session.memory} x64={session.x64}"]
    for model in session.models.values():
        lines.append(f"{model.name}({', '.join(model.arguments)})")
        lines += [f"  {'parameter' if p.trainable else 'buffer'} {p.path}: {p.spec}" for p in model.parameters]
    return "\n".join(lines)
