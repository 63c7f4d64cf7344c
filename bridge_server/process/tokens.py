"""Tokens that admit clients: their file, their rights, and the command `bridge_server token`.

Imports no framework.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bridge_server.process.watched import WatchedFiles
from bridge_wire.commands import Parser
from bridge_wire.errors import CallerError, Unauthenticated

_log = logging.getLogger(__name__)

_OK, _USAGE = 0, 2
_NAME = re.compile(r"[\w.@-]{1,64}")
_HASH = "sha256:"
_TOKEN_BYTES = 32
_SHORT = 16
_OTHERS = 0o007
_OF_NAMED = (" sha", " models=", " expires=")
_FORM = "NAME sha256:HEX [models=a,b] [expires=2027-01-01]"


@dataclass(frozen=True, slots=True)
class Grant:
    """The rights of one token: its models, or None for all, and the time of its expiry."""

    name: str
    digest: bytes = b""
    models: frozenset[str] | None = None
    expires: datetime | None = None

    def admits(self, model: str) -> bool:
        """Whether a client with the token may use a model."""
        return self.models is None or model in self.models

    def has_expired(self) -> bool:
        return self.expires is not None and self.expires <= datetime.now(UTC)


# The rights of each client of a worker without tokens.
ANYONE = Grant("anyone")


class Tokens:
    """The tokens of a worker. Thread-safe."""

    def __init__(self, file: Path | None = None, token: str = "") -> None:
        """Read the tokens of a file, or take one token; with neither, every client is admitted.

        Raises:
          CallerError: the file cannot be read, is malformed or empty.
        """
        self._file = file
        self._watched = WatchedFiles([file] if file else [])
        self._lock = threading.Lock()
        self._grants: Sequence[Grant] = ()
        if file is not None:
            self._watched.have_changed()
            self._grants = _read(file)
            if not self._grants:
                raise CallerError(
                    f"the token file {file} is empty; write a token to it, or leave --token-file"
                    " out"
                )
        elif token:
            self._grants = [_plain(token, "BRIDGE_TOKEN")]
        self.are_required = bool(self._grants)

    def admit(self, token: str) -> Grant:
        """Return the rights of a token that a client presents.

        Raises:
          Unauthenticated: the token is missing, unknown or expired.
        """
        if not self.are_required:
            return ANYONE
        if self._file is not None:
            self._refresh(self._file)
        if not token:
            raise Unauthenticated(
                "the call carries no token; pass token= or token_file="
            )
        grant = self._find(token)
        if grant is None:
            raise Unauthenticated(
                "the token is unknown to the worker; pass another token= or token_file="
            )
        if grant.has_expired():
            raise Unauthenticated(
                f"the token {grant.name!r} has expired; pass another token= or token_file="
            )
        return grant

    def reload(self) -> None:
        """Read the file again, whether it has changed or not."""
        if self._file is not None:
            self._watched.forget()
            self._refresh(self._file)

    def _find(self, token: str) -> Grant | None:
        """Return the grant of a token, in a time that does not depend on the token."""
        digest = _digest(token)
        found = None
        for grant in self._grants:
            if hmac.compare_digest(grant.digest, digest):
                found = grant
        return found

    def _refresh(self, file: Path) -> None:
        """Read a file that has changed; keep the previous tokens if it is malformed."""
        with self._lock:
            if not self._watched.have_changed():
                return
            try:
                self._grants = _read(file)
            except CallerError as error:
                _log.error("the previous tokens stay in force: %s", error)
                return
            _log.info("read %d tokens from %s", len(self._grants), file)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def _plain(token: str, name: str) -> Grant:
    # gRPC carries nothing else in a header.
    if not (token.isascii() and token.isprintable()):
        raise CallerError(
            "a token consists of printable ASCII characters, such as `openssl rand -hex 32`"
            f" prints; a file of several tokens has lines {_FORM}"
        )
    return Grant(name, _digest(token))


def _read(file: Path) -> Sequence[Grant]:
    """Return the grants of a file with one plain token, or with lines of named hashes."""
    try:
        text = file.read_text(errors="replace").strip()
    except OSError as error:
        raise CallerError(f"cannot read {file}: {error.strerror}") from error
    lines = [
        (number, line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.startswith("#")
    ]
    if not any(_HASH in line for _, line in lines):
        if any(word in text for word in _OF_NAMED):  # a hash is cut off, or misspelt
            raise CallerError(
                f"the token file {file} has neither one token nor complete named ones; expected"
                f" {_FORM}"
            )
        return [_plain(text, "token")] if lines else []
    grants: dict[str, Grant] = {}
    for number, line in lines:
        try:
            grant = _parsed(line)
        except ValueError as error:
            raise CallerError(
                f"the token file {file} has a malformed line {number} ({error}); expected {_FORM}"
            ) from None
        if grant.name in grants:
            raise CallerError(
                f"the token file {file} names {grant.name!r} twice; choose another name"
            )
        grants[grant.name] = grant
    return list(grants.values())


def _parsed(line: str) -> Grant:
    """Return the grant of a line.

    Raises:
      ValueError: the line is malformed.
    """
    name, _, rest = line.partition(" ")
    hashed, *options = rest.split()
    if not _NAME.fullmatch(name):
        raise ValueError("the name has other characters than letters, digits, _ . @ -")
    digest = bytes.fromhex(hashed.removeprefix(_HASH))
    if not hashed.startswith(_HASH) or len(digest) != hashlib.sha256().digest_size:
        raise ValueError("the second word is not a SHA-256 hash in hexadecimal digits")
    rights = dict(option.split("=", 1) for option in options)
    return Grant(name, digest, *_rights(rights))


def _rights(
    rights: Mapping[str, str],
) -> tuple[frozenset[str] | None, datetime | None]:
    """Return the models and the expiry of a grant."""
    if unknown := rights.keys() - {"models", "expires"}:
        raise ValueError(f"{min(unknown)!r} is neither models= nor expires=")
    models = rights.get("models")
    names = None if models is None else frozenset(filter(None, models.split(",")))
    if names == frozenset():
        raise ValueError("models= names no model")
    expires = rights.get("expires")
    return names, None if expires is None else _time(expires)


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def weaknesses(file: Path | None, token: str) -> Iterator[str]:
    """Yield a sentence for each way in which others could learn or guess a plain token."""
    name, plain = "BRIDGE_TOKEN", token
    if file is not None:
        text = file.read_text(errors="replace").strip()
        name, plain = f"the token file {file}", "" if _HASH in text else text
        mode = stat.S_IMODE(file.stat().st_mode)
        if plain and mode & _OTHERS:
            yield f"{name} has mode {mode:04o}, so that every user can read it; run chmod 600"
    if 0 < len(plain) < _SHORT:
        yield (
            f"the token in {name} has {len(plain)} characters, and could be guessed; `bridge_server"
            " token` makes a long one"
        )


# The command --------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Run `bridge_server token`: add a new token's line to a file, and print the token.

    Returns the exit status.
    """
    options = _parser().parse_args(argv)
    words = [f"models={options.models}"] if options.models else []
    words += [f"expires={options.expires}"] if options.expires else []
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    line = " ".join([options.name, f"{_HASH}{_digest(token).hex()}", *words])
    try:
        _add(options.file, line)
    except CallerError as error:
        print(f"bridge_server: {error}", file=sys.stderr)
        return _USAGE
    print(token)
    return _OK


