"""`halfpass check`: all that can be refused is refused before anything is started, and all of it at once.

It asks what `train`, `serve` and `join` ask, by the same functions, and takes a step of each half on real samples. What
one check finds, the next ones use; what needs a refused one is left out. Tests: tests/test_check.py.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import grpc
import torch

from halfpass.algorithm.whole import whole_step
from halfpass.arithmetic.optimizers import set_learning_rate
from halfpass.config import Config, from_dict, named_code, refused_groups
from halfpass.data.batches import train_batches
from halfpass.data.samples import Dataset, Samples, digest
from halfpass.errors import HalfpassError, InputError, printable, reason
from halfpass.plugin import find_plugin
from halfpass.run import setup
from halfpass.run.credentials import EDGE, SERVER, trust_of
from halfpass.run.local import LocalRun
from halfpass.run.memory import PeakMemory
from halfpass.run.network import Network, network_of
from halfpass.run.records import RunFolder, refuse_run
from halfpass.run.round_client import check_rounds_only
from halfpass.run.train import with_folder
from halfpass.tasks.task import Task
from halfpass.wire.hub import take_port
from halfpass.wire.reach import reach
from halfpass.wire.service import check_address
from halfpass.wire.trust import Trust

Side = Literal["all", "server", "client"]
Engine = Literal["flower", "nvflare"]
PACKAGES = {"flower": "flwr", "nvflare": "nvflare"}
REACH_SECONDS = 3.0  # for a server that should be there
TRIED_CLIENTS = 2  # at most, that take a step together



@dataclasses.dataclass(frozen=True)
class Where:
    """Which side is checked, and where it is."""

    side: Side = "all"
    """server, client, or all: what a training has that one command starts on this machine."""
    client: int = 0
    """Number of the client, with side client."""
    bind: str | None = None
    """HOST:PORT that a server will listen on: it must be free."""
    address: str | None = None
    """HOST:PORT as clients will write the server: its certificate must be for that host; with side client, the server
    must answer."""
    engine: Engine | None = None
    """flower or nvflare, which must be installed."""

    def __post_init__(self) -> None:
        for name, choices in (("side", ("all", "server", "client")), ("engine", (None, "flower", "nvflare"))):
            if getattr(self, name) not in choices:
                expected = f"one of {', '.join(filter(None, choices))}"
                raise InputError(f"--{name}", expected, repr(getattr(self, name)), "use one of those")


class Refused(Exception):
    """A check that another one needs was refused."""


class Checks:
    """Prints a line for each check, and counts what was refused."""

    def __init__(self) -> None:
        self.done = self.refused = 0
        self._known: dict[str, Any] = {}

    def of(self, name: str) -> Any:
        """What the check of that name found; raises Refused where it was refused."""
        if name not in self._known:
            raise Refused(name)
        return self._known[name]

    def add(self, name: str, find: Callable[[], tuple[Any, str]]) -> None:
        """`find` returns what it found, and what is to be said of it."""
        self.done += 1
        try:
            self._known[name], said = find()
        except Refused as missing:
            self._say("left out", name, f"it needs {missing}")
        except Exception as error:  # a step runs the user's code
            self.done -= 1
            self.refuse(name, error)
        else:
            self._say("ok", name, said)

    def refuse(self, name: str, error: Exception) -> None:
        self.done, self.refused = self.done + 1, self.refused + 1
        self._say("refused", name, str(error) if isinstance(error, HalfpassError) else reason(error))

    @staticmethod
    def _say(verdict: str, name: str, said: str) -> None:
        print(f"{verdict:<8}  {name:<13}  {printable(said)}", flush=True)


def check(settings: Mapping[str, Any], where: Where, *, insecure: bool = False) -> None:
    """Prints a line per check of those settings, nested as in YAML; raises InputError where one was refused."""
    checks = Checks()
    config = _config_of(settings, checks)
    if config is not None:
        setup.settle_process(config)
        with torch.random.fork_rng(devices=[]):
            for name, find in _checks(config, where, checks, insecure):
                checks.add(name, find)
    if checks.refused:
        found = f"{checks.refused} of {checks.done} refused"
        raise InputError("check", "nothing refused", found, "mend what is said above")
    print(f"all {checks.done} checks passed")


def _config_of(settings: Mapping[str, Any], checks: Checks) -> Config | None:
    """None where a group of settings is refused: each one that is has been said."""
    for group, error in refused_groups(settings).items():
        checks.refuse(group, error)
    if checks.refused == 0:
        try:
            config = from_dict(dict(settings))
            return config if config.out else with_folder(config)
        except InputError as error:
            checks.refuse("settings", error)
    return None


def _checks(
    config: Config, where: Where, checks: Checks, insecure: bool
) -> Iterator[tuple[str, Callable[[], tuple[Any, str]]]]:
    """What is to be checked on that side, in this order."""
    yield "settings", lambda: _settings(config, where)
    if where.side == "server":
        yield "code", lambda: _code(config)
    else:
        yield "data", lambda: _data(config, where)
        yield "samples", lambda: _shards(config, where, checks.of("data"))
        yield "task", lambda: _task(config, checks.of("data"))
        if config.method == "centralized":
            yield "step", lambda: _whole_step(config, checks.of("data"), checks.of("task"))
        else:
            yield "network", lambda: _network(config, checks.of("data"), checks.of("task"))
            yield "step", lambda: _step(config, checks)
            yield "bytes", lambda: _bytes(config, checks)
    yield "run folder", lambda: _folder(config, where)
    if where.side != "server":
        yield "disk", lambda: _disk(config, checks)
    yield "tls", lambda: _tls(config, where)
    if where.bind is not None:
        yield "port", lambda: _port(str(where.bind), checks.of("tls"), insecure)
    if where.address is not None:
        yield "address", lambda: _address(where, str(where.address), checks.of("tls"), insecure)
    if where.engine is not None:
        yield "engine", lambda: _engine(config, str(where.engine))


# ------------------------------------------------------------------------------------------------------- each of them


def _settings(config: Config, where: Where) -> tuple[None, str]:
    if where.side == "all":
        setup.check_here(config)
    else:
        setup.check_between_processes(config)
    if where.side == "client":
        setup.check_index(config, where.client)
    clients, topology = config.clients.count, config.clients.topology
    split = "" if config.method == "centralized" else f", {clients} client(s), {topology}, codec {config.wire.codec}"
    return None, f"{config.method}{split}, {config.train.device}"


def _code(config: Config) -> tuple[None, str]:
    """A server builds the network when the first client has said what its inputs are; its code must be there."""
    needed = {key: name for key, name in named_code(config).items() if key != "data.name"}
    for key, name in needed.items():
        find_plugin(f"{key} {name!r}", name)
    return None, ", ".join(needed.values()) or "none of your own is named"


def _data(config: Config, where: Where) -> tuple[list[Dataset], str]:
    """Of this client, or of all."""
    first = setup.load_data(config.data, where.client if where.side == "client" else 0)
    sites = [first] if where.side == "client" else setup.load_sites(config, first)
    name = config.data.name if len(sites) == 1 else f"{config.data.name} of {len(sites)} clients, the first one's"
    sizes = f"{len(first.train):,} samples to train on, {len(first.test):,} to test on"
    kind, digests = first.train.kinds()[0], f"digests {digest(first.train)}, {digest(first.test)}"
    return sites, f"{name}: {sizes}, {kind}; {digests}"


def _shards(config: Config, where: Where, sites: list[Dataset]) -> tuple[list[Samples], str]:
    """This client's, or all."""
    if config.method == "centralized":
        setup.shards_of_sites(config, sites)
        return [sites[0].train], f"{len(sites[0].train):,} in batches of {config.train.batch_size}"
    shards = setup.shards_of_sites(config, sites)
    shards = shards[where.client :][:1] if where.side == "client" else shards
    steps, sizes = setup.steps_per_epoch(config, shards), [len(shard) for shard in shards]
    each = f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
    many = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"
    return shards, f"{each} for each client, {many} batches in an epoch"


