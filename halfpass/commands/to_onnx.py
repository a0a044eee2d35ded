"""A trained network as ONNX: joined, and each half by itself, compared with PyTorch before anything is kept.

PyTorch's exporter by tracing is used, not the newer one by torch.export, which cannot follow a half that runs the
user's own forward up to a layer or from it on (`networks/replay.py`). Tests: tests/test_onnx.py.
"""

import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfpass.errors import InputError, reason
from halfpass.files import make_folder, replacing, write_json
from halfpass.networks.replay import CutPlan
from halfpass.networks.split import Halves
from halfpass.run.network import zeros_of
from halfpass.run.saved import SavedRun
from halfpass.run.signature import Signature, for_others
from halfpass.tree import call, flatten, map_leaves, prediction, unflatten

OPSET = 18
TOLERANCE = 1e-4  # of the largest output, and at least of 1: other kernels add up in other orders
DRAWS = ("Random", "Bernoulli", "Multinomial")  # what operators that draw begin with
MANY, FEW = 5, 3  # samples: traced with so many, and compared with others, and with one alone
CUT = "cut"  # cut.0, cut.1 … are the names of what crosses


@dataclass(frozen=True)
class Piece:
    """A network or a part of it, for one file."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]  # by name, as a tree's leaves are called
    outputs: tuple[str, ...] = ()  # none: as the tree of them says
    whole: frozenset[str] = field(default_factory=frozenset)  # that have no samples


def export_onnx(
    saved: SavedRun, signature: Signature, client: int, folder: Path, samples: Any, what: str, *, with_head: bool
) -> str:  # fmt: skip
    """Writes `joined.onnx`, and of a cut network `client_half.onnx`, `server_half.onnx` and an edge's
    `edge_half.onnx`; with_head also `auxiliary_head.onnx`, and the joined network is both answers' mean. Returns how
    far they are from PyTorch. All files or none: raises InputError where one cannot be made, or gives other outputs.
    """
    for name in ("onnx", "onnxruntime"):
        _module(name)
    samples = _some(signature) if samples is None else samples
    pieces = list(_pieces(saved, signature, client, samples, with_head=with_head))
    with torch.no_grad(), _on_plain_paths():
        make_folder("out", folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as place:
            largest = max(_write(piece, Path(place) / f"{piece.name}.onnx", signature) for piece in pieces)
            for piece in pieces:
                with replacing(folder / f"{piece.name}.onnx") as partial:
                    partial.write_bytes((Path(place) / f"{piece.name}.onnx").read_bytes())
    write_json(folder / "signature.json", for_others(signature))
    names = ", ".join(piece.name for piece in pieces)
    return f"{names} compared with PyTorch on {what}, in batches of several sizes: at most {largest:.1e} apart"


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # importing runs their code
        remedy = "pip install 'halfpass[onnx]'"
        raise InputError("--format onnx", f"{name} to be installed", reason(error), remedy) from error


def _some(signature: Signature) -> Any:
    """Random inputs of the network's kinds, where there are no data; whole numbers are 0."""
    draws = torch.Generator().manual_seed(0)

    def random(leaf: Tensor) -> Tensor:
        return torch.rand(leaf.shape, generator=draws) if leaf.is_floating_point() else leaf

    return map_leaves(random, zeros_of(signature.inputs, 2 * MANY))


