"""TLS of a worker: certificate, key and authority of clients, read again when their files change.

Imports no framework.
"""

import logging
import ssl
from pathlib import Path

import grpc

from bridge_server.process.watched import WatchedFiles
from bridge_wire.errors import CallerError

_log = logging.getLogger(__name__)


class Certificates:
    """A certificate in PEM form, its key, and the authority of the clients' certificates, if any.

    With an authority the worker accepts only clients that present a certificate of it.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        """Read the files.

        Raises:
          CallerError: a file cannot be read, or certificate and key do not belong together.
        """
        self._certificate, self._key = certificate, key
        self._client_ca = client_ca
        files = [certificate, key, *filter(None, [client_ca])]
        self._watched = WatchedFiles(files)
        self._watched.have_changed()
        self._first = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that look for changed files at each handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._renewed,  # type: ignore[arg-type]  # its None is missing in the stubs
            require_client_authentication=self._client_ca is not None,
        )

    def reload(self) -> None:
        """Let the next handshake read the files again."""
        self._watched.forget()

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the content of changed files, or None to go on with the previous ones."""
        if not self._watched.have_changed():
            return None
        try:
            configuration = self._read()
        except CallerError as error:
            _log.error("the previous certificate stays in force: %s", error)
            return None
        _log.info("read the certificate %s again", self._certificate)
        return configuration

    def _read(self) -> grpc.ServerCertificateConfiguration:
        try:
            pair = self._key.read_bytes(), self._certificate.read_bytes()
            authority = self._client_ca.read_bytes() if self._client_ca else None
            self._check()
        except OSError as error:
            raise CallerError(
                f"cannot read {error.filename}: {error.strerror}"
            ) from error
        return grpc.ssl_server_certificate_configuration([pair], authority)

    def _check(self) -> None:
        """Raise CallerError for files that gRPC would refuse at each handshake."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # An encrypted key would ask for its password on the terminal.
            context.load_cert_chain(self._certificate, self._key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise CallerError(
                f"--tls-cert {self._certificate} and --tls-key {self._key} are not a certificate"
                f" and its unencrypted key in PEM form ({error})"
            ) from error
        if self._client_ca is None:
            return
        try:
            context.load_verify_locations(self._client_ca)
        except ssl.SSLError as error:
            raise CallerError(
                f"--tls-client-ca {self._client_ca} has no certificate in PEM form ({error})"
            ) from error