def _task(config: Config, sites: list[Dataset]) -> tuple[Task, str]:
    task = setup.task_of(config, sites[0])
    return task, f"{task.name}, {task.outputs} outputs, led by {task.lead}"


def _network(config: Config, sites: list[Dataset], task: Task) -> tuple[Network, str]:
    network = network_of(config, sites[0], task)
    setup.check_store(config, network)
    shapes = " + ".join("×".join(map(str, shape)) or "1" for shape in network.cut_shapes)
    halves, head = network.halves, network.head
    client, server = (sum(p.numel() for p in half.parameters()) for half in (halves.client, halves.server))
    more = "" if head is None else f", head {sum(p.numel() for p in head.parameters()):,}"
    place = f"cut behind {network.cut}" if network.cut else "in two halves"
    return network, f"{place}, {shapes} crosses; parameters: client {client:,}, server {server:,}{more}"


@dataclasses.dataclass(frozen=True)
class Tried:
    """What a step of some clients on a batch each took."""

    samples: int  # of the first client's batch
    tested: int
    up: int  # bytes of its batch
    down: int
    weights: int  # bytes that it handed over and got back
    tested_up: int  # bytes of its batch of the test
    memory: int  # bytes, of all that took part


def _step(config: Config, checks: Checks) -> tuple[Tried, str]:
    """One epoch of one batch for each of a few clients, and a test of one batch: the very run, but short."""
    sites, shards, network = checks.of("data"), checks.of("samples"), checks.of("network")
    count = min(TRIED_CLIENTS, config.clients.count)
    shards = [_few(shard, config.train.batch_size) for shard in (shards * count)[:count]]
    sites = [dataclasses.replace(site, test=_few(site.test, config.train.at_once)) for site in sites[:count]]
    short = _shortened(config, count)
    memory = PeakMemory(torch.device(config.train.device))
    run = LocalRun(short, sites if len(sites) > 1 else sites[0], shards, network)
    clients, server = run.train(0, lambda: None)
    handed = run.wires[0].meter.up["weights"] + run.wires[0].meter.down["weights"]
    run.test(0)
    meter, test = run.wires[0].meter, len(run.test_samples[0])
    down = meter.down["gradients"]
    up = sum(n for kind, n in meter.up.items() if kind != "weights")
    tried = Tried(len(shards[0]), test, up, down, handed, meter.evaluation_up, memory.peak_bytes())
    seconds = f"client {clients[0].busy_seconds:.2g} s, server {server.busy_seconds:.2g} s, the first time"
    loss = f"loss {server.mean_loss:.3g}"
    return tried, f"a batch of {tried.samples} and a test: {loss}; {seconds}; {_megabytes(tried.memory)} of memory"