@contextmanager
def _on_plain_paths() -> Iterator[None]:
    """PyTorch's attention has a fused path in evaluation that ONNX has not."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# --- what is exported -------------------------------------------------------------------------------------------------


def _pieces(
    saved: SavedRun, signature: Signature, client: int, samples: Any, *, with_head: bool
) -> Iterator[Piece]:
    state = saved.joined_state(client)
    named = {name or "input": leaf for name, leaf in flatten(samples).items()}
    if saved.config.method == "centralized":
        yield Piece("joined", saved.uncut(signature, state), named)
        return
    halves, network = saved.halves(signature), saved.network(signature)
    for plan in network.plans.values():
        _refuse_reads(plan)
    below = network.halves.client.eval()
    below.load_state_dict(saved.weights("client_half", client))
    with torch.no_grad():
        crossing = call(below, map_leaves(lambda leaf: leaf.clone(), samples))
    parts: list[tuple[str, nn.Module, Sequence[Tensor], str]] = []
    if saved.config.model.edge_cut is not None:
        between = network.halves.server.get_submodule("between").eval()
        between.load_state_dict(saved.weights("server_half.between"))
        parts.append(("edge_half", between, crossing, CUT))
        with torch.no_grad():
            crossing = between(*(tensor.clone() for tensor in crossing))
    above = halves.server.eval()
    above.load_state_dict(saved.weights("server_half"))
    names = _names(CUT, parts[0][2] if parts else crossing)
    yield Piece("client_half", below, named, names, _whole(below, names))
    for name, module, given, prefix in parts:
        made = _names("edge_cut", crossing)
        given_names = _names(prefix, given)
        whole = _whole(below, given_names) | _whole(module, made)
        yield Piece(name, module, dict(zip(given_names, given, strict=True)), made, whole)
        names, below = made, module
    yield Piece("server_half", above, dict(zip(names, crossing, strict=True)), (), _whole(below, names))
    if not with_head:
        yield Piece("joined", saved.uncut(signature, state), named)
        return
    head = _head(saved, signature, network, client)
    if saved.config.model.edge_cut is not None:
        halves.client.load_state_dict(saved.client_state(client))
    else:
        halves.client.load_state_dict(saved.weights("client_half", client))
    yield Piece("auxiliary_head", head, {names[0]: crossing[0]}, ("output",))
    yield Piece("joined", _Both(halves, head).eval(), named, ("probabilities",))


def _head(saved: SavedRun, signature: Signature, network: Any, client: int) -> nn.Module:
    head: nn.Module = network.head if saved.config.model.edge_cut is None else network.halves.server.head
    head.load_state_dict(saved.head_state(client))
    return head.eval()


def _names(prefix: str, tensors: Sequence[Tensor]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{i}" for i in range(len(tensors)))


def _whole(half: nn.Module, names: Sequence[str]) -> frozenset[str]:
    """Those of what crosses that are of the batch as a whole."""
    count = getattr(half, "whole", 0)
    return frozenset(names[len(names) - count :])


def _refuse_reads(plan: CutPlan | None) -> None:
    if plan is not None and plan.evaluation.reads:
        found = "one whose Python reads values of the data, and goes its way by them"
        expected, remedy = "a network whose way is the same for all data", "export its weights: --format safetensors"
        raise InputError(f"--format onnx, layer {plan.layer}", expected, found, remedy)


class _Both(nn.Module):
    """The mean of the server half's and the head's class probabilities (B, classes)."""

    def __init__(self, halves: Halves, head: nn.Module) -> None:
        super().__init__()
        self.client, self.server, self.head = halves.client, halves.server, head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        crossing = self.client(*args, **kwargs)
        answers = (prediction(self.server(*crossing)), prediction(self.head(crossing[0])))
        return sum(each.float().softmax(1) for each in answers) / len(answers)


class _Flat(nn.Module):
    """A module of several tensors in and a tuple of tensors out, as ONNX has it."""

    def __init__(self, module: nn.Module, names: Sequence[str], as_arguments: bool) -> None:
        super().__init__()
        self.module, self.names, self.as_arguments = module, tuple(names), as_arguments
        self.made: tuple[str, ...] = ()  # names of the outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.as_arguments:
            output = self.module(*tensors)
        else:
            output = call(self.module, unflatten(dict(zip(self.names, tensors, strict=True))))
        named = flatten(_plain(output))
        self.made = tuple(named)
        return tuple(named.values())

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Of all that it holds, by its own names: joined halves would give theirs without a prefix."""
        found = {} if destination is None else destination
        for name, value in (*self.named_parameters(), *self.named_buffers()):
            found[f"{prefix}{name}"] = value if keep_vars else value.detach()
        return found


