"""Whether a run between processes survives everything: killed servers and clients, connections cut and frozen.

    python benchmarks/chaos.py --out results/chaos.json     half an hour on two cores
    python benchmarks/chaos.py --faults 2 --method decoupled --clients 1

For each method and number of clients a run is trained undisturbed, and once more while at random, seeded moments the
server is killed (SIGKILL) and gone on with by `halfpass resume`, a client likewise, and a client's connection is cut or
frozen, `--faults` times each. The bars: both sides end with the same weights, bit for bit, and the server's ledger has
each batch exactly once. `seconds_lost_per_fault` is what the faults cost: most of it is Python starting again.

Exit status: 1 where a run did not end, or not so.
"""

import argparse
import contextlib
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from halfpass.files import write_json
from halfpass.run.records import LEDGER, command_line, environment

HOST = "127.0.0.1"
HALFPASS = [sys.executable, "-m", "halfpass"]
TIMEOUT = 3.0  # wire.timeout of the runs: silence of that long is a lost connection
START_SECONDS, END_SECONDS = 120.0, 1200.0
Row = dict[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Wire:
    """A loopback port whose connections go on to another, until they are cut; frozen, nothing comes through."""

    def __init__(self, to: int) -> None:
        self._to, self._open = to, list[socket.socket]()
        self._flows, self._lock = threading.Event(), threading.Lock()
        self._flows.set()
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._flows.wait()
            try:
                far = socket.create_connection((HOST, self._to), timeout=5)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._open += [near, far]
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := source.recv(2**16):
                self._flows.wait()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Every connection is reset, in both directions."""
        with self._lock:
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
                    end.close()
            self._open.clear()

    def freeze(self, seconds: float) -> None:
        self._flows.clear()
        time.sleep(seconds)
        self._flows.set()

    def close(self) -> None:
        self._listener.close()
        self.cut()


class Run:
    """A server and its clients, each a process with a folder of its own; every client has a wire of its own."""

    def __init__(self, folder: Path, settings: Sequence[str], clients: int) -> None:
        self.folder, self.settings, self.clients = folder, list(settings), clients
        folder.mkdir(parents=True)
        with socket.create_server((HOST, 0)) as free:
            self.port = int(free.getsockname()[1])
        self.wires = [Wire(self.port) for _ in range(clients)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Run":
        self._start("server", ["serve", "--bind", f"{HOST}:{self.port}", "--out", "server", *self.settings])
        self.wait_for_port()
        for k, wire in enumerate(self.wires):
            address = f"{HOST}:{wire.port}"
            self._start(f"client-{k}", ["join", address, "--client", str(k), "--out", f"site-{k}", *self.settings])
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        for wire in self.wires:
            wire.close()

    def _start(self, name: str, words: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen([*HALFPASS, *words], cwd=self.folder, stdout=log, stderr=log)

    def wait_for_port(self) -> None:
        """Until the server listens."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.processes["server"].poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
                return
            time.sleep(0.05)
        raise SystemExit(f"the server does not listen; see {self.folder}/server.log")

    def kill(self, name: str) -> bool:
        """Kills one, and has it gone on with; False where it has ended."""
        process = self.processes[name]
        if process.poll() is not None:
            return False
        process.send_signal(signal.SIGKILL)
        process.wait()
        self._start(name, ["resume", "server" if name == "server" else name.replace("client", "site")])
        return True

    def learned(self) -> int:
        """Bytes of the ledger: that the run goes on."""
        file = self.folder / "server" / LEDGER
        return file.stat().st_size if file.is_file() else 0

    def wait_for_progress(self, deadline: float) -> None:
        """Until the ledger has grown: what was disturbed goes on."""
        before = self.learned()
        while self.learned() <= before and not self.ended and time.monotonic() < deadline:
            time.sleep(0.02)

    @property
    def ended(self) -> bool:
        return (self.folder / "server" / "result.json").is_file()

    def wait(self) -> None:
        """Until all have ended well."""
        deadline = time.monotonic() + END_SECONDS
        for name, process in self.processes.items():
            try:
                status = process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise SystemExit(f"{name} did not end; see {self.folder}/{name}.log") from None
            if status:
                last = (self.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()[-3:]
                raise SystemExit(f"{name} ended with {status}: {' | '.join(last)}")

    def weights(self) -> dict[str, Any]:
        files = {"server": self.folder / "server" / "server.safetensors"}
        files |= {f"client-{k}": self.folder / f"site-{k}" / f"client-{k}.safetensors" for k in range(self.clients)}
        return {name: load_file(file) for name, file in files.items()}

    def batches(self) -> Counter[str]:
        """Each batch, and how often the server has learned from it."""
        return Counter((self.folder / "server" / LEDGER).read_text().splitlines()[1:])


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        one[side].keys() == other[side].keys() and all(bool((one[side][n] == other[side][n]).all()) for n in one[side])
        for side in one
    )


def disturb(run: Run, faults: int, seed: int, pause: float) -> Counter[str]:
    """So many faults of each kind, one after the other, each once the run has gone on since the last; what was done."""
    draws = random.Random(seed)
    kinds = ["server", "client", "wire"] * faults
    draws.shuffle(kinds)
    done = Counter[str]()
    for kind in kinds:
        run.wait_for_progress(time.monotonic() + 60)
        time.sleep(draws.uniform(0, pause))
        if run.ended:
            break
        k = draws.randrange(run.clients)
        if kind == "server":
            done["server"] += run.kill("server")
        elif kind == "client":
            done["client"] += run.kill(f"client-{k}")
        else:
            how = draws.choice(["cut", "short", "long"])
            if how == "cut":
                run.wires[k].cut()
            else:
                run.wires[k].freeze(TIMEOUT / 3 if how == "short" else 2 * TIMEOUT)
            done["wire"] += 1
        say(f"  {kind}: {sum(done.values())} of {len(kinds)}, {run.learned()} bytes of ledger")
    return done


def settings(method: str, clients: int, epochs: int, more: Sequence[str]) -> list[str]:
    return [
        "--method", method, "--clients.count", str(clients), "--train.epochs", str(epochs), "--train.batch_size", "32",
        "--train.test_every", "10", "--train.threads", "1", "--wire.timeout", str(TIMEOUT), "--wire.reconnect", "120",
        "--checkpoint.every", "20", *more,
    ]  # fmt: skip


def measure(method: str, clients: int, options: argparse.Namespace, folder: Path) -> Row:
    words = settings(method, clients, options.epochs, options.set)
    began = time.monotonic()
    with Run(folder / "plain", words, clients) as plain:
        plain.wait()
    undisturbed = time.monotonic() - began
    say(f"{method}, {clients} client(s): {undisturbed:.0f} s undisturbed")
    began = time.monotonic()
    with Run(folder / "disturbed", words, clients) as run:
        done = disturb(run, options.faults, options.seed, options.pause)
        run.wait()
    seconds = time.monotonic() - began
    batches = run.batches()
    return {
        "method": method, "clients": clients, "server_kills": done["server"], "client_kills": done["client"],
        "cuts": done["wire"], "weights_equal": same(plain.weights(), run.weights()),
        "batches": sum(plain.batches().values()),
        "batches_trained_once": batches == plain.batches() and set(batches.values()) == {1},
        "seconds_undisturbed": undisturbed,
        "seconds_lost_per_fault": (seconds - undisturbed) / max(1, sum(done.values())),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs between processes under kills, cuts and freezes.")
    parser.add_argument("--method", choices=["decoupled", "conventional"], help="only this one")
    parser.add_argument("--clients", type=int, help="only so many; else 1 and 3")
    parser.add_argument("--faults", type=int, default=20, help="of each of three kinds")
    parser.add_argument("--epochs", type=int, default=400, help="of the runs, which must outlast the faults")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds at most between a run's going on and a fault")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    more = "more options of halfpass, such as --clients.topology=relay"
    parser.add_argument("--set", nargs="*", default=[], help=more)
    parser.add_argument("--keep", type=Path, help="folder for the runs and their logs; else they are removed")
    parser.add_argument("--out", type=Path, help="file to write, such as results/chaos.json")
    options = parser.parse_args(arguments)
    made = {"environment": environment(), "command": command_line("python benchmarks/chaos.py", arguments)}
    rows = list[Row]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if options.keep is None else options.keep.absolute()
        for method in [options.method] if options.method else ["decoupled", "conventional"]:
            for clients in [options.clients] if options.clients else [1, 3]:
                rows.append(measure(method, clients, options, folder / f"{method}-{clients}"))
                say(str(rows[-1]))
                if options.out is not None:
                    write_json(options.out, {**made, "rows": rows})
    wanted = {"server_kills": options.faults, "client_kills": options.faults, "cuts": options.faults}
    met = all(
        row["weights_equal"] and row["batches_trained_once"] and all(row[key] >= n for key, n in wanted.items())
        for row in rows
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
