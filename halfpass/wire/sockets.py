"""What the kernel counted on a TCP connection of this process: payload and framing, without TCP/IP headers.

Linux only (`TCP_INFO`, linux/tcp.h); elsewhere the answer is None and reports show a dash.
"""

import socket
import struct
from pathlib import Path

# Offsets in struct tcp_info, in bytes, of the 64-bit counters used here; Linux 4.19 and later have them all.
_BYTES_RECEIVED, _BYTES_SENT, _BYTES_RETRANSMITTED = 128, 200, 208


def connection_traffic(local_port: int | None, remote_port: int) -> tuple[int, int] | None:
    """(bytes sent, bytes received) on this process's connection between the two ports, or on one to the remote port, or
    None where unknown.

    Retransmitted bytes count once.
    """
    folder = Path("/proc/self/fd")
    if not hasattr(socket, "TCP_INFO") or not folder.is_dir():
        return None
    for entry in folder.iterdir():
        try:
            found = _traffic_of(int(entry.name), local_port, remote_port)
        except OSError:  # not a socket, not connected, or closed meanwhile
            continue
        if found is not None:
            return found
    return None


def _traffic_of(descriptor: int, local_port: int | None, remote_port: int) -> tuple[int, int] | None:
    connection = socket.socket(fileno=descriptor)
    try:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        if connection.getpeername()[1] != remote_port or local_port not in (None, connection.getsockname()[1]):
            return None
        return traffic_of(connection)
    finally:
        connection.detach()  # the descriptor belongs to gRPC


def traffic_of(connection: socket.socket) -> tuple[int, int] | None:
    """(bytes sent, bytes received) on a connection, or None where unknown. Retransmitted bytes count once."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(info) < _BYTES_RETRANSMITTED + 8:
        return None
    received, sent, retransmitted = (
        struct.unpack_from("=Q", info, at)[0] for at in (_BYTES_RECEIVED, _BYTES_SENT, _BYTES_RETRANSMITTED)
    )
    return sent - retransmitted, received
