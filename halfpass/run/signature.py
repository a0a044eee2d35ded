"""What goes into a trained network, what comes out, and how it was cut: written into the metadata of all weights, so
that they can be used without the data and the process that made them."""

import json
from dataclasses import dataclass
from typing import Any

from halfpass import bounded
from halfpass.config import Config
from halfpass.data.datasets import Dataset
from halfpass.data.feeding import Feeding, feeding_as_dict, feeding_from_dict, feeding_of
from halfpass.errors import InputError, reason
from halfpass.run.network import Network, Plans, read_plans, read_spec, some_samples, write_plans, written_spec
from halfpass.tasks.task import Spec, Task, spec_of

FORMAT = 1
REMEDY = "copy the file again from its owner"


@dataclass(frozen=True)
class Signature:
    run: str  # names the training, so that halves of two are not joined; empty where it has no name
    task: str
    outputs: int
    names: tuple[str, ...]  # of classes, labels or target columns
    targets: Spec
    inputs: Spec  # as the network gets them
    cut: str  # empty where there is none
    plans: Plans
    fingerprint: str  # empty without a cut
    feeding: Feeding | None = None  # None at a server, which has no data


def signature_of(config: Config, network: Network, run: str, data: Dataset | None = None) -> Signature:
    """Of a run's halves; `data` where they are here."""
    task = network.task
    return Signature(
        run, task.name, task.outputs, tuple(task.names), dict(task.spec), dict(network.inputs), network.cut,
        network.plans, network.fingerprint, None if data is None else feeding_of(data, config.data.separator),
    )  # fmt: skip


def signature_of_whole(config: Config, task: Task, data: Dataset) -> Signature:
    """Of a network that was not cut."""
    inputs = spec_of(some_samples(data))
    feeding = feeding_of(data, config.data.separator)
    return Signature("", task.name, task.outputs, tuple(task.names), dict(task.spec), inputs, "", {}, "", feeding)


def write_signature(signature: Signature) -> str:
    """JSON."""
    return json.dumps({
        "format": FORMAT, "run": signature.run, "task": signature.task, "outputs": signature.outputs,
        "names": list(signature.names), "targets": written_spec(signature.targets),
        "inputs": written_spec(signature.inputs), "cut": signature.cut, "fingerprint": signature.fingerprint,
        "plans": json.loads(write_plans(signature.plans)),
        "feeding": None if signature.feeding is None else feeding_as_dict(signature.feeding),
    })  # fmt: skip


def read_signature(place: str, text: str) -> Signature:
    """The inverse of `write_signature`; raises InputError where it is none."""
    try:
        said = bounded.parse_json(text)
        if said["format"] != FORMAT:
            expected, found = f"a signature of format {FORMAT}", repr(said["format"])[:40]
            raise InputError(place, expected, found, "use the halfpass that trained it")
        feeding = None if said["feeding"] is None else feeding_from_dict(place, said["feeding"])
        run, task, cut, fingerprint = (str(said[key]) for key in ("run", "task", "cut", "fingerprint"))
        return Signature(
            run, task, int(said["outputs"]), tuple(map(str, said["names"])), read_spec(said["targets"]),
            read_spec(said["inputs"]), cut, read_plans(json.dumps(said["plans"])), fingerprint, feeding,
        )  # fmt: skip
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{place}, signature", "what halfpass wrote", reason(error), REMEDY) from None


def for_others(signature: Signature) -> dict[str, Any]:
    """What whoever uses the exported weights must know, by names that need no halfpass to be read."""
    feeding = signature.feeding
    made: dict[str, Any] = {
        "task": signature.task, "outputs": signature.outputs, "names": list(signature.names),
        "network_inputs": written_spec(signature.inputs),
    }  # fmt: skip
    if feeding is not None:
        made |= {"how_to_feed": feeding.as_text(), "raw_inputs": written_spec(feeding.inputs)}
        kept = {key: value for key, value in feeding_as_dict(feeding).items() if value and key != "inputs"}
        made |= kept | ({"image_size": feeding.image_size} if feeding.reads == "pictures" else {})
    return made

