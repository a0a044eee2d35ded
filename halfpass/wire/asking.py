"""How far a server's run is, asked by somebody who does not take part. Tests: tests/test_operating.py."""

import grpc

from halfpass.errors import InputError, RunError, printable
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.connection import channel_to
from halfpass.wire.reach import reach
from halfpass.wire.service import SERVICE, STATUS, check_address
from halfpass.wire.trust import Trust

REACH_SECONDS, ANSWER_SECONDS = 1.0, 5.0
MOST_BYTES, MOST_CLIENTS = 2**20, 1000  # of a reply


def ask_status(address: str, trust: Trust | None = None, *, insecure: bool = False) -> pb.StatusReply:
    """Raises InputError where there is no such server, or it does not trust whoever asks; RunError where it does not
    answer."""
    place = f"server at {address}"
    check_address(address, "server address", encrypted=trust is not None, insecure=insecure)
    reach(address, trust, REACH_SECONDS)  # which says what is wrong, where gRPC would not
    with channel_to(address, trust, MOST_BYTES) as channel:
        ask = channel.unary_unary(
            f"/{SERVICE}/{STATUS}", request_serializer=pb.StatusRequest.SerializeToString,
            response_deserializer=pb.StatusReply.FromString,
        )  # fmt: skip
        metadata = [] if trust is None else trust.metadata()
        try:
            reply: pb.StatusReply = ask(pb.StatusRequest(), timeout=ANSWER_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            code, said = error.code(), printable(str(error.details()))
            if code is grpc.StatusCode.PERMISSION_DENIED:
                raise InputError(place, "leave to ask", said, "show what a client of the run would") from None
            if code is grpc.StatusCode.UNIMPLEMENTED:
                expected, found = "a halfpass server that says how far it is", "one that does not"
                raise InputError(place, expected, found, "give the address of one") from None
            expected, found = f"an answer within {ANSWER_SECONDS:g} s", f"{code.name.lower()}: {said}"
            raise RunError(place, expected, found, "look at what it printed") from None
        check_reply(place, reply)
        return reply


def check_reply(place: str, reply: pb.StatusReply) -> None:
    """Raises InputError where it tells of so many clients that they would take minutes to show."""
    if len(reply.clients) > MOST_CLIENTS:
        found, remedy = str(len(reply.clients)), "look at what it is"
        raise InputError(place, f"a reply of at most {MOST_CLIENTS} clients", found, remedy)
