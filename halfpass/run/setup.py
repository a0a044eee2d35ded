"""From settings to what is trained: data, shards, the cut network, its two sides. Everything that can be wrong with
the arguments is found here, before anything is written."""

import copy
import dataclasses
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfpass.algorithm.client import Client
from halfpass.algorithm.edge import EdgeHalf
from halfpass.algorithm.learning import Loss
from halfpass.algorithm.server import Server
from halfpass.algorithm.whole import Whole
from halfpass.arithmetic.optimizers import build_optimizer
from halfpass.arithmetic.precision import Arithmetic
from halfpass.config import CLIENT, MOST_THREADS, Config, DataConfig, shared_settings
from halfpass.data.batches import batch_count
from halfpass.data.datasets import Dataset, Samples, load
from halfpass.data.partition import partition
from halfpass.data.samples import Stream, described, undisturbed
from halfpass.errors import InputError, reason
from halfpass.networks.models import MIDDLE_CUTS, Pair, build_model
from halfpass.networks.transformer import BYTES
from halfpass.run import children, logs, tracking
from halfpass.run.memory import keep_freed_memory
from halfpass.run.network import (
    TRIED_SAMPLES,
    Network,
    arithmetic_of,
    as_task,
    check_names,
    identity,
    network_of,
    options_of,
    set_up_weights,
    shapes_of,
    some_samples,
)  # fmt: skip
from halfpass.run.records import available_cores
from halfpass.tasks.table import build_task, count_outputs
from halfpass.tasks.task import Task, spec_of
from halfpass.tree import Tree, leaves, map_leaves, sample_count
from halfpass.wire.store import UploadStore


@dataclass(frozen=True)
class Prepared:
    """All that a run starts from; without shards and network when it is not cut (centralized)."""

    data: Dataset  # the first client's, where each has its own
    shards: list[Samples]
    network: Network | None
    sites: list[Dataset] = field(default_factory=list)  # by client


def prepare(config: Config, data: Dataset | None = None, *, old: bool = False) -> Prepared:
    """Loads (unless `data` is given), partitions, builds and cuts; raises InputError for whatever cannot be used, which
    a store with uploads in it is unless the run is an `old` one."""
    check_here(config)
    data = data or load_data(config.data)
    sites = load_sites(config, data)
    shards = shards_of_sites(config, sites)
    if config.method == "centralized":
        build_whole(config, data, task_of(config, data))
        return Prepared(data, [], None)
    network = network_of(config, data, task_of(config, data))
    check_store(config, network, old=old)
    return Prepared(data, shards, network, sites)


def check_here(config: Config) -> None:
    """What a training that this process begins can check of its settings before anything is said of the data."""
    tracking.check(config)
    check_names(config)
    check_unsharded(config)
    if config.runtime == "local" and config.metrics.port is not None:
        expected, remedy = "none in a training in one process", "leave it out, or set runtime to processes"
        raise InputError("metrics.port", expected, str(config.metrics.port), remedy)


def shards_of_sites(config: Config, sites: Sequence[Dataset]) -> list[Samples]:
    """Each client's training samples, of its own site where there are several. Raises InputError where they make no
    batch, or no round."""
    if len(sites) > 1:
        shards = [make_shards(config, site)[k] for k, site in enumerate(sites)]
    else:
        shards = make_shards(config, sites[0])
    if config.method != "centralized":
        check_rounds(config, steps_per_epoch(config, shards))
    elif (samples := len(sites[0].train)) < config.train.batch_size:
        expected = f"1 to {samples}, because there are {samples} samples"
        raise InputError("train.batch_size", expected, str(config.train.batch_size), "take a smaller batch")
    return shards


def check_store(config: Config, network: Network, *, old: bool = False) -> None:
    """Raises InputError where the store that is named has another network's uploads, or, unless the run is an `old`
    one, any."""
    if config.server.store is not None and Path(config.server.store).exists():
        with open_store(config, network, old=old):
            pass


