"""Who may connect: TLS on either end of a stream, and which client a certificate or token belongs to.

A client's number is that of its certificate, a URI `urn:halfpass:client:N` or a DNS name that begins with `client-N`,
or of its token, of which the server has a digest alone. Files are read anew at each connection, so that what was
renewed is taken without a restart. Tests: tests/test_trust.py.
"""

import datetime
import hashlib
import hmac
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from cryptography import x509

from halfpass.errors import InputError

MOST_CLIENTS = 2**16
MOST_BYTES = 2**20  # of a certificate, key or file of tokens
EDGE = "urn:halfpass:edge"
BEARER = "Bearer "


def identity_of_client(client: int) -> str:
    return f"urn:halfpass:client:{client}"


@dataclass(frozen=True)
class Trust:
    """What one process shows of itself, and whom it trusts. Without any of it, connections are not encrypted."""

    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None  # a client trusts servers of it, a server clients
    tokens: Path | None = None  # a server's: digests of its clients' tokens
    token: str | None = field(default=None, repr=False)  # a client's
    name: str | None = None  # in the server's certificate, where it is reached under another

    @property
    def encrypts(self) -> bool:
        return any((self.certificate, self.key, self.authority, self.tokens, self.token))

    def check_server(self) -> None:
        """Raises InputError for what cannot be used, or lets anybody in."""
        if self.certificate is None or self.key is None:
            raise InputError("tls", "a certificate and its key", "one missing", "give both, or tls.folder")
        if self.authority is None and self.tokens is None:
            expected, remedy = "an authority of the clients, or tokens", "give one, or the server would admit anybody"
            raise InputError("tls", expected, "neither", remedy)
        _check_dates("tls.certificate", self.certificate)
        self.server_context()
        self.digests()

    def hosts(self) -> list[str]:
        """The names and addresses that a server's certificate is for."""
        return [] if self.certificate is None else _check_dates("tls.certificate", self.certificate, hosts=True)

    def check_host(self, host: str) -> None:
        """Raises InputError where clients that write the server so would refuse its certificate."""
        host, known = (self.name or host).strip("[]"), self.hosts()
        wild = f"*.{host.partition('.')[2]}"
        if host not in known and wild not in known:
            found = f"one for {', '.join(known)}"[:200] if known else "one without names"
            remedy = "make one with halfpass certs --hosts, or write the server as the certificate does"
            raise InputError(f"{self.certificate}", f"a server's certificate for {host}", found, remedy)

    def check_client(self, client: int | None, *, anybody: bool = False) -> None:
        """Raises InputError for what cannot be used; `client` is its number, None an edge's. `anybody`: whose
        certificate it is does not matter."""
        if self.authority is None:
            expected, remedy = "the authority of the server's certificate", "copy it from there: authority.pem"
            raise InputError("tls.authority", expected, "none", remedy)
        if (self.certificate is None) != (self.key is None):
            raise InputError("tls", "a certificate and its key", "one of them", "give both")
        if self.certificate is not None:
            names = _check_dates("tls.certificate", self.certificate)
            wanted = EDGE if client is None else identity_of_client(client)
            other = (EDGE not in names) if client is None else (number_of(names) != client)
            if other and not anybody:
                found = ", ".join(names) or "no name"
                raise InputError(f"{self.certificate}", f"the certificate of {wanted}", found, "take that one's")
        self.client_context()

    def server_context(self) -> ssl.SSLContext:
        """Of a server, which asks for a client's certificate where it has an authority, and needs none else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        self._load(context)
        if self.authority is not None:
            context.verify_mode = ssl.CERT_OPTIONAL if self.tokens is not None else ssl.CERT_REQUIRED
        return context

    def client_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        self._load(context)
        return context

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """A client's, for gRPC."""
        parts = (self.authority, self.key, self.certificate)
        return grpc.ssl_channel_credentials(*(None if file is None else read_small("tls", file) for file in parts))

    def metadata(self) -> list[tuple[str, str]]:
        """What a client says beside its messages."""
        return [] if self.token is None else [("authorization", f"{BEARER}{self.token}")]

    def digests(self) -> dict[str, int]:
        """Clients' numbers by the digests of their tokens; raises InputError where a line is none."""
        if self.tokens is None:
            return {}
        found: dict[str, int] = {}
        for number, line in enumerate(read_small("tls.tokens", self.tokens).decode("ascii", "replace").splitlines(), 1):
            if not line.strip():
                continue
            if not (match := re.fullmatch(r"\s*(\d{1,6})\s+([0-9a-f]{64})\s*", line)):
                expected = "lines of a client's number and the SHA-256 of its token in hex"
                remedy = "halfpass certs --tokens writes such a file"
                raise InputError(f"{self.tokens}, line {number}", expected, f"{len(line)} other characters", remedy)
            found[match[2]] = int(match[1])
        return found

    def _load(self, context: ssl.SSLContext) -> None:
        if self.certificate is not None and self.key is not None:
            for place, file in (("tls.certificate", self.certificate), ("tls.key", self.key)):
                read_small(place, file)
            try:
                context.load_cert_chain(self.certificate, self.key, password=_no_password)
            except (ssl.SSLError, ValueError):
                expected, remedy = "the key of that certificate, without a password", "copy both from their owner"
                raise InputError(f"{self.key}", expected, "something else", remedy) from None
        if self.authority is not None:
            read_small("tls.authority", self.authority)
            try:
                context.load_verify_locations(self.authority)
            except ssl.SSLError:
                expected, remedy = "certificates of authorities, in PEM", "copy authority.pem again"
                raise InputError(f"{self.authority}", expected, "something else", remedy) from None


