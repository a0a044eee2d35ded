"""`train` and `compare`: from settings to finished runs."""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from halfpass.config import Config, Method, as_dict, named_code, without_decoupled
from halfpass.errors import InputError, choice_error
from halfpass.files import alone_in, write_json
from halfpass.run import checkpoint, fork_server, setup
from halfpass.run.centralized import train_centralized
from halfpass.run.children import run_alone
from halfpass.run.local import train_local
from halfpass.run.network import above_edge
from halfpass.run.processes import train_processes
from halfpass.run.records import (
    CHECKPOINT,
    RunFolder,
    command_line,
    default_folder,
    difference,
    now,
    read_config,
    read_result,
    refuse_run,
)


def train(config: Config, *, debug: bool = False) -> dict[str, Any]:
    """One training, by any method and runtime. Writes the run folder `config.out`; returns what `result.json` holds.

    Raises InputError, with nothing written, where the settings or the data cannot be used, and RunError where the
    training cannot go on.
    """
    config = with_folder(config)
    out = config.folder
    refuse_run(out)
    config = with_threads(config)
    if process_count(config) > 1:
        for key, name in named_code(config).items():
            if name.startswith("__main__:"):
                remedy = "put it into a file, or set runtime local"
                raise InputError(key, "a module that other processes can import", repr(name), remedy)
        fork_server.start()
    prepared = setup.prepare(config)
    with alone_in(out):
        if process_count(config) > 1:
            RunFolder.create(out, config).keep_digests(prepared.sites or [prepared.data])
            del prepared  # each process has its own
            return train_processes(config, out, debug=debug)
        setup.settle_process(config)  # before the folder is made, which notes the threads
        folder = RunFolder.create(out, config)
        folder.keep_digests(prepared.sites or [prepared.data])
        return _train_here(config, folder, prepared)


def resume(run: Path, *, debug: bool = False) -> dict[str, Any]:
    """Goes on with a training that was broken off and ends as it would have ended: in one process behind its last whole
    epoch, between processes behind their last checkpoints. Returns what `result.json` holds; raises InputError where
    there is no such training."""
    if not (run / "config.yaml").is_file():
        raise InputError("resume", "the folder of a run", f"no config.yaml in {run}", "check the path")
    config = dataclasses.replace(read_config(run), out=str(run))
    if (run / "result.json").is_file():
        raise InputError("resume", "a training that was broken off", f"{run}, which is finished", "read its report")
    several = process_count(config) > 1
    if several:
        fork_server.start()
    with alone_in(run):
        setup.settle_process(config)
        folder = RunFolder(run)
        if not folder.has_checkpoint:
            expected = "a training that has kept a state, in one process behind its first epoch"
            raise InputError("resume", expected, f"none in {run}", "train anew")
        prepared = setup.prepare(config, old=True)
        folder.check_digests(prepared.sites or [prepared.data])
        if several:
            top = config if config.model.edge_cut is None else above_edge(config)
            folder.read_checkpoint(top)  # refused before anything is started
            del prepared
            return train_processes(config, run, debug=debug, again=True)
        return _train_here(config, folder, prepared)


def _train_here(config: Config, folder: RunFolder, prepared: setup.Prepared) -> dict[str, Any]:
    """In this process; a folder that has kept a state goes on with that."""
    device = torch.device(config.train.device)
    # Every step seeds the global generators; the caller's come back.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if prepared.network is None:
            return train_centralized(config, folder, prepared.data)
        return train_local(config, folder, prepared.sites, prepared.shards, prepared.network)


def with_folder(config: Config) -> Config:
    """The same settings, with a run folder."""
    return dataclasses.replace(config, out=config.out or default_folder(config))


def between_processes(config: Config) -> Config:
    """The same settings for a server or client that was started by hand; results must say how they were made."""
    return dataclasses.replace(config, runtime="processes")


