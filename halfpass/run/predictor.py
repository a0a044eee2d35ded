"""Predicts from raw inputs with a trained network, as the run itself would have: in one place, or with the server half
at the other end of a wire. Tests: tests/test_predict.py."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfpass.arithmetic.precision import Arithmetic, arithmetic
from halfpass.data.feeding import PICTURES, TABLE, Feeding
from halfpass.errors import InputError, RunError
from halfpass.plugin import origin
from halfpass.run.network import Network
from halfpass.run.saved import SavedRun, joined_module
from halfpass.run.signature import Signature
from halfpass.tasks.task import Task
from halfpass.tree import Tree, call, prediction, sample_count

AHEAD = 2  # batches that wait for the server half's answer
Above = Callable[[tuple[Tensor, ...]], Tensor]  # what crosses → outputs (B, ...)


@dataclass(frozen=True)
class Predicted:
    """Answers to some inputs, in their order."""

    places: tuple[str, ...]  # of each input: its file, row or number
    answers: Tensor  # (N, ...) probabilities where the task has any, else outputs
    by_head: Tensor  # (N,) bool: those that the auxiliary head answered alone
    task: Task

    @property
    def classes(self) -> Tensor:
        """(N,) or (N, ...) class numbers, where the task is one of classes."""
        if self.task.name == "classification":
            return self.answers.argmax(1)
        if self.task.name in ("segmentation", "tokens"):
            return self.answers.argmax(1 if self.task.name == "segmentation" else -1)
        raise InputError("classes", "a task of classes", f"task {self.task.name}", "take the answers")

    def name(self, number: int) -> str:
        """Of a class, label or target column; its number where it has none."""
        return self.task.names[number] if number < len(self.task.names) else str(number)

    def rows(self) -> list[dict[str, Any]]:
        """One dict of plain values per input."""
        return [self._row(i, place) for i, place in enumerate(self.places)]

    def _row(self, i: int, place: str) -> dict[str, Any]:
        row: dict[str, Any] = {"input": place}
        answer = self.answers[i]
        named = {self.name(k): float(value) for k, value in enumerate(answer)} if answer.ndim == 1 else {}
        if self.task.name == "classification":
            best = int(answer.argmax())
            row |= {"class": self.name(best), "probability": float(answer[best]), "probabilities": named}
        elif self.task.name in ("segmentation", "tokens"):
            row |= {"classes": self.classes[i].tolist()}
        else:
            row |= {"values": named if answer.ndim == 1 else answer.tolist()}
        return row | ({"answered_by": "head" if self.by_head[i] else "server half"} if self.by_head.any() else {})


class Predictor:
    """A trained network, or its client half with a way to the server half. Made by `load`."""

    def __init__(
        self, signature: Signature, task: Task, place: Arithmetic, below: nn.Module | None, above: Above,
        head: nn.Module | None = None, batch_size: int = 128, exit_above: float | None = None, ahead: int = 0,
    ) -> None:  # fmt: skip
        """`below`: the client half, or None where `above` is the whole network. `head`, with `exit_above`: answers by
        itself where its largest probability is at least that. `ahead`: batches that `above` may be asked at once."""
        self.signature, self.task, self.batch_size = signature, task, batch_size
        self.exit_above = exit_above
        self._place, self._below, self._above, self._head, self._ahead = place, below, above, head, ahead

    @property
    def feeding(self) -> Feeding:
        """How raw inputs become the network's. Raises InputError where this process has none."""
        if self.signature.feeding is None:
            expected, remedy = "weights of a client, which say how to feed them", "take a client's folder"
            raise InputError("the run", expected, "a server's", remedy)
        return self.signature.feeding

    def predict(self, inputs: Any) -> Predicted:
        """Of a picture file, a CSV, .npy or .npz file, or a list of files; of an array or tensor (N, ...), or a dict or
        tuple of those; of a row of a table as a dict, or a list of rows. An array is raw, as the training set had its
        samples. Raises InputError where the inputs do not fit."""
        raw, places, _ = self.read(inputs)
        return self.of_batches(self.feeding.batches(raw, self.batch_size), places)

    def read(self, inputs: Any) -> tuple[Tree, list[str], list[str]]:
        """(raw samples, the place of each, what is to be said of them)"""
        feeding = self.feeding
        if isinstance(inputs, (str, Path)):
            inputs = [inputs]
        if isinstance(inputs, (list, tuple)) and inputs and all(isinstance(one, (str, Path)) for one in inputs):
            return _read_files(feeding, [Path(one).expanduser() for one in inputs])
        rows = [inputs] if isinstance(inputs, dict) else inputs
        if feeding.reads == TABLE and isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return feeding.rows(rows)
        raw = feeding.arrays(inputs)
        return raw, _numbers(raw), []

    @torch.no_grad()
    def of_batches(self, batches: Iterable[Any], places: Sequence[str]) -> Predicted:
        """Of inputs as the network gets them, such as a data set's test batches."""
        made = list(self._answered(batches))
        answers = torch.cat([part for part, _ in made])
        return Predicted(tuple(places), answers, torch.cat([by_head for _, by_head in made]), self.task)

    def _answered(self, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """(answers, whether the head gave them) of each batch, the server half being asked ahead."""
        waiting: deque[tuple[Tensor | None, Tensor, Future[Tensor] | None]] = deque()
        with ThreadPoolExecutor(max(1, self._ahead)) as asking:
            try:
                for inputs in batches:
                    own, sure, rest = self._client_side(inputs)
                    future = None if rest is None else asking.submit(self._outputs, rest)
                    waiting.append((own, sure, future))
                    while len(waiting) > self._ahead:
                        yield self._together(*waiting.popleft())
                while waiting:
                    yield self._together(*waiting.popleft())
            except BaseException:
                asking.shutdown(wait=False, cancel_futures=True)
                raise

    def _client_side(self, inputs: Any) -> tuple[Tensor | None, Tensor, tuple[Tensor, ...] | None]:
        """(the head's answers, which of them are sure, what is to be asked of the rest)"""
        if self._below is None:
            return None, torch.zeros(sample_count(inputs), dtype=torch.bool), (inputs,)
        with self._place.autocast():
            crossing = call(self._below, inputs)
        sure, answers = torch.zeros(len(crossing[0]), dtype=torch.bool), None
        if self._head is not None and self.exit_above is not None and self.task.probabilities is not None:
            with self._place.autocast():
                outputs = prediction(self._head(crossing[0])).float()
            answers = self.task.probabilities(outputs)
            sure = answers.amax(1) >= self.exit_above
        if sure.all():
            return answers, sure, None
        return answers, sure, crossing if not sure.any() else tuple(tensor[~sure] for tensor in crossing)

    def _outputs(self, crossing: tuple[Any, ...]) -> Tensor:
        """As answers; in a thread of its own, where autocast and no_grad are to be said again."""
        with torch.no_grad():
            outputs = self._above(crossing)
        if not outputs.isfinite().all():
            raise RunError("the network's outputs", "finite values", "NaN or infinity", "look at its training")
        return outputs if self.task.probabilities is None else self.task.probabilities(outputs)

    def _together(self, own: Tensor | None, sure: Tensor, future: Future[Tensor] | None) -> tuple[Tensor, Tensor]:
        rest = None if future is None else future.result()
        if own is None or rest is None:
            answers = rest if own is None else own
            assert answers is not None
            return answers, sure
        answers = own.clone()
        answers[~sure] = rest
        return answers, sure


def _numbers(raw: Tree, name: str = "sample") -> list[str]:
    return [f"{name} {i}" for i in range(sample_count(raw))]


def _read_files(feeding: Feeding, files: list[Path]) -> tuple[Tree, list[str], list[str]]:
    arrays = [file for file in files if file.suffix in (".npy", ".npz")]
    if arrays or (feeding.reads not in (PICTURES, TABLE)) or (feeding.reads == TABLE and len(files) != 1):
        if len(files) != 1:
            raise InputError("input", "one array file, or one table", f"{len(files)} files", "give them one by one")
        if not arrays:
            raise InputError(str(files[0]), feeding.wants, "another kind of file", "convert it")
        raw = feeding.array_file(files[0])
        return raw, _numbers(raw, f"{files[0]} sample"), []
    if feeding.reads == TABLE:
        return feeding.table(files[0])
    return feeding.pictures(files), [str(file) for file in files], []


def load(run: str | Path | Sequence[str | Path], client: int = 0, *, allow_code: bool = False) -> Predictor:
    """The trained network of a run's folder, or of several where its owners' files lie apart, ready for raw inputs.

    >>> halfpass.load("runs/first").predict("scan.png").rows()

    It computes on the CPU, in the run's precision, in batches of the run's size. `client`: whose half, of independent
    clients. Where the settings name code as module:function, it is imported only with `allow_code`. Raises InputError
    for what is missing, damaged or another's.
    """
    folders = [run] if isinstance(run, (str, Path)) else run
    return predictor(SavedRun([Path(folder).expanduser() for folder in folders]), client, allow_code=allow_code)


def predictor(
    saved: SavedRun, client: int = 0, *, allow_code: bool = False, exit_above: float | None = None,
    above: Callable[[Signature, Network], Above] | None = None,
) -> Predictor:  # fmt: skip
    """`exit_above` as in Predictor. `above` makes the way to a server half elsewhere, of the client's signature
    and network."""
    check_code(saved, allowed=allow_code)
    config, centralized = saved.config, saved.config.method == "centralized"
    check_exit(saved, exit_above)
    place = arithmetic("cpu", config.train.precision)
    signature = saved.signature("whole" if centralized else "client_half", client)
    task, size = saved.task(signature), config.train.at_once
    if centralized:
        if above is not None:
            raise InputError(str(saved.folders[0]), "a run with a cut", "a centralized one", "leave --server out")
        model = place.place(saved.uncut(signature, saved.joined_state()))
        return Predictor(signature, task, place, None, _alone(place, model), batch_size=size)
    network = saved.network(signature)
    if above is not None or exit_above is not None:
        below = place.place(network.halves.client)
        below.load_state_dict(saved.weights("client_half", client))
        head = None
        if exit_above is not None:
            head = network.head
            assert head is not None
            head = place.place(head)
            head.load_state_dict(saved.weights("auxiliary_head", client))
            head.eval()
            _check_parts(network.halves.client.eval(), network)
        below.eval()
        way = above(signature, network) if above is not None else _above(place, saved, network.halves.server, client)
        return Predictor(signature, task, place, below, way, head, size, exit_above, AHEAD if above else 0)
    halves = saved.halves(signature)
    model = place.place(joined_module(halves, saved.joined_state(client)))
    return Predictor(signature, task, place, None, _alone(place, model), batch_size=size)


def _alone(place: Arithmetic, model: nn.Module) -> Above:
    def outputs(given: tuple[Any, ...]) -> Tensor:
        with place.autocast():
            made: Tensor = prediction(call(model, given[0])).float()
        return made

    return outputs


def _above(place: Arithmetic, saved: SavedRun, half: nn.Module, client: int) -> Above:
    saved.joined_state(client)  # refuses halves of two trainings
    return server_half(place, half, saved.weights("server_half"))


def server_half(place: Arithmetic, half: nn.Module, state: dict[str, Tensor]) -> Above:
    """The server half, for what crosses."""
    half = place.place(half)
    half.load_state_dict(state)
    half.eval()

    def outputs(crossing: tuple[Tensor, ...]) -> Tensor:
        with place.autocast():
            made: Tensor = prediction(half(*crossing)).float()
        return made

    return outputs


def check_code(saved: SavedRun, *, allowed: bool, data: bool = False) -> None:
    """Raises InputError where the run's settings name code, and that is not allowed: the folder may be another's."""
    for key, name in saved.code(data=data).items():
        if not allowed:
            found, remedy = f"{name} from {origin(name)}", "look at it, and add --allow_code where you trust it"
            raise InputError(f"{saved.settings}, {key}", "no code that is run unasked", found, remedy)


def check_exit(saved: SavedRun, exit_above: float | None) -> None:
    """Raises InputError where no head can answer by itself."""
    if exit_above is None:
        return
    place, config = "--exit_above", saved.config
    if not 0 <= exit_above <= 1 or math.isnan(exit_above):
        raise InputError(place, "a probability, from 0 to 1", f"{exit_above}", "for example 0.9")
    for what, needed, found in (
        ("a run with an auxiliary head (method decoupled)", config.method == "decoupled", f"method {config.method}"),
        ("an auxiliary head", config.model.head != "none", "model.head none"),
        ("task classification", config.task.name == "classification", f"task {config.task.name}"),
        ("a run without an edge", config.model.edge_cut is None, "model.edge_cut"),
    ):
        if not needed:
            raise InputError(place, what, found, "leave it out")


def _check_parts(client_half: nn.Module, network: Network) -> None:
    if getattr(client_half, "whole", 0):
        expected, found = "values of samples alone at the cut", "values of whole batches, which cannot be sent in part"
        raise InputError("--exit_above", expected, found, f"leave it out, or cut elsewhere than at {network.cut}")