def _no_password() -> bytes:
    raise ValueError("it is encrypted")


def read_small(place: str, file: Path) -> bytes:
    """The file's content; raises InputError, which names `place`, where it cannot be read, or is large."""
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(place, "a file that can be read", f"{file} ({error.strerror})", "check the path") from None
    if len(content) > MOST_BYTES:
        raise InputError(place, f"a file of at most {MOST_BYTES} bytes", f"{file}, which is larger", "check the path")
    return content


def _check_dates(place: str, file: Path, *, hosts: bool = False) -> list[str]:
    """The names in a certificate, or the `hosts` that it is for; raises InputError where it is none, or is not valid
    now."""
    content = read_small(place, file)
    try:
        certificate = x509.load_pem_x509_certificate(content)
        names = _hosts(certificate) if hosts else _names(certificate)
        first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except Exception:  # the library's errors of extensions and algorithms have no common base
        raise InputError(f"{file}", "a certificate in PEM", "something else", "copy it from its owner") from None
    now = datetime.datetime.now(datetime.UTC)
    if not first <= now <= last:
        found = f"one of {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M}"
        remedy = "make a new one with halfpass certs" if now > last else "set this machine's clock"
        raise InputError(f"{file}", "a certificate that is valid now", found, remedy)
    return names


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*extension.get_values_for_type(x509.UniformResourceIdentifier),
            *extension.get_values_for_type(x509.DNSName)]  # fmt: skip


def _hosts(certificate: x509.Certificate) -> list[str]:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = extension.get_values_for_type(x509.IPAddress)
    return [*extension.get_values_for_type(x509.DNSName), *map(str, addresses)]


def number_of(names: Sequence[str]) -> int | None:
    """Of the client whom a certificate with these names belongs to; None where it is no client's."""
    for name in names:
        if match := re.fullmatch(r"urn:halfpass:client:(\d{1,6})|client-(\d{1,6})(\..*)?", name):
            return int(match[1] or match[2])
    return None


def check_identity(
    place: str, client: int, names: Sequence[str], metadata: Mapping[str, str], digests: Mapping[str, int], *,
    of_edge: bool,
) -> None:  # fmt: skip
    """Raises InputError unless whoever joins as that client shows its certificate, whose names these are, or its
    token."""
    if of_edge and EDGE in names:
        return
    known = None if of_edge else number_of(names)
    if known is None:
        known = _number_of_token(place, metadata, digests)
    if known == client:
        return
    what = "an edge's certificate" if of_edge else f"the certificate or token of client {client}"
    found = f"those of client {known}" if known is not None else ", ".join(names)[:80] or "none"
    raise InputError(place, what, found, "join with the number that this certificate or token is of")


def number_shown(
    place: str, names: Sequence[str], metadata: Mapping[str, str], digests: Mapping[str, int]
) -> int | None:  # fmt: skip
    """Of whom these are the certificate's names, or the token; None where that is no client."""
    known = number_of(names)
    return _number_of_token(place, metadata, digests) if known is None else known


def check_trusted(place: str, certified: bool, metadata: Mapping[str, str], digests: Mapping[str, int]) -> None:
    """Raises InputError unless whoever asks has shown a certificate of the authority, or a token: anybody's."""
    if not certified and _number_of_token(place, metadata, digests) is None:
        expected, remedy = "a certificate of the server's authority, or a token that it knows", "give --tls.folder"
        raise InputError(place, expected, "none", remedy)


def _number_of_token(place: str, metadata: Mapping[str, str], digests: Mapping[str, int]) -> int | None:
    """Whose token is shown; None without one, where tokens are of use. Raises InputError for another."""
    said = metadata.get("authorization", "")
    if not said.startswith(BEARER) or not digests:
        return None
    digest = hashlib.sha256(said.removeprefix(BEARER).encode()).hexdigest()
    known = next((number for own, number in digests.items() if hmac.compare_digest(own, digest)), None)
    if known is None:
        raise InputError(place, "a token that the server knows", "another", "copy the token from the server")
    return known