def compare(config: Config, methods: Sequence[str], seeds: Sequence[int], *, debug: bool = False) -> list[Path]:
    """Every method with every seed, each in a fresh process, so that no run's memory is another's.

    Writes `OUT/METHOD-seed-N/` and `OUT/compare.json`, which has the form of the files under `results/`; returns the
    run folders. A comparison that was broken off goes on when it is started again: what is finished stays, a training
    with a finished epoch in one process goes on, any other begins anew. Raises InputError, with nothing written, where
    settings or data cannot be used, and PassedOnError where a run fails.
    """
    out = Path(config.out or f"runs/{now()}-compare")
    runs = [_member(config, out, method, seed) for seed in seeds for method in methods]
    refuse_run(out)
    for run in runs:
        _refuse_another(run)
    data = setup.load_data(config.data)
    for run in runs:
        setup.prepare(run, data, old=(run.folder / "config.yaml").exists())
    del data
    with alone_in(out):
        for number, run in enumerate(runs, 1):
            kept = ", is there already" if (run.folder / "result.json").is_file() else ""
            line = f"run {number} of {len(runs)}: {run.method}, seed {run.train.seed}{kept}"
            print(line, file=sys.stderr, flush=True)
            if not kept:
                _run_fresh(run, debug)
    folders = [run.folder for run in runs]
    rows = [read_result(folder) for folder in folders]
    made = {"environment": rows[0]["environment"], "command": command_line("halfpass")}
    write_json(out / "compare.json", {**made, "rows": rows})
    return folders


def _refuse_another(run: Config) -> None:
    """Refuses a folder with something else in it than this very training, finished or broken off."""
    if not (run.folder / "config.yaml").is_file():
        refuse_run(run.folder)
    elif other := difference(run, as_dict(read_config(run.folder))):
        key, value, found = other
        expected, remedy = f"a training with {key} {value}", "choose another folder"
        raise InputError(str(run.folder), expected, f"one with {found}", remedy)


def _run_fresh(run: Config, debug: bool) -> None:
    """A prepared run in processes of its own: its server and clients, or one for all. Goes on where one was broken off
    behind an epoch; what one that did not get that far has left goes, its store too."""
    run, more = with_threads(run), ["--debug"] if debug else []
    if checkpoint.there(run.folder / CHECKPOINT):
        if process_count(run) > 1:
            resume(run.folder, debug=debug)
            return None
        return run_alone(run.method, ["resume", str(run.folder), "--allow_code", *more])
    if (run.folder / "config.yaml").is_file():
        shutil.rmtree(run.folder)
        if (store := run.server.store) is not None and (Path(store) / "store.json").is_file():
            shutil.rmtree(store)
    folder = RunFolder.create(run.folder, run).path
    if process_count(run) > 1:
        with alone_in(folder):
            train_processes(run, folder, debug=debug)
    else:
        run_alone(run.method, ["train", "--config", str(folder / "config.yaml"), *more])
    return None


def process_count(config: Config) -> int:
    """Processes that compute side by side."""
    if config.runtime == "local" or config.method == "centralized":
        return 1
    return config.clients.count + (1 if config.model.edge_cut is None else 2)


def with_threads(config: Config) -> Config:
    """The same settings, with the threads of each process."""
    threads = setup.threads_each(config, process_count(config))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, threads=threads))


def read_methods(text: str) -> list[str]:
    """`decoupled,conventional` → its names; raises InputError for an unknown one."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in get_args(Method):
            raise choice_error("methods", get_args(Method), name)
    return list(dict.fromkeys(names))


def read_seeds(text: str) -> list[int]:
    """`0,1,2` → numbers."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise InputError("seeds", "numbers separated by commas", repr(text), "for example 0,1,2")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def _member(config: Config, out: Path, method: str, seed: int) -> Config:
    """One run of a comparison, with a folder and a store of its own; without what its method cannot have."""
    config = without_decoupled(config, method)
    name, server = f"{method}-seed-{seed}", config.server
    if server.store is not None:
        server = dataclasses.replace(server, store=str(Path(server.store) / name))
    return tracked_together(out, dataclasses.replace(
        config, out=str(out / name), server=server, train=dataclasses.replace(config.train, seed=seed)
    ))  # fmt: skip


def tracked_together(out: Path, config: Config) -> Config:
    """One of the runs below `out`, which trackers are to show as a group."""
    if config.track.to is None or config.track.folder is not None:
        return config
    return dataclasses.replace(config, track=dataclasses.replace(config.track, folder=str(out)))
