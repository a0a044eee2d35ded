"""Writes a run's joined network for use elsewhere: its weights for the uncut network, or ONNX, and tests it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from halfpass.commands.to_onnx import export_onnx
from halfpass.config import CLIENT, Config, as_dict
from halfpass.data.batches import test_batches
from halfpass.data.datasets import Dataset
from halfpass.errors import InputError, choice_error
from halfpass.files import make_folder, refuse_file, refuse_place, replacing, write_json
from halfpass.networks.split import joint, whole
from halfpass.run import setup
from halfpass.run.centralized import test_whole
from halfpass.run.network import above_edge, network_of
from halfpass.run.records import RunFolder, read_result
from halfpass.run.saved import SavedRun, with_head_names
from halfpass.run.signature import Signature, for_others, write_signature
from halfpass.tasks.task import Task

FORMATS = ("safetensors", "state", "onnx")
TRIED = 64  # samples of the test set on which ONNX is compared


@dataclass(frozen=True)
class Exported:
    file: Path  # or, of ONNX, the folder
    accuracy: float | None  # of the joined network, or the metric that leads; None where there is no test set here
    reported: float | None  # by the run; None where it was made before it reported that
    remark: str


def export(
    run: Path, client: int = 0, out: Path | None = None, data_path: str | None = None, *, with_head: bool = False,
    form: str = "safetensors", parts: Sequence[Path] = (),
) -> Exported:  # fmt: skip
    """Writes the joined weights, named as in the uncut network, and tests them on the CPU, on the run's test set.

    `form`: `safetensors`; `state`, a state dict for `torch.load(weights_only=True)`; or `onnx`, of each half and
    joined. A JSON file beside says how to feed the network. `with_head` adds the auxiliary head's, and tests the mean
    of both answers (`split.joint`). `parts` are further folders, where owners' files lie apart. Raises InputError where
    the folders do not hold a finished run with the parts that are asked for.
    """
    if form not in FORMATS:
        raise choice_error("--format", FORMATS, form)
    if not (run / "config.yaml").is_file() or not (run / "result.json").is_file():
        raise InputError(str(run), "a finished run's folder", "no config.yaml and result.json in it", "check the path")
    name = "joint" if with_head else "model"
    file = out or run / {"safetensors": f"{name}.safetensors", "state": f"{name}.pt", "onnx": "onnx"}[form]
    if form == "onnx":
        refuse_place("out", file)
    else:
        refuse_file("out", file)
    saved = SavedRun([run, *parts])
    config = saved.config
    saved.config = config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, path=data_path or config.data.path)
    )
    state = saved.joined_state(client)
    if with_head:
        state = with_head_names(state, saved.head_state(client))
    data, missing = _data_here(config, client)
    if data is not None and data_path is None:
        RunFolder(run).check_digests([data], test_alone=True, first=client)
    signature = _signature(saved, client, missing)
    task = None if signature is None else saved.task(signature)
    if with_head and task is not None and task.name != "classification":
        expected = "classification, whose probabilities are averaged"
        raise InputError("--with_head", expected, f"task {task.name}", "leave --with_head out")
    state = _under_all_names(saved, signature, state)
    checked = ""
    if form == "onnx":
        if signature is None:
            expected, remedy = "weights that say how to use them, or the run's data", "train again"
            raise InputError(f"{run}, --format onnx", expected, "neither", remedy)
        difference = export_onnx(saved, signature, client, file, *_samples(data, signature), with_head=with_head)
        checked = f"; {difference}"
    else:
        _write(file, state, config, signature, as_state=form == "state")
    reported = _reported(_of_client(read_result(run), config, client), "joint_test" if with_head else "test")
    if data is None or task is None:
        return Exported(file, None, reported, f"not tested, because the test set is not here ({missing}){checked}")
    value = _test(config, data, task, state, with_head)

    def said(number: float) -> str:
        return f"{100 * number:.2f} %" if task.unit == "%" else f"{number:.4g}"

    remark = f"test {task.lead} {said(value)}"
    if reported is not None:
        remark += f", the run reported {said(reported)}{_difference(config)}"
    return Exported(file, value, reported, remark + checked)


def _signature(saved: SavedRun, client: int, missing: InputError | None) -> Signature | None:
    """None of a run of an older version whose data are not here."""
    try:
        return saved.signature("whole" if saved.config.method == "centralized" else "client_half", client)
    except InputError:
        if missing is None:
            raise
        return None


def _write(
    file: Path, state: Mapping[str, Tensor], config: Config, signature: Signature | None, *, as_state: bool
) -> None:
    """The weights, and beside them a JSON file that says how to feed the network."""
    make_folder("out", file.parent)
    said = {} if signature is None else {"signature": write_signature(signature), **_fed(signature)}
    with replacing(file) as partial:
        if as_state:
            torch.save(dict(state), partial)
        else:
            metadata = {"model": config.model.name, "config": json.dumps(as_dict(config)), **said}
            save_file(dict(state), partial, metadata=metadata)
    if signature is not None and file.is_file():  # not /dev/stdout
        write_json(file.with_suffix(".json"), for_others(signature))


def _fed(signature: Signature) -> dict[str, str]:
    return {"feeding": json.dumps(for_others(signature))}


def _samples(data: Dataset | None, signature: Signature) -> tuple[Any, str]:
    """Inputs to compare networks on, and what they are."""
    if data is None:
        return None, "random inputs, as the test set is not here"
    few = data.test.take(torch.arange(min(TRIED, len(data.test))))
    inputs, _ = next(iter(test_batches(data, few, TRIED)))
    return inputs, f"{len(few)} samples of the test set"


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


def _under_all_names(
    saved: SavedRun, signature: Signature | None, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The state, and where the network's shape is known, what it has under two names under both, and what its forward
    never uses as it was at the start: it then loads strictly."""
    if signature is None or saved.config.method == "centralized":
        return state
    return {name: value.clone() for name, value in saved.all_names(signature, state).items()}  # it shares no memory


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
