"""`halfpass predict`: a trained network's answers to pictures, a table, arrays, or the run's own test set."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfpass.config import TlsConfig
from halfpass.data.batches import test_batches
from halfpass.data.datasets import Dataset
from halfpass.errors import InputError, printable
from halfpass.files import make_folder, replacing
from halfpass.run import setup
from halfpass.run.answer_process import above_at, asker
from halfpass.run.network import Network
from halfpass.run.predictor import Above, Predicted, Predictor, check_code, predictor
from halfpass.run.records import RunFolder
from halfpass.run.saved import SavedRun
from halfpass.run.signature import Signature
from halfpass.wire.answering import Asker

SHOWN = 3  # labels or columns of an input in text


@dataclass(frozen=True)
class Wanted:
    """What is to be predicted, and how."""

    folders: Sequence[Path]
    inputs: Sequence[Path]
    test: bool = False  # the run's test set, too
    client: int = 0
    server: str | None = None
    exit_above: float | None = None
    data_path: str | None = None
    allow_code: bool = False
    insecure: bool = False


def predict(wanted: Wanted, tls: TlsConfig, form: str, out: Path | None) -> None:
    """Prints, or writes to `out`, the answers as `text`, `json` or `csv`; what else is to be said goes to standard
    error."""
    if bool(wanted.inputs) == wanted.test:
        found = "both" if wanted.test else "neither"
        raise InputError("INPUT", "inputs, or --test", found, "name files, or take the run's test set by --test")
    saved = SavedRun(wanted.folders)
    with ExitStack() as stack:
        askers: list[Asker] = []

        def above(signature: Signature, network: Network) -> Above:
            way = asker(saved, str(wanted.server), tls, signature, network, insecure=wanted.insecure)
            askers.append(stack.enter_context(way))
            return above_at(way, network.halves.client)

        made = predictor(
            saved, wanted.client, allow_code=wanted.allow_code, exit_above=wanted.exit_above,
            above=None if wanted.server is None else above,
        )  # fmt: skip
        predicted, notes = _of_test_set(saved, made, wanted) if wanted.test else _of_files(made, wanted.inputs)
        for note in [*notes, *_of_wire(predicted, askers, wanted)]:
            print(f"halfpass: {printable(note)}", file=sys.stderr, flush=True)
        _write(FORMS[form](predicted), out)


def _of_files(made: Predictor, files: Sequence[Path]) -> tuple[Predicted, list[str]]:
    raw, places, notes = made.read(list(files))
    return made.of_batches(made.feeding.batches(raw, made.batch_size), places), notes


def _of_test_set(saved: SavedRun, made: Predictor, wanted: Wanted) -> tuple[Predicted, list[str]]:
    """The run's own, which it must be; with the score that the task leads with."""
    check_code(saved, allowed=wanted.allow_code, data=True)
    data = load_test_set(saved, wanted.client, wanted.data_path)
    samples = data.test
    predicted = made.of_batches(
        (inputs for inputs, _ in test_batches(data, samples, made.batch_size)),
        [f"test sample {i}" for i in range(len(samples))],
    )  # fmt: skip
    task, metrics = made.task, made.task.metrics()
    task.add_answers(metrics, predicted.answers, samples.targets)
    value = task.values(metrics)[task.lead]
    shown = f"{100 * value:.2f} %" if task.unit == "%" else f"{value:.4g}"
    return predicted, [f"test {task.lead} {shown} on {len(samples)} samples"]


def load_test_set(saved: SavedRun, client: int, data_path: str | None) -> Dataset:
    """The run's data, the test samples being those that it noted."""
    config = saved.config.data
    if data_path is not None:
        config = type(config)(**{**vars(config), "path": data_path})
    data = setup.load_data(config, client)
    RunFolder(saved.folders[0]).check_digests([data], test_alone=True, first=client)
    return data


def _of_wire(predicted: Predicted, askers: Sequence[Asker], wanted: Wanted) -> list[str]:
    notes = []
    if wanted.exit_above is not None:
        own, count = int(predicted.by_head.sum()), len(predicted.places)
        sure = f"probability at least {wanted.exit_above:g}"
        notes.append(f"the auxiliary head answered {own} of {count} by itself ({sure})")
    for way in askers:
        notes.append(f"{way.bytes_up:,} bytes up, {way.bytes_down:,} bytes down")
    return notes


# --- what is written --------------------------------------------------------------------------------------------------


def _as_text(predicted: Predicted) -> str:
    return "\n".join(printable(_line(row)) for row in predicted.rows())


def _line(row: dict[str, Any]) -> str:
    if "class" in row:
        said = f"{row['class']} {row['probability']:.4f}"
    elif "classes" in row:
        flat = _flat(row["classes"])
        most = sorted(set(flat), key=lambda number: (-flat.count(number), number))[:SHOWN]
        said = ", ".join(f"class {number}: {100 * flat.count(number) / len(flat):.1f} %" for number in most)
    elif isinstance(row["values"], dict):
        said = ", ".join(f"{name} {value:.6g}" for name, value in row["values"].items())
    else:
        said = json.dumps(row["values"])
    return f"{row['input']}: {said}" + (f" ({row['answered_by']})" if "answered_by" in row else "")


def _flat(value: Any) -> list[int]:
    return [number for part in value for number in _flat(part)] if isinstance(value, list) else [value]


def _as_json(predicted: Predicted) -> str:
    return json.dumps({"task": predicted.task.name, "predictions": predicted.rows()}, indent=1, allow_nan=False)


def _as_csv(predicted: Predicted) -> str:
    rows = [_columns(row) for row in predicted.rows()]
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue().rstrip("\n")


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    if "classes" in row or not isinstance(row.get("values", {}), dict):
        raise InputError("--csv", "one value, or one per class, label or column", "many per input", "take --json")
    named = row.get("probabilities") or row.get("values") or {}
    plain = {key: value for key, value in row.items() if key not in ("probabilities", "values")}
    return plain | {(f"probability of {key}" if "class" in row else key): value for key, value in named.items()}


FORMS = {"text": _as_text, "json": _as_json, "csv": _as_csv}


def _write(text: str, out: Path | None) -> None:
    if out is None:
        print(text)
        return
    make_folder("--out", out.parent)
    with replacing(out) as partial:
        partial.write_text(text + "\n")
    print(f"wrote {out}", file=sys.stderr)