def _shortened(config: Config, clients: int) -> Config:
    """The same run of one epoch and so many clients, in which every batch goes up once."""
    return dataclasses.replace(
        config,
        clients=dataclasses.replace(config.clients, count=clients, rounds=1, quorum=None, sample=None),
        train=dataclasses.replace(config.train, epochs=1),
        wire=dataclasses.replace(config.wire, every=1, budget=None),
        server=dataclasses.replace(config.server, replay=1, store=None),
    )


def _few(samples: Samples, count: int) -> Samples:
    return samples.take(torch.arange(min(count, len(samples))))


def _whole_step(config: Config, sites: list[Dataset], task: Task) -> tuple[None, str]:
    whole, data, recipe = setup.build_whole(config, sites[0], task), sites[0], config.train
    memory = PeakMemory(whole.arithmetic.device)
    few = _few(data.train, recipe.batch_size).to(whole.arithmetic.device)
    inputs, targets = next(iter(train_batches(data, few, recipe.batch_size, seed=recipe.seed, client=0, epoch=0)))
    set_learning_rate(whole.optimizer, recipe.lr)
    loss = whole_step(whole, inputs, targets, 0, 0)
    return None, f"a batch of {len(few)}: loss {loss:.3g}; {_megabytes(memory.peak_bytes())} of memory"


def _bytes(config: Config, checks: Checks) -> tuple[int, str]:
    """As this batch was, times those of an epoch; what compresses may do more or less elsewhere."""
    tried, shards, sites = checks.of("step"), checks.of("samples"), checks.of("data")
    share = max(map(len, shards)) / tried.samples
    up = tried.up * share / config.wire.every
    total = round(up * config.train.epochs)
    if config.wire.budget is not None:
        total = min(total, config.wire.budget)
    back = f", {_megabytes(tried.down * share)} come back" if tried.down else ""
    weights = tried.weights * config.clients.rounds
    handed = f", client halves are {_megabytes(weights)} both ways" if weights else ""
    test = tried.tested_up * len(sites[0].test) / max(1, tried.tested)
    said = f"about {_megabytes(up)} go up in an epoch{back}{handed}; a test sends {_megabytes(test)}"
    return total, f"{said}; in all {_megabytes(total)} of training batches, of the largest client"