def load_sites(config: Config, first: Dataset) -> list[Dataset]:
    """Each client's data set, where data.path has its number in it; else the one of all. Raises InputError where one
    differs from the first in what clients must agree on."""
    if CLIENT not in (config.data.path or ""):
        return [first]
    sites = [first, *(load_data(config.data, k) for k in range(1, config.clients.count))]
    for k, site in enumerate(sites[1:], 1):
        check_agreement(f"client {k}", agreement(config, first), agreement(config, site))
        ours, theirs = (task_of(config, data).outputs for data in (first, site))
        if ours != theirs:
            expected = f"data, outputs: {ours} (the first client's)"
            raise InputError(f"client {k}", expected, str(theirs), CLASSES_REMEDY)
    return sites


def check_index(config: Config, index: int) -> None:
    """Raises InputError where the run has no client of that number."""
    if not 0 <= index < config.clients.count:
        raise InputError(
            "client", f"a number from 0 to {config.clients.count - 1}", str(index),
            "choose another; clients.count says how many there are",
        )  # fmt: skip


def load_data(config: DataConfig, client: int = 0) -> Dataset:
    """The data set, or that client's; what is to be said of it goes to standard error, once for a command."""
    path = None if config.path is None else config.path.replace(CLIENT, str(client))
    data = load(**dataclasses.asdict(dataclasses.replace(config, path=path)))
    if not children.IS_CHILD:
        for note in data.notes:
            logs.say(note)
    return data


def task_of(config: Config, data: Dataset) -> Task:
    """The task on that data set; raises InputError where its targets are not the task's."""
    said = config.data.classes or ""
    known = data.classes if config.task.name == "classification" else int(said) if said.isdigit() else None
    options = dataclasses.replace(options_of(config, data.names), outputs=known)
    place = f"data {data.name}, targets for task {config.task.name}"
    train, test = (_targets(split, config.task.name) for split in (data.train, data.test))
    outputs = count_outputs(config.task.name, options, train, test, place=place)
    if data.names and len(data.names) != outputs:
        found = f"{len(data.names)} ({', '.join(data.names)})"
        raise InputError(f"{place}, names", f"{outputs}, one for each output", found, "name all of them, or none")
    task = build_task(config.task.name, outputs, spec_of(train), options)
    if ":" in config.task.name:
        _try_own(config.task.name, task, map_leaves(lambda leaf: leaf[:TRIED_SAMPLES], train))
    return task


