"""Joins the saved halves of a run into one network for inference."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halfpass.config import Config, from_dict
from halfpass.errors import InputError
from halfpass.learn.split import join_state, whole
from halfpass.run import setup
from halfpass.run.local import test_whole
from halfpass.run.records import read_result


@dataclass(frozen=True)
class Exported:
    file: Path
    accuracy: float  # of the joined network, on the run's test set
    reported: float  # by the run
    remark: str


def export(run: Path, client: int = 0, out: Path | None = None) -> Exported:
    """Writes the joined weights, named as in the uncut network, and tests them on the run's own test set.

    Raises InputError where the folder does not hold a finished run with the halves that are asked for.
    """
    result = read_result(run)
    config = from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    prepared = setup.prepare(config)
    trained = setup.build_whole(config, prepared.data.train.sample_shape, prepared.data.classes)
    if prepared.network is None:
        state = _part(run / "whole.safetensors", "whole")
        trained.model.load_state_dict(state)
    else:
        setup.check_index(config, client)
        client_half = _part(run / f"client-{client}.safetensors", "client_half")
        state = join_state(client_half, _part(run / "server.safetensors", "server_half"))
        trained.model = trained.arithmetic.place(_joined(prepared.network, state))
    file = out or run / "model.safetensors"
    save_file(state, file, metadata={"model": config.model.name})
    trained.model.eval()
    accuracy = test_whole(config, trained, prepared.data)
    return Exported(file, accuracy, float(result["test_accuracy"]), _remark(config))


def _joined(network: setup.Network, state: dict[str, Tensor]) -> nn.Module:
    model = whole(network.halves)
    model.load_state_dict(state)
    return model


def _part(file: Path, part: str) -> dict[str, Tensor]:
    """The tensors that a run saved under `PART.`."""
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise InputError(str(file), "weights that the run saved", "none", "copy them here from their owner") from None
    except SafetensorError as error:
        raise InputError(str(file), "a safetensors file", str(error), "copy it again from its owner") from None
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}


def _remark(config: Config) -> str:
    """Why the two accuracies may differ, where they may."""
    if config.method == "centralized":
        return ""
    if config.clients.topology == "independent" and config.clients.count > 1:
        return " on average over its clients"
    return "" if config.wire.codec == "none" else f" through codec {config.wire.codec}"
