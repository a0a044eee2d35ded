"""Whose certificate and token a process shows: from settings to `Trust`. Tests: tests/test_trust.py."""

import os
from functools import partial
from pathlib import Path

from halfpass.config import TlsConfig
from halfpass.errors import InputError
from halfpass.wire.trust import Trust, read_small

SERVER, EDGE = "server", "edge"
TOKEN = "HALFPASS_TOKEN"  # an environment variable


def trust_of(tls: TlsConfig, role: str) -> Trust | None:
    """Of a process that is the `server`, the `edge` or a `client-N`, checked; None where no connection is encrypted.
    Raises InputError for what cannot be used."""
    folder, chosen = _folder(tls), partial(_chosen, tls)
    certificate, key = chosen(tls.certificate, f"{role}.pem"), chosen(tls.key, f"{role}-key.pem")
    authority, listens = chosen(tls.authority, "authority.pem"), role in (SERVER, EDGE)
    tokens = chosen(tls.tokens, "tokens") if listens else None
    token = None if listens else _token(chosen(tls.token, f"{role}.token"))
    trust = Trust(certificate, key, authority, tokens, token, tls.server_name)
    if not trust.encrypts and folder is None and tls.server_name is None:
        return None
    if listens:
        trust.check_server()
    else:
        if certificate is None and token is None:
            remedy = f"copy {role}.pem and {role}-key.pem, or {role}.token, there"
            remedy = remedy if folder else "give --tls.folder, or --tls.certificate and --tls.key, or --tls.token"
            raise InputError("tls", f"a certificate or token of {role}", _none(folder), remedy)
        trust.check_client(int(role.removeprefix("client-")))
    if role == EDGE:
        trust.check_client(None)
    return trust


def trust_to_ask(tls: TlsConfig) -> Trust | None:
    """Of whoever asks a server how far it is: with the first client's certificate or token in the folder, or else the
    edge's or the server's. None where no connection is encrypted. Raises InputError for what cannot be used."""
    folder, chosen = _folder(tls), partial(_chosen, tls)
    there = [] if folder is None else sorted(folder.glob("client-*[0-9].pem")) + sorted(folder.glob("client-*.token"))
    there += [] if folder is None else folder.glob("edge.pem")
    role = there[0].stem if there else SERVER
    certificate, key = chosen(tls.certificate, f"{role}.pem"), chosen(tls.key, f"{role}-key.pem")
    authority, token = chosen(tls.authority, "authority.pem"), _token(chosen(tls.token, f"{role}.token"))
    trust = Trust(certificate, key, authority, None, token, tls.server_name)
    if not trust.encrypts and folder is None and tls.server_name is None:
        return None
    if certificate is None and token is None:
        remedy = "take a client's, or the server's" if folder else "give --tls.folder, a client's or the server's"
        raise InputError("tls", "a certificate or token", _none(folder), remedy)
    trust.check_client(None, anybody=True)
    return trust


def _none(folder: Path | None) -> str:
    return "none" if folder is None else f"none in {folder}"


def _folder(tls: TlsConfig) -> Path | None:
    folder = None if tls.folder is None else Path(tls.folder)
    if folder is not None and not folder.is_dir():
        raise InputError("tls.folder", "a folder of halfpass certs", f"none at {folder}", "check the path")
    return folder


def _chosen(tls: TlsConfig, given: str | None, name: str) -> Path | None:
    """A file that is given, or the one of that name in the folder."""
    if given is not None:
        return Path(given)
    file = None if tls.folder is None else Path(tls.folder) / name
    return file if file is not None and file.exists() else None


def _token(file: Path | None) -> str | None:
    """From its file, or the environment. Nothing of it is ever printed."""
    if file is None:
        said = os.environ.get(TOKEN, "").strip()
        place = f"the environment variable {TOKEN}"
    else:
        place = str(file)
        said = read_small("tls.token", file).decode("ascii", "replace").strip()
        if not said:
            raise InputError(place, "a token", "nothing", "copy it from the server")
    if not said:
        return None
    if not said.isprintable() or " " in said or len(said) < 16:
        expected = "a token of at least 16 letters and digits, without blanks"
        raise InputError(place, expected, f"{len(said)} characters", "halfpass certs --tokens makes such ones")
    return said
