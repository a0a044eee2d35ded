"""A network link on one machine: a proxy that gives connections a bandwidth and a round-trip time.

    python benchmarks/link.py --to 7465 --bandwidth 100e6 --rtt 0.02

Its first line is the loopback port that it listens on; every connection there goes on to port 7465. It ends when its
standard input closes, or by SIGTERM, and then says how many bytes it carried and what CPU time that took.

Each connection has the bandwidth (bits per second of TCP payload) to itself, in each direction separately; half of the
round-trip time is the delay of either direction. A chunk departs when the one before it has, plus its own bytes over
the bandwidth, and comes out a delay later. What is full holds the sender back: one direction holds
bandwidth × (delay + QUEUE_SECONDS) bytes, and as much as the bandwidth carries in QUEUE_SECONDS in each of the
kernel's two buffers (64 KiB at least). There are no losses, and TCP's own slow start does not see the delay.
"""

import argparse
import contextlib
import math
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue

CHUNK_SECONDS, LARGEST_CHUNK = 0.004, 2**19  # few wake-ups, and a chunk that stays in the cache until it is sent
QUEUE_SECONDS = 0.02  # also how late the proxy may wake up, on a busy machine, without the link becoming slower
LEAST_BUFFER = 2**16  # loopback's segments are as large
HOST = "127.0.0.1"
END_SECONDS = 10.0


class Direction:
    """What is read from `source` comes out of `sink`. Two threads: one takes in at the link's pace, one delivers."""

    def __init__(self, source: socket.socket, sink: socket.socket, bandwidth: float, delay: float) -> None:
        self.source, self.sink, self.delay = source, sink, delay
        self.seconds_per_byte = 8 / bandwidth
        self.chunk = max(1, min(LARGEST_CHUNK, int(bandwidth / 8 * CHUNK_SECONDS)))
        self.ring = memoryview(bytearray(self.chunk + math.ceil(bandwidth / 8 * (delay + QUEUE_SECONDS))))
        self.free = len(self.ring)  # bytes of the ring that hold nothing
        self.room = threading.Condition()
        self.closed = False
        self.under_way: SimpleQueue[tuple[float, int, int]] = SimpleQueue()  # (due, begin and end in the ring)
        self.carried = 0  # bytes

    def start(self) -> None:
        for work in (self.take_in, self.deliver):
            threading.Thread(target=work, daemon=True).start()

    def take_in(self) -> None:
        ready = select.poll()
        ready.register(self.source, select.POLLIN)
        departed, at = time.monotonic(), 0
        while self.wait_for_room():
            waited = bool(ready.poll(0))
            count = self.receive(at)
            now = time.monotonic()
            # What was there already stood behind the chunk before it, as far as waking up late explains it.
            departed = max(departed, now - QUEUE_SECONDS if waited else now) + count * self.seconds_per_byte
            self.under_way.put((departed + self.delay, at, at + count))
            if count == 0:
                return
            with self.room:
                self.free -= count
            at = (at + count) % len(self.ring)
            time.sleep(max(0.0, departed - time.monotonic()))

    def wait_for_room(self) -> bool:
        """For a chunk; False when the connection is gone."""
        with self.room:
            self.room.wait_for(lambda: self.free >= self.chunk or self.closed)
        return not self.closed

    def receive(self, at: int) -> int:
        """Bytes read into the ring; 0 at the end of the stream."""
        try:
            return self.source.recv_into(self.ring[at : at + self.chunk])
        except OSError:  # reset by its peer
            return 0

    def deliver(self) -> None:
        while True:
            due, begin, end = self.under_way.get()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                if begin == end:
                    self.sink.shutdown(socket.SHUT_WR)
                    return
                self.sink.sendall(self.ring[begin:end])
            except OSError:
                self.close()
                return
            self.carried += end - begin
            with self.room:
                self.free += end - begin
                self.room.notify()

    def close(self) -> None:
        """Nobody takes what comes out any more: the sender is told, and the other direction ends too."""
        for end in (self.source, self.sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self.room:
            self.closed = True
            self.room.notify()


def limit_buffers(connection: socket.socket, bandwidth: float) -> None:
    """The kernel's, before connecting or listening: what does not fit is the sender's to keep."""
    buffer = max(LEAST_BUFFER, int(bandwidth / 8 * QUEUE_SECONDS))
    for name in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        connection.setsockopt(socket.SOL_SOCKET, name, buffer)


def connect(port: int, bandwidth: float) -> socket.socket:
    sink = socket.socket()
    limit_buffers(sink, bandwidth)
    sink.connect((HOST, port))
    return sink


def accept(listener: socket.socket, port: int, bandwidth: float, delay: float, directions: list[Direction]) -> None:
    """Carries every connection on to `port`, for ever."""
    while True:
        client, _ = listener.accept()
        try:
            server = connect(port, bandwidth)
        except OSError:
            client.close()
            continue
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        both = [Direction(client, server, bandwidth, delay), Direction(server, client, bandwidth, delay)]
        directions += both
        for direction in both:
            direction.start()


@contextlib.contextmanager
def link(port: int, bandwidth: float, rtt: float) -> Iterator[int]:
    """A proxy in a process of its own, in front of `port`; gives its own port."""
    options = ["--to", str(port), "--bandwidth", str(bandwidth), "--rtt", str(rtt)]
    proxy = subprocess.Popen(
        [sys.executable, __file__, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert proxy.stdin is not None
    assert proxy.stdout is not None
    try:
        yield int(proxy.stdout.readline())
    finally:
        proxy.stdin.close()
        try:
            proxy.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            proxy.kill()
            proxy.wait()
        proxy.stdout.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="A link with a bandwidth and a round-trip time, on loopback.")
    parser.add_argument("--to", type=int, required=True, help="loopback port of the server")
    parser.add_argument("--bandwidth", type=float, required=True, help="bits per second, in each direction")
    parser.add_argument("--rtt", type=float, default=0.0, help="round-trip time in seconds")
    options = parser.parse_args()
    if not (0 < options.bandwidth < math.inf and 0 <= options.rtt < math.inf):
        parser.error(f"expected bandwidth > 0 and rtt >= 0, found {options.bandwidth:g} and {options.rtt:g}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    directions: list[Direction] = []
    with socket.socket() as listener:
        limit_buffers(listener, options.bandwidth)
        listener.bind((HOST, 0))
        listener.listen()
        carry = (listener, options.to, options.bandwidth, options.rtt / 2, directions)
        threading.Thread(target=accept, args=carry, daemon=True).start()
        try:
            print(listener.getsockname()[1], flush=True)
            sys.stdin.read()
        finally:
            up, down = (sum(direction.carried for direction in directions[way::2]) for way in (0, 1))
            print(f"carried {up} bytes up and {down} down in {time.process_time():.2f} s of CPU time", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