def _parser() -> Parser:
    parser = Parser(
        "bridge_server token",
        description=(
            "Print a new token for a client, and add its name and hash to a file for --token-file."
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="shown in the audit log")
    add("file", metavar="FILE", type=Path, help="of mode 0600 if it is new")
    add("--models", metavar="NAME,...", help="the models it admits to; default: all")
    add("--expires", metavar="DATE", help="such as 2027-01-01, UTC; default: never")
    return parser


def _add(file: Path, line: str) -> None:
    """Add a line to a file of hashed tokens; create the file if it does not exist."""
    try:
        grant = _parsed(line)
    except ValueError as error:
        raise CallerError(f"no line of a token file: {error}") from None
    known = _read(file) if file.exists() else []
    if any(other.name == "token" for other in known) and _HASH not in file.read_text():
        raise CallerError(
            f"{file} has one plain token; name another file for hashed tokens"
        )
    if any(other.name == grant.name for other in known):
        raise CallerError(
            f"{file} names {grant.name!r} already; remove its line, or choose another name"
        )
    try:
        with open(file, "a+", opener=_private) as lines:
            lines.seek(0)
            text = lines.read()
            lines.write(
                f"{line}\n" if text.endswith("\n") or not text else f"\n{line}\n"
            )
    except OSError as error:
        raise CallerError(f"cannot write {file}: {error.strerror}") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
