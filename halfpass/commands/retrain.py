"""`retrain`: a new server half from the uploads that a run kept, with no client present.

Other hyperparameters, another network above the cut, more epochs: nothing that the server half learns from has to be
sent again.
"""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from halfpass.algorithm.server import Server, evaluate
from halfpass.config import Config, as_dict
from halfpass.errors import InputError
from halfpass.files import alone_in
from halfpass.run import setup, tracking
from halfpass.run.epoch import Score, Tally, server_step
from halfpass.run.memory import PeakMemory
from halfpass.run.network import Network, above_edge, agreed_task, build_network, identity, read_plans, read_spec
from halfpass.run.progress import EpochProgress
from halfpass.run.records import (
    Row,
    RunFolder,
    Wires,
    difference,
    epoch_rows,
    read_config,
    read_result,
    refuse_run,
    result,
)
from halfpass.run.replay import in_steps, read_step, shuffled
from halfpass.run.saved import read_weights
from halfpass.run.signature import signature_of, write_signature
from halfpass.tasks.task import CLASS_NUMBERS, Task
from halfpass.wire.messages import read_batch
from halfpass.wire.store import Key, UploadStore

FIXED = (  # beside what is of the data and the clients
    "method", "model.head", "model.edge_cut", "train.batch_size", "train.micro_batch", "train.feedback_every",
    "wire.codec", "wire.every", "wire.budget", "server.replay",
)  # fmt: skip


def retrain(run: Path, config: Config) -> dict[str, Any]:
    """Trains a server half from the store of `run` and writes the run folder `config.out`; returns `result.json`.

    Its epochs are the store's, oldest first and newest last, from the beginning again where there are more; its
    learning-rate schedule is spread over what the store holds. So where every batch was uploaded and none replayed,
    with the run's own settings and all uploads still there, it repeats the run's server half bit for bit. The test
    accuracy is that on the test set's activations of the run's last epoch. Raises InputError where there is no store,
    or the network does not fit on its uploads.
    """
    if not (run / "result.json").is_file():
        raise InputError(str(run), "a finished run's folder", "no result.json in it", "train to the end first")
    made = read_config(run)
    _refuse_what_the_uploads_fix(config, made)
    config = dataclasses.replace(config, runtime="local")
    out = config.folder
    refuse_run(out)
    tracking.check(config)
    with UploadStore.open_existing(setup.store_folder(config, run)) as store:
        if made.model.edge_cut == store.identity["cut"]:  # an edge's uploads, not its clients'
            config = above_edge(config)
        network = _network(config, made, store)
        passes = _passes(config, store)
        setup.settle_process(config)
        server = setup.build_server(config, network)
        rows: list[Row] = []
        total, done = sum(map(len, passes)), 0
        retraining = EpochProgress("retrain", config.train.epochs, -(-total // len(passes)))
        with alone_in(out), RunFolder.create(out, config).tracked(config) as folder, retraining as progress:
            memory = PeakMemory(server.arithmetic.device)
            for epoch, keys in enumerate(passes):
                began, tally = time.perf_counter(), Tally(server.arithmetic.device)
                use = passes[:epoch].count(keys)
                # As they came, or in a new order where they are trained on again.
                order = shuffled(keys, config.train.seed, keys[0].epoch, use) if use else keys
                for together in in_steps(config, order):
                    done += len(together)
                    for batch in read_step(store, together, tally):
                        server_step(config, server, batch, done - 1, total, tally, use)
                    for _ in together:
                        progress.step()
                tally.peak_memory_bytes = memory.peak_bytes()
                seconds = time.perf_counter() - began
                score = _test(server, store, network.task) if config.train.tests(epoch) else None
                new = epoch_rows(epoch, seconds, network.task, tally, {}, score, {}, {}, {}, before=rows)[-1]
                rows += folder.add_rows([new])
                progress.epoch(new)
            folder.save_server(server, config, write_signature(signature_of(config, network, _name_of(run))))
            _copy_clients(run, folder, store.identity == identity(network))
            used_once = dataclasses.replace(config, server=dataclasses.replace(config.server, replay=1))
            outcome = result(used_once, network.task, network.cut, rows, Wires([], None), folder.environment)
            data = read_result(run).get("dataset")  # None where only the clients know
            return folder.finish(outcome | {"dataset": data, "retrained_from": str(run)})


def _refuse_what_the_uploads_fix(config: Config, made: Config) -> None:
    """Raises InputError for a setting of the data, the clients or the wire that is not the run's: the uploads are what
    these made of them, and its clients are not trained again."""
    if other := difference(config, as_dict(made), _is_fixed):
        key, value, theirs = other
        raise InputError(key, f"{theirs}, the run's, which its uploads are of", str(value), "leave it out")


def _is_fixed(key: str) -> bool:
    groups = key.startswith(("data.", "clients.", "task."))
    return key in FIXED or (groups and key not in ("data.path", "data.download"))


def _network(config: Config, made: Config, store: UploadStore) -> Network:
    """The network of the configuration, if its server half takes what the store holds."""
    held = store.identity
    # Without data only another network that can be traced is cut; the run's own is as it was.
    plans = read_plans(held["plans"]) if "plans" in held and config.model == made.model else None
    targets = read_spec(held["targets"]) if "targets" in held else CLASS_NUMBERS
    task = agreed_task(config, held["classes"], targets)
    inputs = read_spec(held["inputs"]) if "inputs" in held else tuple(held["sample shape"])
    network = build_network(config, inputs, task, plans=plans)
    new = identity(network)
    if new["cut shapes"] != held["cut shapes"]:
        raise InputError(
            "model.cut", f"tensors of {held['cut shapes']} per sample, as the store holds them",
            f"{new['cut shapes']} after {network.cut} of {config.model.name}",
            "cut where the shapes agree (halfpass cuts)",
        )  # fmt: skip
    return network


def _passes(config: Config, store: UploadStore) -> list[list[Key]]:
    """The uploads of each epoch of retraining: those of one epoch of the store."""
    epochs: dict[int, list[Key]] = {}
    for key in store.keys():  # noqa: SIM118  # a method of the store
        epochs.setdefault(key.epoch, []).append(key)
    if not epochs or not store.keys(test=True):
        place = f"store {store.folder}"
        raise InputError(place, "uploads of training and test set", "none", "raise server.store_limit")
    oldest_first = [epochs[epoch] for epoch in sorted(epochs)]
    wanted = config.train.epochs
    return [oldest_first[(i - wanted) % len(oldest_first)] for i in range(wanted)]


def _test(server: Server, store: UploadStore, task: Task) -> Score:
    """On the test set's activations."""
    server.half.eval()
    score = Score(task)
    for key in store.keys(test=True):
        for batch in map(read_batch, store.read(key)):
            score.add(batch, *evaluate(server, batch))
    server.half.train()
    return score


def _name_of(run: Path) -> str:
    """Of the run whose client halves the new server half goes with."""
    file = run / "server.safetensors"
    signature = read_weights(file)[1] if file.is_file() else None
    return "" if signature is None else signature.run


def _copy_clients(run: Path, folder: RunFolder, same_network: bool) -> None:
    """The run's client halves, where they are here and of the same network, so that the halves can be joined."""
    for file in run.glob("client-*.safetensors") if same_network else ():
        shutil.copy(file, folder.path)