def _try_own(name: str, task: Task, targets: Tree) -> None:
    """Raises InputError where a loss or metric of one's own does not work on made-up outputs for some targets."""
    place, samples = f"task.name {name!r}", sample_count(targets)
    outputs = torch.randn(samples, *task.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    takes = f"outputs {tuple(outputs.shape)} and targets {described(targets)} of {samples} samples"
    with undisturbed(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using a target size")  # PyTorch's words where sizes are spread
        try:
            loss = copy.deepcopy(task.loss)(outputs, targets)
        except Exception as error:  # whatever it raises
            raise InputError(f"{place}, loss", f"one that takes {takes}", reason(error), "mend it") from error
        if not isinstance(loss, Tensor) or loss.shape not in ((), (samples,)):
            found = str(tuple(loss.shape)) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"{place}, loss", "a tensor: a mean, or one value per sample", found, "return one")
        if not loss.requires_grad:
            expected, remedy = "a loss that depends on the outputs", "compute it of them, without detach() or argmax()"
            raise InputError(f"{place}, loss", expected, "one without a gradient", remedy)
        try:
            collection = task.metrics()
            task.add(collection, outputs.detach(), targets)
            values = task.values(collection)
        except Exception as error:  # whatever they raise
            raise InputError(f"{place}, metrics", f"some that take {takes}", reason(error), "mend them") from error
    if task.lead not in values:
        found = f"one of several values ({', '.join(values)})"[:120]
        raise InputError(f"{place}, metric {task.lead!r}", "one number", found, "average it, or lead with another")


def _targets(samples: Samples, task: str) -> Tree:
    """All targets; of samples that are drawn when they are due, some, where that is enough."""
    if isinstance(samples, Stream) and task == "classification":
        samples = samples.take(torch.arange(min(TRIED_SAMPLES, len(samples))))
    return samples.targets


def make_shards(config: Config, data: Dataset) -> list[Samples]:
    """Each client's training samples; raises InputError where no client can fill a batch, one has not even two samples
    for its one, or the network cannot take the samples' values."""
    if config.model.name == "transformer" and (largest := _largest(data)) >= BYTES:
        expected, remedy = f"tokens from 0 to {BYTES - 1} for the transformer", "give a network of your own"
        raise InputError(f"data.name {config.data.name!r}", expected, str(largest), remedy)
    settings = config.clients
    # Only Dirichlet's partition asks for more than how many there are.
    skewed = settings.partition == "dirichlet"
    labels = data.train.labels if skewed else torch.zeros(len(data.train), dtype=torch.int64)
    parts = partition(settings.partition, labels, settings.count, alpha=settings.alpha, seed=config.train.seed)
    own = settings.partition == "own"  # each has all of it, and none a copy
    shards = [data.train if own else data.train.take(indices) for indices in parts]
    largest_shard = max(range(len(shards)), key=lambda k: len(shards[k]))
    if config.method != "centralized" and not own and len(shards[largest_shard]) < config.train.batch_size:
        raise InputError(
            "train.batch_size", f"at most {len(shards[largest_shard])}, the samples of client {largest_shard}",
            str(config.train.batch_size), "choose smaller batches or fewer clients",
        )  # fmt: skip
    if config.method != "centralized":
        steps_per_epoch(config, shards)  # refuses a client without a batch
    return shards


def agreement(config: Config, data: Dataset) -> dict[str, Any]:
    """What the clients' data must have alike, as JSON has it."""
    shared, agreed = config.clients.partition != "own", config.data.normalization == "agreed"
    return data.agreement(shared=shared, normalization=agreed)


CLASSES_REMEDY = "name the classes, or their number, in data.classes, alike for all clients and the server"
NORMALIZATION_REMEDY = "normalize alike, or set data.normalization to own where each client's own is meant"
DATA_REMEDIES = {
    "class names": "give all clients the same class names in the same order: data.classes",
    "columns": "give all clients the same columns; data.categorical names the categories, which a client may lack",
    "gray range": "set data.gray_range, alike for all clients and the server",
    **dict.fromkeys(("mean", "std", "mean and deviation of columns"), NORMALIZATION_REMEDY),
}
LONGEST = 500  # characters of a value that a message shows


def check_agreement(place: str, first: dict[str, Any], other: dict[str, Any]) -> None:
    """Raises InputError, both values in it, where a client's agreement is not the first client's."""
    for key in [*first, *(key for key in other if key not in first)]:
        ours, theirs = first.get(key), other.get(key)
        if ours != theirs:
            expected = f"data, {key}: {_short(ours)} (the first client's)"
            remedy = DATA_REMEDIES.get(key, "give all clients the same data")
            raise InputError(place, expected, _short(theirs), remedy)


def _short(value: object) -> str:
    """For a message of one line; what a client sends has no bound of its own."""
    text = ascii(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _largest(data: Dataset) -> int:
    return max(int(leaf.max()) for samples in (data.train, data.test) for leaf in leaves(samples.inputs))


def check_rounds(config: Config, steps: Sequence[int]) -> None:
    """Raises InputError where an epoch of clients with so many batches has not that many rounds."""
    if config.clients.rounds > max(steps):
        expected = f"at most {max(steps)}, the batches of the largest client in an epoch"
        raise InputError("clients.rounds", expected, str(config.clients.rounds), "choose fewer")


def agreed_settings(config: Config) -> dict[str, Any]:
    """The settings in which a server and its clients must agree; the network's default cut as if it were written."""
    cut = config.model.cut or MIDDLE_CUTS.get(config.model.name)
    return shared_settings(config) | {"model.cut": cut}


def check_between_processes(config: Config) -> None:
    """What a server or a client can check of its settings before anything is said of the data."""
    if config.method == "centralized":
        raise InputError("method", "decoupled or conventional between processes", "'centralized'", "use halfpass train")
    check_names(config)


def settle_process(config: Config, processes: int = 1) -> None:
    """This process's CPU threads, as configured or an even share of the cores, and its malloc, for training."""
    importlib.import_module("halfpass.tasks.metrics")  # large: not to be counted as what the first test takes
    keep_freed_memory()
    torch.set_num_threads(threads_each(config, processes))


def threads_each(config: Config, processes: int) -> int:
    if config.train.threads is not None:
        return config.train.threads
    chosen = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if chosen.isdecimal() and 1 <= int(chosen) <= MOST_THREADS:
        return int(chosen)
    return max(1, available_cores() // processes)


def build_client(config: Config, network: Network, index: int) -> Client:
    """A client's own copy of the client half and head, with its optimizer over both."""
    place = arithmetic_of(config)
    half = place.place(copy.deepcopy(network.halves.client)).train()
    head = None if network.head is None else place.place(copy.deepcopy(network.head)).train()
    parameters = [*half.parameters(), *(() if head is None else head.parameters())]
    task, seed = network.task, config.train.seed
    optimizer = _optimizer(config, parameters)
    return Client(half, head, optimizer, place, index, seed, own_loss(task, place), task.probabilities)


def build_server(config: Config, network: Network, shard: Callable[[nn.Module], None] | None = None) -> Server:
    """`shard` spreads the half's weights over several processes, before there is an optimizer of them."""
    if shard is None:
        check_unsharded(config)
    place = arithmetic_of(config)
    half = copy.deepcopy(network.halves.server)
    if isinstance(half, EdgeHalf):
        half.between, half.head = place.place(half.between), place.place(half.head)
        place = dataclasses.replace(place, graphs=None)  # it keeps what it computes, which a replay would not see
    else:
        half = place.place(half)
    half.train()
    if shard is not None:
        shard(half)
    optimizer = _optimizer(config, list(half.parameters()), fused=shard is None)
    task, seed = network.task, config.train.seed
    return Server(half, optimizer, place, seed, own_loss(task, place), task.probabilities)


def check_unsharded(config: Config) -> None:
    """Raises InputError where one process is to have a part of the weights alone."""
    if config.server.shard:
        found, remedy = "one", "start it by torchrun, or leave server.shard out"
        raise InputError("server.shard", "a server of several processes (halfpass serve)", found, remedy)


def build_whole(config: Config, data: Dataset, task: Task | int) -> Whole:
    """The uncut network of the centralized baseline, with the same initial weights."""
    task, example = as_task(config, task), some_samples(data)
    model = build_model(
        config.model.name, shapes_of(spec_of(example)), task.outputs, config.train.seed, task.shape,
        pretrained=config.model.pretrained, example=example,
    )  # fmt: skip
    set_up_weights(config, model)
    if isinstance(model, tuple):
        model = Pair(*model)
    place = arithmetic_of(config)
    whole = place.place(model).train()
    return Whole(whole, _optimizer(config, list(whole.parameters())), place, config.train.seed, own_loss(task, place))


def steps_per_epoch(config: Config, shards: list[Samples]) -> list[int]:
    """Batches per epoch, by client."""
    return [batch_count(len(shard), config.train.batch_size) for shard in shards]


def keeps_uploads(config: Config) -> bool:
    """Whether the server writes uploads to disk."""
    return config.server.store is not None or config.server.replay > 1


@contextmanager
def open_store(config: Config, network: Network, *, old: bool = False) -> Iterator[UploadStore | None]:
    """The store of uploads, where the run keeps one; `old` where it may have some already. Raises InputError where the
    folder holds another network's."""
    if not keeps_uploads(config):
        yield None
        return
    folder = store_folder(config, config.folder)
    with UploadStore.open(folder, identity=identity(network), limit_bytes=config.server.store_limit) as store:
        if not old and (uploads := len(store.keys()) + len(store.keys(test=True))):
            place = "out" if config.server.store is None else "server.store"
            raise InputError(
                f"store {folder}", "an empty one for a new run", f"{uploads} uploads of another run",
                f"choose another folder for {place}; halfpass retrain reads this one",
            )  # fmt: skip
        yield store


def store_folder(config: Config, run: Path) -> Path:
    """Where the run in that folder keeps its uploads."""
    return Path(config.server.store or run / "store")


def own_loss(task: Task, place: Arithmetic) -> Loss:
    """A side's own copy of the task's loss, what it holds on the side's device."""
    loss = copy.deepcopy(task.loss)
    return loss.to(place.device) if isinstance(loss, nn.Module) else loss


def _optimizer(config: Config, parameters: list[nn.Parameter], *, fused: bool = True) -> torch.optim.Optimizer:
    recipe = config.train
    return build_optimizer(
        recipe.optimizer, parameters, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay, fused=fused,
    )  # fmt: skip
