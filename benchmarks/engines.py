"""halfpass on Flower and NVFlare: do they give the weights of one process, and how long does an epoch take?

    python benchmarks/engines.py --out results/engines.json     all rows, half an hour on two cores
    python benchmarks/engines.py --only "equal;speed" --out FILE    rows of these groups alone; the others in FILE stay
    python benchmarks/engines.py --engines flower               one engine's

equal        simulations of both, 1, 2 and 10 nodes and what changes what is sent, beside a run in one process
deployment   Flower: a SuperLink and two SuperNodes; rounds and streams; a ClientApp killed in either
faults       Flower: a SuperNode that is killed, with and without another in its place; `flwr stop`
production   NVFlare: provisioned certificates, a server and two sites on loopback
speed        seconds an epoch beside `--runtime processes`, in turn: NVFlare's rounds, Flower's streams
overlap      seconds an epoch of rounds that wait for the server, over those that do not (NVFlare)

It needs pip install 'halfpass[flower,nvflare]'. Exit status: 1 where a bar is missed.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from step import ROOT, Row, say
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from halfpass.bounded import parse_json
from halfpass.commands.cli import main as halfpass
from halfpass.files import write_json
from halfpass.run.records import command_line, environment
from halfpass.run.round_hub import RoundHub
from halfpass.wire import halfpass_pb2 as pb

Settings = dict[str, Any]
FLWR = Path(sys.executable).parent / "flwr"
START_SECONDS, RUN_SECONDS = 90.0, 900.0
DIGITS: Settings = {
    "data.name": "digits", "model.name": "digits-cnn", "clients.count": 2, "clients.rounds": 2, "train.epochs": 2,
    "train.batch_size": 32, "train.threads": 1, "data.limit": 600,
}  # fmt: skip
CASES: dict[str, Settings] = {
    "splitfed, 1 node": {"clients.count": 1}, "splitfed, 2 nodes": {}, "splitfed, 10 nodes": {"clients.count": 10},
    "relay": {"clients.topology": "relay", "clients.rounds": 1}, "int4+zstd": {"wire.codec": "int4+zstd"},
    "replay 2": {"server.replay": 2}, "budget": {"wire.budget": 1_500_000},
}  # fmt: skip
SPEED = DIGITS | {"train.epochs": 12, "clients.rounds": 1, "data.limit": None}
BALANCED: Settings = {  # halves that take equally long
    "data.name": "benchmarks.engines:pictures", "model.name": "benchmarks.engines:balanced", "model.cut": "below",
    "task.name": "benchmarks.engines:at_once", "clients.count": 1, "clients.rounds": 4, "train.epochs": 6,
    "train.batch_size": 64, "train.threads": 1, "train.lr": 0.01, "train.test_every": 6,
}  # fmt: skip


# --- Halves that take equally long, on either side of a cut in the middle ---------------------------------------------


def pictures() -> tuple[TensorDataset, TensorDataset]:
    draws = torch.Generator().manual_seed(0)
    train, test = (
        TensorDataset(torch.rand(n, 1, 16, 16, generator=draws), torch.randint(0, 10, (n,), generator=draws))
        for n in (8192, 64)
    )
    return train, test


def balanced(sample_shape: Sequence[int], outputs: int) -> nn.Sequential:
    """The client half has the auxiliary head too, the server half the classifier."""

    def half(channels: int) -> nn.Sequential:
        return nn.Sequential(*(
            layer for k in range(4) for layer in (nn.Conv2d(channels if k == 0 else 16, 16, 3, padding=1), nn.ReLU())
        ))  # fmt: skip

    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, outputs))
    parts = {"below": half(sample_shape[0]), "above": half(16), "classifier": classifier}
    whole = nn.Sequential()
    for name, part in parts.items():
        whole.add_module(name, part)
    return whole


def at_once(outputs: int) -> tuple[nn.Module, dict[str, Any]]:
    """A task of both sides, by which this file is imported at the server."""
    from torchmetrics.classification import MulticlassAccuracy  # which takes seconds, in every process

    return nn.CrossEntropyLoss(), {"accuracy_of_pictures": MulticlassAccuracy(outputs)}


def one_after_the_other(outputs: int) -> tuple[nn.Module, dict[str, Any]]:
    """The same, of a server that learns from a round before it asks for the next."""
    ends_of = RoundHub.take_ends

    def take_ends(hub: RoundHub, clients: Collection[int]) -> dict[int, pb.EpochEnd] | None:
        return None if any(hub.has_come(client) for client in clients) else ends_of(hub, clients)

    RoundHub.ahead = False
    RoundHub.take_ends = take_ends  # type: ignore[assignment, method-assign]
    return at_once(outputs)


# --- The engines ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def until_listening(port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing listens within {START_SECONDS:g} s:\n{log.read_text()}")
        time.sleep(0.1)


class Processes:
    """In a folder, each in a group of its own; nothing of them is left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[Any]]()
        self.environment = os.environ | {
            "FLWR_HOME": str(folder / "home"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip

    def start(self, name: str, *words: str | Path, **more: Any) -> subprocess.Popen[Any]:
        with self.log(name).open("wb") as file:
            process = subprocess.Popen(
                list(map(str, words)), env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True, **{"cwd": self.folder} | more,
            )  # fmt: skip
        self.started.append(process)
        return process

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def result(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Of a command in Python, once it has ended."""
        return subprocess.run(
            [sys.executable, *map(str, words)], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=RUN_SECONDS, check=False,
        )  # fmt: skip

    def stop(self) -> None:
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started, and did not stop


class Flower(Processes):
    """A SuperLink of Flower's on this machine, and SuperNodes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_port()
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )

    def superlink(self, *more: str) -> None:
        words = ("flower-superlink", "--insecure", "--port", str(self.port), *more)
        self.start("superlink", *words)
        until_listening(self.port, self.log("superlink"))

    def supernode(self, client: int) -> subprocess.Popen[Any]:
        return self.start(
            f"supernode-{client}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}",
            "--node-config", f"partition-id={client}", "--port", str(free_port()),
        )  # fmt: skip

    def run(self, app: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return self.result("-m", "halfpass.flower", app, *more)

    def stop_run(self) -> None:
        """`flwr stop` of the run that goes on."""
        listed = self.result(FLWR, "list", "--format", "json")
        (number,) = [run["run-id"] for run in json.loads(listed.stdout)["runs"] if run["status"] == "running"]
        self.result(FLWR, "stop", str(number))


def write_app(folder: Path, settings: Mapping[str, object]) -> Path:
    """A Flower app with these settings."""
    folder.mkdir(exist_ok=True)
    example = (ROOT / "examples" / "flower-cifar10" / "pyproject.toml").read_text()
    given = {key: "" if value is None else value for key, value in settings.items()}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in given.items()]
    head = example[: example.index("data.name")].replace('out = ""\n', "")
    (folder / "pyproject.toml").write_text(head + "".join(lines))
    return folder


BUILDERS = {  # of startup kits, as NVFlare's own example has them
    "workspace.WorkspaceBuilder": "    args: {template_file: [master_template.yml]}\n",
    "static_file.StaticFileBuilder": "    args: {config_folder: config}\n",
    "cert.CertBuilder": "", "signature.SignatureBuilder": "",
}  # fmt: skip


class NVFlare(Processes):
    """A server and sites of NVFlare's, provisioned with certificates, on this machine."""

    def __init__(self, folder: Path, sites: int) -> None:
        super().__init__(folder)
        self.port = free_port()
        names = [f"site-{number}" for number in range(1, sites + 1)]
        clients = "".join(f"  - {{name: {name}, type: client, org: trial}}\n" for name in names)
        (folder / "project.yml").write_text(
            "api_version: 3\nname: trial\ndescription: trial\nparticipants:\n"
            f"  - {{name: localhost, type: server, org: trial, fed_learn_port: {self.port}}}\n{clients}"
            "  - {name: admin@example.com, type: admin, org: trial, role: project_admin}\nbuilders:\n"
            + "".join(f"  - path: nvflare.lighter.impl.{name}\n{more}" for name, more in BUILDERS.items())
        )
        self._do("-m", "nvflare.cli", "provision", "-p", "project.yml", "-w", "kits")
        self.kits = folder / "kits" / "trial" / "prod_00"
        self._sites = names
        for name in ("localhost", *names):
            self._do("-m", "halfpass.nvflare", "--allow", self.kits / name)

    def _do(self, *words: str | Path) -> None:
        if (done := self.result(*words)).returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}:\n{done.stdout}{done.stderr}")

    def begin(self) -> None:
        self.start("server", "bash", self.kits / "localhost" / "startup" / "sub_start.sh", "--once")
        until_listening(self.port, self.log("server"))
        for name in self._sites:
            self.start(name, "bash", self.kits / name / "startup" / "sub_start.sh", "--once")

    def run(self, config: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return self.result("-m", "halfpass.nvflare", config, *more, "--kit", self.kits / "admin@example.com")


# --- Runs -------------------------------------------------------------------------------------------------------------


def config_file(folder: Path, settings: Mapping[str, object]) -> Path:
    """A YAML file, which JSON is."""
    nested: dict[str, dict[str, object]] = {}
    for key, value in settings.items():
        group, _, name = key.partition(".")
        nested.setdefault(group, {})[name] = value
    file = folder / "run.yaml"
    file.write_text(json.dumps(nested))
    return file


def train(settings: Settings, out: Path, runtime: str) -> Path:
    """By halfpass itself."""
    out.parent.mkdir(parents=True, exist_ok=True)
    words = ["train", "--config", str(config_file(out.parent, settings)), "--runtime", runtime, "--out", str(out)]
    if halfpass(words) != 0:
        raise RuntimeError(f"{' '.join(words)} failed")
    return out


def on_flower(flower: Flower, settings: Settings, out: Path) -> Path:
    nodes = settings["clients.count"]
    app = write_app(flower.folder / "app", settings | {"out": str(out)})
    done = flower.run(app, "--federation-config", f"num-supernodes={nodes} client-resources-num-cpus=1")
    return checked(done, out)


def on_nvflare(settings: Settings, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    done = Processes(out.parent).result("-m", "halfpass.nvflare", config_file(out.parent, settings), f"out={out}")
    return checked(done, out)


def checked(done: subprocess.CompletedProcess[str], out: Path) -> Path:
    if done.returncode or not (out / "result.json").is_file():
        raise RuntimeError(f"exit status {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return out


def weights_equal(one: Path, other: Path) -> bool:
    """Of all halves, bit for bit."""
    names = sorted(file.name for file in one.glob("*.safetensors"))
    if names != sorted(file.name for file in other.glob("*.safetensors")) or "server.safetensors" not in names:
        return False
    pairs = [(load_file(one / name), load_file(other / name)) for name in names]
    return all(a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a) for a, b in pairs)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def epoch_seconds(run: Path) -> float:
    """The median of all epochs but the first, by the clock of the server's rows."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = [row for row in rows if row["process"] == "server" and row["epoch"] > 1]
    return float(statistics.median(row["busy_seconds"] + row["waiting_seconds"] for row in counted))


# --- Groups of rows ---------------------------------------------------------------------------------------------------


def row(engine: str, mode: str, nodes: int, what: str, **found: Any) -> Row:
    return {"engine": engine, "mode": mode, "nodes": nodes, "what": what} | found


def equal(folder: Path, engines: Sequence[str], cases: Sequence[str]) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        flower = None
        if "flower" in engines:
            flower = Flower(folder)
            stack.callback(flower.stop)
            flower.superlink("--simulation")
        for number, name in enumerate(cases):
            settings = DIGITS | CASES[name]
            local = train(settings, folder / f"local-{number}" / "run", "local")
            for engine in engines:
                out = folder / f"{engine}-{number}" / "run"
                began = time.monotonic()
                if engine == "nvflare" or flower is None:
                    run = on_nvflare(settings, out)
                else:
                    run = on_flower(flower, settings, out)
                seconds = time.monotonic() - began
                same, nodes = weights_equal(local, run), settings["clients.count"]
                yield row(engine, "rounds, simulation", nodes, name, weights_equal=same, seconds=seconds)


def deployment(folder: Path, engines: Sequence[str]) -> Iterator[Row]:
    if "flower" not in engines:
        return
    flower = Flower(folder)
    try:
        flower.superlink()
        for client in range(2):
            flower.supernode(client)
        small = DIGITS | {"clients.rounds": 1}
        local = train(small, folder / "local" / "run", "local")
        longer = small | {"train.epochs": 40, "checkpoint.every": 5}
        streamed = train(longer, folder / "longer" / "run", "local")
        address = {"flower.stream": "127.0.0.1:0"}
        for name, settings, kill, same in (
            ("undisturbed", small, False, local), ("a ClientApp killed", small, True, local),
            ("undisturbed", longer | address, False, streamed),
            ("a ClientApp killed", longer | address, True, streamed),
        ):  # fmt: skip
            mode = "streams" if "flower.stream" in settings else "rounds"
            out = folder / f"{mode}-{kill}"
            app = write_app(flower.folder / "app", settings | {"out": str(out)})
            began = time.monotonic()
            command = beginning(flower, app)
            killed = kill_client_app(flower, out) if kill else 0
            run = checked(ended(command), out)
            yield row(
                "flower", f"{mode}, deployment", 2, name, weights_equal=weights_equal(same, run), killed=killed,
                seconds=time.monotonic() - began,
            )  # fmt: skip
    finally:
        flower.stop()


def beginning(flower: Flower, app: Path) -> subprocess.Popen[str]:
    """`python -m halfpass.flower APP`, which goes on."""
    command = subprocess.Popen(
        [sys.executable, "-m", "halfpass.flower", str(app)], cwd=flower.folder, env=flower.environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    flower.started.append(command)
    return command


def ended(command: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    said, _ = command.communicate(timeout=RUN_SECONDS)
    return subprocess.CompletedProcess("", command.returncode, said, "")


def has_trained(out: Path, client: int) -> bool:
    """Whether the client has something that it keeps for itself: it is in a message behind the first, or has joined."""
    return any((out / f"client-{client}").glob("*"))


def kill_client_app(flower: Flower, out: Path) -> int:
    """SIGKILL to a ClientApp that has begun to train; returns how many were killed."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if has_trained(out, 0):
            nodes = {node.pid for node in flower.started}
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                pid = int(entry.parent.name)
                with contextlib.suppress(OSError):
                    if b"clientapp" in entry.read_bytes() and os.getpgid(pid) in nodes:
                        time.sleep(0.5)
                        os.kill(pid, signal.SIGKILL)
                        return 1
        time.sleep(0.05)
    raise TimeoutError(f"no ClientApp trained within {START_SECONDS:g} s")


def faults(folder: Path, engines: Sequence[str]) -> Iterator[Row]:
    """Of Flower's deployment: what comes of a lost SuperNode, and of `flwr stop`."""
    if "flower" not in engines:
        return
    flower = Flower(folder)
    try:
        flower.superlink()
        nodes = [flower.supernode(client) for client in range(2)]
        small = DIGITS | {"clients.rounds": 1, "train.epochs": 4, "wire.reconnect": 180.0}
        longer = small | {"train.epochs": 400, "checkpoint.every": 5}
        streams = longer | {"flower.stream": "127.0.0.1:0", "wire.reconnect": 30.0}
        local = train(small, folder / "local" / "run", "local")
        for name, settings in (
            ("a SuperNode killed, another started in its place", small), ("flwr stop", longer),
            ("flwr stop", streams), ("a SuperNode killed, none in its place", streams),
        ):  # fmt: skip
            mode = "streams" if "flower.stream" in settings else "rounds"
            out = folder / f"{mode}-{name.replace(' ', '-')}"
            began = time.monotonic()
            command = beginning(flower, write_app(folder / "app", settings | {"out": str(out)}))
            while not (has_trained(out, 1) and (out / "metrics.jsonl").exists()):
                if time.monotonic() - began > START_SECONDS:
                    raise TimeoutError(f"it has not trained within {START_SECONDS:g} s")
                time.sleep(0.1)
            fault = time.monotonic()
            if name == "flwr stop":
                flower.stop_run()
            else:
                os.killpg(nodes[1].pid, signal.SIGKILL)
                nodes[1].wait()
            if name.endswith("another started in its place"):
                nodes[1] = flower.supernode(1)
            done = ended(command)
            file = out / "events.jsonl"  # none where Flower ended the ServerApp before it had said anything
            lines = file.read_text().splitlines() if file.exists() else ['{"event": null, "text": ""}']
            last = json.loads(lines[-1])
            found: Row = {"seconds_from_then": time.monotonic() - fault, "exit_status": done.returncode}
            found |= {"last_event": last["event"], "said": last["text"].replace(str(out), "RUN")}
            if done.returncode == 0:
                found |= {"weights_equal": weights_equal(local, out)}
            else:
                found |= {"met": done.returncode == 1}
            yield row("flower", f"{mode}, deployment", 2, name, **found)
    finally:
        flower.stop()


def production(folder: Path, engines: Sequence[str]) -> Iterator[Row]:
    if "nvflare" not in engines:
        return
    nvflare = NVFlare(folder, 2)
    try:
        nvflare.begin()
        local = train(DIGITS, folder / "local" / "run", "local")
        out, began = folder / "job", time.monotonic()
        deadline = began + START_SECONDS
        while (done := nvflare.run(config_file(folder, DIGITS), f"out={out}")).returncode == 2:  # sites are to come
            if "connected to the server" not in done.stderr or time.monotonic() > deadline:
                break
            time.sleep(2)
            began = time.monotonic()
        run = checked(done, out)
        yield row(
            "nvflare", "rounds, production", 2, "provisioned certificates", weights_equal=weights_equal(local, run),
            seconds=time.monotonic() - began,
        )  # fmt: skip
    finally:
        nvflare.stop()


def speed(folder: Path, engines: Sequence[str]) -> Iterator[Row]:
    rounds = 3
    if "nvflare" in engines:
        ratios, found = in_turn(
            rounds, lambda n: on_nvflare(SPEED, folder / f"nvflare-{n}" / "run"),
            lambda n: train(SPEED, folder / f"processes-{n}" / "run", "processes"),
        )  # fmt: skip
        ratio, what = statistics.median(ratios), "seconds an epoch over those of processes"
        yield row(
            "nvflare", "rounds, simulation", 2, what, ratio=ratio, bar="≤ 1.5", met=ratio <= 1.5,
            seconds_per_epoch=found, rounds=rounds,
        )  # fmt: skip
    if "flower" in engines:
        flower = Flower(folder)
        longer = SPEED | {"train.epochs": 60}
        stream = longer | {"flower.stream": "127.0.0.1:0"}
        try:
            flower.superlink("--simulation")
            ratios, found = in_turn(
                rounds, lambda n: train(longer, folder / f"stream-processes-{n}" / "run", "processes"),
                lambda n: on_flower(flower, stream, folder / f"stream-{n}" / "run"),
            )  # fmt: skip
        finally:
            flower.stop()
        ratio, what = statistics.median(ratios), "throughput over that of processes"
        yield row(
            "flower", "streams, simulation", 2, what, ratio=ratio, bar="≥ 0.9", met=ratio >= 0.9,
            seconds_per_epoch=found, rounds=rounds,
        )  # fmt: skip


def overlap(folder: Path, engines: Sequence[str]) -> Iterator[Row]:
    if "nvflare" not in engines:
        return
    waiting = BALANCED | {"task.name": "benchmarks.engines:one_after_the_other"}
    ratios, found = in_turn(
        3, lambda n: on_nvflare(waiting, folder / f"waiting-{n}" / "run"),
        lambda n: on_nvflare(BALANCED, folder / f"at-once-{n}" / "run"),
    )  # fmt: skip
    same = weights_equal(folder / "waiting-0" / "run", folder / "at-once-0" / "run")
    yield row(
        "nvflare", "rounds, simulation", 1, "seconds an epoch of rounds that wait over those that overlap",
        ratio=statistics.median(ratios), bar="≥ 1.5", met=statistics.median(ratios) >= 1.5, seconds_per_epoch=found,
        weights_equal=same, rounds=3,
    )  # fmt: skip


def in_turn(rounds: int, one: Callable[[int], Path], other: Callable[[int], Path]) -> tuple[list[float], list[float]]:
    """Ratios of the seconds an epoch of the first over the second's; and the medians of both."""
    found: list[list[float]] = [[], []]
    for number in range(rounds):
        for k in (0, 1) if number % 2 == 0 else (1, 0):
            found[k].append(epoch_seconds((one, other)[k](number)))
        say(f"{found[0][-1]:.2f} s an epoch over {found[1][-1]:.2f}")
    return [a / b for a, b in zip(*found, strict=True)], [statistics.median(seconds) for seconds in found]


GROUPS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    **{f"equal: {name}": partial(equal, cases=[name]) for name in CASES}, "deployment": deployment, "faults": faults,
    "production": production, "speed": speed, "overlap": overlap,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="halfpass on Flower and NVFlare.")
    parser.add_argument("--only", default=";".join(GROUPS), help="groups, with semicolons; equal has all of equal: …")
    parser.add_argument("--engines", default="flower,nvflare", help="of these alone")
    parser.add_argument("--out", type=Path, help="file to write, such as results/engines.json")
    options = parser.parse_args(arguments)
    named, engines = options.only.split(";"), options.engines.split(",")
    groups = [group for group in GROUPS if group in named or group.partition(":")[0] in named]
    if unknown := {*named} - GROUPS.keys() - {"equal"} | {*engines} - {"flower", "nvflare"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; groups are equal and {'; '.join(GROUPS)}")
    out = options.out and options.out.absolute()
    made = {"environment": environment(), "command": command_line("python benchmarks/engines.py", arguments)}
    rows = list[Row]()
    if out is not None and out.exists():
        kept = parse_json(out.read_text())["rows"]
        rows = [old for old in kept if old["group"] not in groups or old["engine"] not in engines]
    with contextlib.chdir(ROOT):
        for group in groups:
            with tempfile.TemporaryDirectory() as folder:
                for found in GROUPS[group](Path(folder), engines):
                    rows.append({"group": group} | found | {"environment": made["environment"]})
                    say(json.dumps(found, ensure_ascii=False))
                    if out is not None:
                        write_json(out, {**made, "rows": sorted(rows, key=lambda row: [*GROUPS].index(row["group"]))})
    return 0 if all(row.get("weights_equal", True) and row.get("met", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
