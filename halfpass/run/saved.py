"""Finished runs, read back: each owner's weights, wherever they lie, and the network that they are of.

Whatever is read comes from files that may be another's: nothing in them is unpickled, and code that settings name is
imported only where that is allowed.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from halfpass.bounded import parse_json
from halfpass.config import Config, from_dict, named_code
from halfpass.errors import InputError, reason
from halfpass.networks.models import Pair, build_model
from halfpass.networks.split import Halves, head_prefix, join_state, whole
from halfpass.run import setup
from halfpass.run.network import (
    Network,
    above_edge,
    agreed_task,
    build_network,
    network_of,
    set_up_weights,
    shapes_of,
    zeros_of,
)
from halfpass.run.records import read_config
from halfpass.run.signature import Signature, read_signature, signature_of, signature_of_whole
from halfpass.tasks.task import Task

COPY = "copy it here from its owner, or name the folder that it is in too"
BETWEEN = "server_half.between"


class SavedRun:
    """A finished run whose files may lie in several folders: the server's, the clients', an edge's."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises InputError where there is no folder, or nothing of a run in them."""
        self.folders = tuple(folders)
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise InputError(str(missing[0]), "the folder of a run", "none", "check the path")
        self.settings, self.config = self._read_config()

    def _read_config(self) -> tuple[Path, Config]:
        """As the run's folder has it, or the weights of one owner."""
        for folder in self.folders:
            if (folder / "config.yaml").is_file():
                return folder / "config.yaml", _for_use(read_config(folder))
        for file in self._files("*.safetensors"):
            with _opened(file) as opened:
                said = (opened.metadata() or {}).get("config")
            if said is not None:
                try:
                    return file, _for_use(from_dict(parse_json(said)))
                except (ValueError, TypeError, AttributeError) as error:
                    raise InputError(str(file), "the settings of a run", reason(error), COPY) from None
        found = "no config.yaml, and no weights that halfpass saved"
        raise InputError(str(self.folders[0]), "the folder of a run", found, "check the path")

    def _files(self, pattern: str) -> list[Path]:
        return [file for folder in self.folders for place in (folder, folder / "edge")
                for file in sorted(place.glob(pattern))]  # fmt: skip

    # -- what the owners saved

    def file(self, part: str, client: int = 0) -> Path:
        """The file with that part, the first in the order of the folders: `whole`, `client_half`, `auxiliary_head`,
        `server_half`, or the edge's `server_half.between` and `server_half.head`."""
        if part in ("client_half", "auxiliary_head"):
            setup.check_index(self.config, client)
        name = {"whole": "whole", "client_half": f"client-{client}", "auxiliary_head": f"client-{client}"}
        found = self._files(f"{name.get(part, 'server')}.safetensors")
        of_edge = part.startswith("server_half.")
        for file in found:
            if part in name or any(key.startswith(f"{BETWEEN}.") for key in _names(file)) == of_edge:
                return file
        place = self.folders[0] / ("edge/" if of_edge else "") / f"{name.get(part, 'server')}.safetensors"
        looked = "" if len(self.folders) == 1 else f" in {', '.join(map(str, self.folders))}"
        raise InputError(str(place), "weights that the run saved", f"none{looked}", COPY)

    def weights(self, part: str, client: int = 0) -> dict[str, Tensor]:
        """The tensors of a part, by their names in it."""
        tensors = read_weights(self.file(part, client))[0]
        return {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}

    def client_state(self, client: int = 0) -> dict[str, Tensor]:
        """Of all below the cut to the server: the client half, and an edge's part where there is an edge."""
        state = self.weights("client_half", client)
        return state if self.config.model.edge_cut is None else join_state(state, self.weights(BETWEEN))

    def joined_state(self, client: int = 0) -> dict[str, Tensor]:
        """Of the whole network. Raises InputError where the halves are of two trainings."""
        if self.config.method == "centralized":
            return self.weights("whole")
        self._check_same_run(client)
        return join_state(self.client_state(client), self.weights("server_half"))

    def head_state(self, client: int = 0) -> dict[str, Tensor]:
        """Of the head below the server half: a client's, or the edge's."""
        if self.config.method != "decoupled":
            place = f"{self.folders[0]}, method"
            raise InputError(place, "decoupled, which has a head", self.config.method, "leave --with_head out")
        edge = self.config.model.edge_cut is not None
        return self.weights("server_half.head" if edge else "auxiliary_head", client)

    def _check_same_run(self, client: int) -> None:
        above = self.file("server_half" if self.config.model.edge_cut is None else f"{BETWEEN}")
        files = self.file("client_half", client), above
        one, other = (read_weights(file, tensors=False)[1] for file in files)
        check_same_run(one, other, *map(str, files))

    # -- the network

    def signature(self, part: str, client: int = 0) -> Signature:
        """As the weights of that part say; of a run of an older version as its data do, where they are here."""
        file = self.file(part, client)
        if (found := read_weights(file, tensors=False)[1]) is not None:
            return found
        try:
            data = setup.load_data(self.config.data, client)
            task = setup.task_of(self.config, data)
        except InputError as error:
            expected, remedy = "weights that say how to use them, or the run's data", "train again, or restore the data"
            raise InputError(str(file), expected, f"neither ({error})", remedy) from None
        if self.config.method == "centralized":
            return signature_of_whole(self.config, task, data)
        return signature_of(self.config, network_of(self.config, data, task), "", data)

    def task(self, signature: Signature) -> Task:
        return agreed_task(self.config, signature.outputs, signature.targets, signature.names)

    def network(self, signature: Signature) -> Network:
        """The cut network, with initial weights. Raises InputError where its code builds another than was trained."""
        network = build_network(self.config, signature.inputs, self.task(signature), plans=signature.plans)
        if network.fingerprint != signature.fingerprint:
            expected = f"the network that was trained (fingerprint {signature.fingerprint})"
            remedy = "run the code and the versions that it was trained with"
            raise InputError(f"model.name {self.config.model.name!r}", expected, network.fingerprint, remedy)
        return network

    def halves(self, signature: Signature) -> Halves:
        """Of the cut to the server, with initial weights."""
        network = self.network(signature)
        if self.config.model.edge_cut is None:
            return network.halves
        upper = {"cut": signature.plans.get("edge_cut")}
        return build_network(above_edge(self.config), signature.inputs, self.task(signature), plans=upper).halves

    def uncut(self, signature: Signature, state: dict[str, Tensor]) -> nn.Module:
        """The network itself with the joined weights, in evaluation mode; of a pair of halves both."""
        made = self._untrained(signature)
        made.load_state_dict(join_state(state, {}, made))
        return made.eval()

    def all_names(self, signature: Signature, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state, under every name that the uncut network has for each weight."""
        return join_state(state, {}, self._untrained(signature))

    def _untrained(self, signature: Signature) -> nn.Module:
        config, task = self.config, self.task(signature)
        model = build_model(
            config.model.name, shapes_of(signature.inputs), task.outputs, config.train.seed, task.shape,
            example=zeros_of(signature.inputs),
        )  # fmt: skip
        set_up_weights(config, model)
        return Pair(*model) if isinstance(model, tuple) else model

    def code(self, *, data: bool = False) -> dict[str, str]:
        """Settings that name code to be imported; those of the data where they are to be loaded."""
        return {key: name for key, name in named_code(self.config).items() if data or key != "data.name"}


def _for_use(config: Config) -> Config:
    """On the CPU; all weights come from the run's files."""
    train = dataclasses.replace(config.train, device="cpu", compile=False)
    model = dataclasses.replace(config.model, weights=None, pretrained=False)
    server = dataclasses.replace(config.server, shard=False)
    return dataclasses.replace(config, train=train, model=model, server=server)


def check_same_run(one: Signature | None, other: Signature | None, place: str, other_place: str) -> None:
    """Raises InputError where the halves were not trained together, which nothing in their shapes shows."""
    names = ["" if each is None else each.run for each in (one, other)]  # none in a run of an older version
    if names[0] != names[1]:
        expected, found = f"the half of run {names[0] or 'none'}, as {place}", f"that of run {names[1] or 'none'}"
        raise InputError(other_place, expected, found, "take both halves from one training")


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(str(file), "a safetensors file", reason(error), "copy it again from its owner") from None


def _names(file: Path) -> list[str]:
    with _opened(file) as opened:
        return list(opened.keys())


def read_weights(file: Path, *, tensors: bool = True) -> tuple[dict[str, Tensor], Signature | None]:
    """Its tensors, and what its metadata says of their use; raises InputError where it cannot be read."""
    with _opened(file) as opened:
        said = (opened.metadata() or {}).get("signature")
        try:
            found = {name: opened.get_tensor(name) for name in (opened.keys() if tensors else ())}
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(str(file), "a safetensors file", reason(error), "copy it again from its owner") from None
    return found, None if said is None else read_signature(str(file), said)


def joined_module(halves: Halves, state: dict[str, Tensor]) -> nn.Module:
    """Both halves as one, with that state, in evaluation mode."""
    made = whole(halves)
    made.load_state_dict(state)
    return made.eval()


def with_head_names(state: dict[str, Tensor], head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The joined state, and the head's beside it."""
    prefix = head_prefix(state)
    return join_state(state, {f"{prefix}{name}": value for name, value in head.items()})