def _plain(output: Any) -> Any:
    """Outputs as a tree; of an object with fields, those that are tensors."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return {str(key): _plain(part) for key, part in output.items() if part is not None}
    if isinstance(output, tuple | list):
        return tuple(map(_plain, output))
    fields = {key: value for key, value in vars(output).items() if isinstance(value, Tensor)}
    if not fields:
        expected = "tensors, or tuples, lists, dicts and objects of them"
        raise InputError("--format onnx, outputs", expected, type(output).__name__, "return those")
    return fields


# --- a file -----------------------------------------------------------------------------------------------------------


def _write(piece: Piece, file: Path, signature: Signature) -> float:
    """Traces the piece, writes it and compares it; returns the largest difference, of outputs whose largest is 1."""
    place = f"--format onnx, {piece.name}"
    odd = {str(value.dtype) for value in piece.module.state_dict().values()} & {"torch.bfloat16", "torch.complex64"}
    if odd:
        found, remedy = f"some of {', '.join(sorted(odd))}", "keep them as float32 in the network"
        raise InputError(place, f"weights that ONNX's opset {OPSET} computes with", found, remedy)
    of_tree = piece.name in ("client_half", "joined")
    keys = ["" if name == "input" and len(piece.inputs) == 1 else name for name in piece.inputs]
    flat = _Flat(piece.module, keys, not of_tree).eval()
    names, tensors = list(piece.inputs), [_first(piece, name, MANY) for name in piece.inputs]
    expected = flat(*(tensor.clone() for tensor in tensors))
    outputs = piece.outputs or tuple(f"output.{name}" if name else "output" for name in flat.made)
    axes = {name: {0: "batch"} for name in names if name not in piece.whole} | {
        name: {0: "batch"} for name, value in zip(outputs, expected, strict=True)
        if name not in piece.whole and value.ndim and len(value) == len(tensors[0])
    }  # fmt: skip
    _trace(place, flat, tensors, file, names, outputs, axes)
    _describe(place, file, piece, signature)
    return max(_compare(place, flat, file, piece, count) for count in (1, FEW, len(next(iter(piece.inputs.values())))))


def _first(piece: Piece, name: str, count: int) -> Tensor:
    """So many samples of an input; all of one that has none."""
    tensor = piece.inputs[name]
    return tensor if name in piece.whole else tensor[:count]


def _trace(
    place: str, flat: nn.Module, tensors: list[Tensor], file: Path, names: list[str], outputs: Sequence[str],
    axes: dict[str, dict[int, str]],
) -> None:  # fmt: skip
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    try:
        quiet.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of this exporter's age, and of values that become constants: compared
            torch.onnx.export(
                flat, tuple(tensor.clone() for tensor in tensors), file, input_names=names, output_names=list(outputs),
                dynamic_axes=axes, opset_version=OPSET, dynamo=False, training=torch.onnx.TrainingMode.EVAL,
            )  # fmt: skip
    except Exception as error:  # whatever a network, or the exporter on it, raises
        expected = "a network that PyTorch's ONNX exporter can trace"
        remedy = "export its weights (--format safetensors), or put what it cannot trace into plain tensor operations"
        raise InputError(place, expected, reason(error), remedy) from error
    finally:
        quiet.setLevel(level)


def _describe(place: str, file: Path, piece: Piece, signature: Signature) -> None:
    """Checks the graph, and writes into it how to feed it."""
    onnx = _module("onnx")
    model = onnx.load(file)
    drawn = sorted({node.op_type for node in model.graph.node if node.op_type.startswith(DRAWS)})
    if drawn:
        expected, remedy = "a network that draws nothing in evaluation", "draw only where self.training is true"
        raise InputError(place, expected, ", ".join(drawn), remedy)
    onnx.helper.set_model_props(model, {
        "halfpass": json.dumps(for_others(signature)), "part": piece.name, "producer": "halfpass",
    })  # fmt: skip
    onnx.save(model, file)


def _compare(place: str, flat: nn.Module, file: Path, piece: Piece, count: int) -> float:
    runtime = _module("onnxruntime")
    tensors = [_first(piece, name, count) for name in piece.inputs]
    expected = flat(*(tensor.clone() for tensor in tensors))
    try:
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        known = {each.name for each in session.get_inputs()}
        given = {name: tensor.numpy() for name, tensor in zip(piece.inputs, tensors, strict=True) if name in known}
        found = session.run(None, given)
    except Exception as error:  # its errors have no common base
        what = f"a graph that onnxruntime runs on {count} samples"
        remedy = "take sizes from what the network computes, not as numbers; or export its weights"
        raise InputError(place, what, reason(error), remedy) from error
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        again = torch.from_numpy(other)
        apart = float((one.double() - again.double()).abs().max()) if one.shape == again.shape else float("inf")
        apart /= max(1.0, float(one.double().abs().max()))
        if not apart <= TOLERANCE:
            what = f"PyTorch's outputs to {TOLERANCE:g} of the largest, with {count} samples"
            shapes = "" if one.shape == again.shape else f", {tuple(again.shape)} for {tuple(one.shape)}"
            remedy = "take sizes and decisions from what the network computes, not from the first batch"
            raise InputError(place, what, f"{apart:.1e} apart{shapes}", remedy)
        largest = max(largest, apart)
    return largest
