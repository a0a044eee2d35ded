"""`halfpass certs`: a small private authority, and a certificate each for the server and the clients of a trial.

Tests: tests/test_trust.py.
"""

import datetime
import hashlib
import ipaddress
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from halfpass.errors import InputError
from halfpass.files import replacing, write_new
from halfpass.wire.trust import EDGE, MOST_CLIENTS, Trust, identity_of_client

AUTHORITY, SERVER, TOKENS = "authority", "server", "tokens"
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # of every server, for a rehearsal on one machine
AUTHORITY_LIFE = datetime.timedelta(days=3650)
BEFORE = datetime.timedelta(minutes=5)  # clocks differ a little


@dataclass(frozen=True)
class _Pair:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_certificates(
    folder: Path, *, clients: int, hosts: Sequence[str] = (), edge: bool = False, days: int = 90, tokens: bool = False,
) -> list[Path]:  # fmt: skip
    """Writes `authority.pem`, and NAME.pem with NAME-key.pem for `server` and `client-0` … ; returns the new files.

    `hosts` are the names and addresses under which clients reach the server, besides loopback. With `edge` there is a
    pair for an edge too, which is a server to its clients and a client to the server above. With `tokens` clients get
    a random token each instead of a certificate, and the server their digests. What is there already stays, so that a
    client can be added later: remove what is to be made anew. Raises InputError where the authority is no use.
    """
    if not 1 <= clients <= MOST_CLIENTS:
        raise InputError("--clients", f"1 to {MOST_CLIENTS} clients", str(clients), "correct it")
    if not 1 <= days <= 3650:
        raise InputError("--days", "1 to 3650 days", str(days), "90 is usual")
    names = [_name(host) for host in dict.fromkeys((*LOOPBACK, *hosts))]
    life = datetime.timedelta(days=days)
    authority, files = _authority(folder)

    def add(name: str, subject: str, alternatives: Sequence[x509.GeneralName]) -> None:
        if not (folder / f"{name}.pem").exists():
            files.update(_pem(name, _issue(authority, subject, alternatives, life)))

    if hosts and (folder / f"{SERVER}.pem").exists():
        _check_names(folder / f"{SERVER}.pem", names)
    add(SERVER, "halfpass server", names)
    if edge:
        add("edge", "halfpass edge", [*names, x509.UniformResourceIdentifier(EDGE)])
    new: dict[int, str] = {}
    for client in range(clients):
        name = f"client-{client}"
        if not tokens:
            add(name, f"halfpass client {client}", [x509.UniformResourceIdentifier(identity_of_client(client))])
        elif not (folder / f"{name}.token").exists():
            new[client] = secrets.token_urlsafe(32)
            files[f"{name}.token"] = f"{new[client]}\n".encode()
    written = write_new(folder, files)
    if new:
        known = Trust(tokens=folder / TOKENS).digests() if (folder / TOKENS).exists() else {}
        lines = [(number, digest) for digest, number in known.items() if number not in new]
        lines += [(number, hashlib.sha256(token.encode()).hexdigest()) for number, token in new.items()]
        with replacing(folder / TOKENS) as partial:
            partial.write_text("".join(f"{number} {digest}\n" for number, digest in sorted(lines)))
            partial.chmod(0o600)
        written.append(folder / TOKENS)
    return written


def _check_names(file: Path, names: Sequence[x509.GeneralName]) -> None:
    """Raises InputError where a certificate that is there already has not these names."""
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        there = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except Exception:  # of a file that is no certificate, or has no names: they lack
        there = []
    if lacking := [str(name.value) for name in names if name not in there]:
        remedy = "remove it and its key, and run this again"
        raise InputError(f"{file}", f"a server's certificate for {lacking[0]}", "one without it", remedy)


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        if not re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*", host):
            raise ValueError
        return x509.DNSName(host)
    except ValueError:
        remedy = "give it as clients will write it, without a port"
        raise InputError("--hosts", "names or addresses of the server", repr(host), remedy) from None


def _authority(folder: Path) -> tuple[_Pair, dict[str, bytes]]:
    """The folder's own, or a new one with what is to be written of it."""
    certificate_file, key_file = folder / f"{AUTHORITY}.pem", folder / f"{AUTHORITY}-key.pem"
    if certificate_file.exists() or key_file.exists():
        try:
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
            key = serialization.load_pem_private_key(key_file.read_bytes(), None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            assert key.public_key() == certificate.public_key()
        except Exception as error:  # the library's errors have no common base
            found = f"files that are none ({error.strerror})" if isinstance(error, OSError) else "others"
            remedy = "choose another folder, or bring back both files"
            raise InputError(f"{certificate_file}", "an authority with its key beside it", found, remedy) from None
        if (end := certificate.not_valid_after_utc) <= datetime.datetime.now(datetime.UTC):
            remedy = "choose another folder, and give everybody new files"
            raise InputError(f"{certificate_file}", "an authority that is valid", f"one until {end:%Y-%m-%d}", remedy)
        return _Pair(certificate, key), {}
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject("halfpass authority")
    usage = _usage(digital_signature=False, key_cert_sign=True, crl_sign=True)
    end = datetime.datetime.now(datetime.UTC) + AUTHORITY_LIFE
    builder = _builder(name, name, key, end).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    builder = builder.add_extension(usage, True)
    made = _Pair(builder.sign(key, hashes.SHA256()), key)
    return made, _pem(AUTHORITY, made)


def _issue(authority: _Pair, subject: str, names: Sequence[x509.GeneralName], life: datetime.timedelta) -> _Pair:
    """P-256: gRPC takes no Ed25519 or P-521 certificates. Both uses are named, for an edge has both."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate.subject
    uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    end = min(datetime.datetime.now(datetime.UTC) + life, authority.certificate.not_valid_after_utc)
    builder = _builder(_subject(subject), issuer, key, end)
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True), (_usage(), True), (uses, False), (above, False),
        (x509.SubjectAlternativeName(names), False),
    ):  # fmt: skip
        builder = builder.add_extension(extension, critical)  # type: ignore[arg-type]
    return _Pair(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, end: datetime.datetime
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - BEFORE).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)


def _subject(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, digital_signature: bool = True, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=key_cert_sign, crl_sign=crl_sign, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _pem(name: str, pair: _Pair) -> dict[str, bytes]:
    key = pair.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {f"{name}.pem": pair.certificate.public_bytes(serialization.Encoding.PEM), f"{name}-key.pem": key}
