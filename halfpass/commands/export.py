"""Joins the saved halves of a run into one network for inference."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfpass.config import CLIENT, Config
from halfpass.data.datasets import Dataset
from halfpass.errors import InputError, reason
from halfpass.files import make_folder, refuse_file, replacing
from halfpass.networks.split import head_prefix, join_state, joint, whole
from halfpass.run import setup
from halfpass.run.centralized import test_whole
from halfpass.run.network import above_edge, network_of
from halfpass.run.records import RunFolder, read_config, read_result
from halfpass.tasks.task import Task


@dataclass(frozen=True)
class Exported:
    file: Path
    accuracy: float | None  # of the joined network, or the metric that leads; None where there is no test set here
    reported: float | None  # by the run; None where it was made before it reported that
    remark: str


def export(
    run: Path, client: int = 0, out: Path | None = None, data_path: str | None = None, *, with_head: bool = False
) -> Exported:
    """Writes the joined weights, named as in the uncut network, and tests them on the CPU, on the run's test set.

    `with_head` adds the auxiliary head's, and tests the mean of both answers (`split.joint`). Raises InputError where
    the folder does not hold a finished run with the parts that are asked for.
    """
    if not (run / "config.yaml").is_file() or not (run / "result.json").is_file():
        raise InputError(str(run), "a finished run's folder", "no config.yaml and result.json in it", "check the path")
    file = out or run / ("joint.safetensors" if with_head else "model.safetensors")
    refuse_file("out", file)
    config = read_config(run)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, device="cpu", compile=False))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data_path or config.data.path))
    state = _joined_state(run, config, client)
    if with_head:
        prefix, head = head_prefix(state), _head_state(run, config, client)
        state = join_state(state, {f"{prefix}{name}": value for name, value in head.items()})
    data, missing = _data_here(config, client)
    if data is not None and data_path is None:
        RunFolder(run).check_digests([data], test_alone=True, first=client)
    make_folder("out", file.parent)
    with replacing(file) as partial:
        save_file(_under_all_names(config, data, state), partial, metadata={"model": config.model.name})
    reported = _reported(_of_client(read_result(run), config, client), "joint_test" if with_head else "test")
    if data is None:
        return Exported(file, None, reported, f"not tested, because the test set is not here ({missing})")
    task = setup.task_of(config, data)
    if with_head and task.name != "classification":
        expected = "classification, whose probabilities are averaged"
        raise InputError("--with_head", expected, f"task {task.name}", "leave --with_head out")
    value = _test(config, data, task, state, with_head)

    def said(number: float) -> str:
        return f"{100 * number:.2f} %" if task.unit == "%" else f"{number:.4g}"

    remark = f"test {task.lead} {said(value)}"
    if reported is not None:
        remark += f", the run reported {said(reported)}{_difference(config)}"
    return Exported(file, value, reported, remark)


def _of_client(result: dict[str, Any], config: Config, client: int) -> Mapping[str, Any]:
    """The result, or where each client's data have a place of their own and several tested, of that client's test."""
    sites = {site["client"]: site for site in result.get("sites", ())} if CLIENT in (config.data.path or "") else {}
    return result | {"test_accuracy": None, **sites[client]} if client in sites else result


def _reported(result: Mapping[str, Any], part: str) -> float | None:
    """The leading metric's value; of an older result the accuracy."""
    metric = result.get("metric", "accuracy")
    found = (result.get(part) or {}).get(metric)
    return result.get(f"{part}_accuracy") if found is None and metric == "accuracy" else found


def _data_here(config: Config, client: int) -> tuple[Dataset | None, InputError | None]:
    """The run's data, or why they are not here."""
    try:
        return setup.load_data(config.data, client), None
    except InputError as error:
        return None, error


def _under_all_names(config: Config, data: Dataset | None, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state, and where the data tell the network's shape, what it has under two names under both, and what its
    forward never uses as it was at the start: it then loads strictly."""
    if data is None or config.method == "centralized":
        return state
    model = setup.build_whole(config, data, setup.task_of(config, data)).model
    return {name: value.clone() for name, value in join_state(state, {}, model).items()}  # a file shares no memory


def _joined_state(run: Path, config: Config, client: int) -> dict[str, Tensor]:
    if config.method == "centralized":
        return _part(run / "whole.safetensors", "whole")
    setup.check_index(config, client)
    server_half = _part(run / "server.safetensors", "server_half")
    if config.model.edge_cut is None:
        return join_state(_part(run / f"client-{client}.safetensors", "client_half"), server_half)
    between = _part(run / "edge" / "server.safetensors", "server_half.between")
    client_half = _part(run / "edge" / f"client-{client}.safetensors", "client_half")
    return join_state(join_state(client_half, between), server_half)


def _head_state(run: Path, config: Config, client: int) -> dict[str, Tensor]:
    """Of the head below the server half: a client's, or the edge's."""
    if config.method != "decoupled":
        raise InputError(f"{run}, method", "decoupled, which has a head", config.method, "leave --with_head out")
    if config.model.edge_cut is not None:
        return _part(run / "edge" / "server.safetensors", "server_half.head")
    return _part(run / f"client-{client}.safetensors", "auxiliary_head")


def _part(file: Path, part: str) -> dict[str, Tensor]:
    """The tensors that a run saved under `PART.`."""
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise InputError(str(file), "weights that the run saved", "none", "copy them here from their owner") from None
    except (SafetensorError, OSError) as error:
        raise InputError(str(file), "a safetensors file", reason(error), "copy it again from its owner") from None
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}


def _test(config: Config, data: Dataset, task: Task, state: dict[str, Tensor], with_head: bool) -> float:
    trained = setup.build_whole(config, data, task)
    if config.method != "centralized":
        config = config if config.model.edge_cut is None else above_edge(config)
        network = network_of(config, data, task)
        head = network.head if with_head else None
        joined = whole(network.halves) if head is None else joint(network.halves, head)
        trained.model = trained.arithmetic.place(joined)
    trained.model.load_state_dict(state)
    trained.model.eval()
    if with_head:  # whose outputs are logarithms of probabilities
        task = dataclasses.replace(task, probabilities=torch.exp)
    return test_whole(config, trained, data, task, config.train.epochs - 1)[task.lead]


def _difference(config: Config) -> str:
    """Why the two accuracies may differ, where they may."""
    if config.method == "centralized":
        return ""
    if config.clients.topology == "independent" and config.clients.count > 1:
        return " on average over its clients"
    return "" if config.wire.codec == "none" else f" through codec {config.wire.codec}"