def _folder(config: Config, where: Where) -> tuple[None, str]:
    if where.side == "client":
        RunFolder.for_client(config.folder, where.client)
    else:
        refuse_run(config.folder)
    return None, f"{config.folder} can be written"


def _disk(config: Config, checks: Checks) -> tuple[None, str]:
    """What will surely be kept must find room: checkpoints, of which there are two, and uploads."""
    centralized = config.method == "centralized"
    network = None if centralized else checks.of("network")
    copies = 2 * (2 + (config.train.optimizer == "adamw"))  # weights and what the optimizer remembers
    parts = [] if network is None else [network.halves.client, network.halves.server, network.head]
    weights = sum(p.numel() * p.element_size() for part in parts if part is not None for p in part.parameters())
    kept = 0 if config.checkpoint.every == 0 else copies * weights
    uploads = 0
    if not centralized and setup.keeps_uploads(config):
        uploads = min(config.server.store_limit, checks.of("bytes") * config.clients.count)
    needed, folder = kept + uploads, config.folder.absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        expected = f"{_megabytes(needed)} of room for checkpoints and uploads"
        remedy = "make room there, choose another folder, or lower server.store_limit"
        raise InputError("out", expected, f"{_megabytes(free)} at {nearest}", remedy)
    stored = f", uploads at most {_megabytes(uploads)}" if uploads else ""
    return None, f"checkpoints take {_megabytes(kept)}{stored}; {_megabytes(free)} are free"


def _tls(config: Config, where: Where) -> tuple[Trust | None, str]:
    """The server's or client's; without a side, those of everybody whose files are there."""
    roles = [SERVER] if where.side == "server" else [f"client-{where.client}"]
    if where.side == "all":
        named = any(value is not None for value in dataclasses.astuple(config.tls))
        roles = _roles(config) or ([SERVER] if named else [])
    trusts = [trust_of(config.tls, role) for role in roles]
    if not trusts or trusts[0] is None:
        return None, "none: only on this machine, unless you say --insecure"
    return trusts[0], f"files of {', '.join(roles)} are good"


def _roles(config: Config) -> list[str]:
    if config.tls.folder is None or not (folder := Path(config.tls.folder)).is_dir():
        return []
    names = [SERVER, EDGE, *(f"client-{k}" for k in range(config.clients.count))]
    return [name for name in names if any((folder / f"{name}.{kind}").exists() for kind in ("pem", "token"))]


def _port(bind: str, trust: Trust | None, insecure: bool) -> tuple[None, str]:
    check_address(bind, "server address", encrypted=trust is not None, insecure=insecure)
    with _no_server() as server:
        take_port(server, bind)
    return None, f"{bind} is free"


@contextmanager
def _no_server() -> Iterator[grpc.Server]:
    """One that has not the port to itself, as a real one has."""
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    try:
        yield server
    finally:
        server.stop(0)


def _address(where: Where, address: str, trust: Trust | None, insecure: bool) -> tuple[None, str]:
    check_address(address, "server address", encrypted=trust is not None, insecure=insecure)
    if where.side == "client":
        reach(address, trust, REACH_SECONDS)
        return None, f"a server answers at {address}"
    if trust is not None and trust.certificate is not None:
        trust.check_host(address.rpartition(":")[0])
        return None, f"the server's certificate is for {address.rpartition(':')[0]}"
    return None, "no certificate to compare"


def _engine(config: Config, engine: str) -> tuple[None, str]:
    if find_spec(PACKAGES[engine]) is None:
        remedy = f"pip install 'halfpass[{engine}]'"
        raise InputError("--engine", f"{engine}, installed", f"no package {PACKAGES[engine]}", remedy)
    if engine == "nvflare":
        check_rounds_only(config)
    return None, f"{engine} is installed"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.3g} MB" if count < 1e9 else f"{count / 1e9:,.3g} GB"
