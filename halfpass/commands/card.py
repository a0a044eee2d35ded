"""A model card out of a finished run: Markdown with the YAML header that Hugging Face reads. Nothing in it is typed by
hand; what no run can know is marked for its author. Tests: tests/test_card.py."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from halfpass import bounded
from halfpass.config import Config
from halfpass.errors import InputError
from halfpass.files import refuse_file, replacing
from halfpass.run.records import read_result
from halfpass.run.saved import SavedRun
from halfpass.run.signature import Signature

TODO = "TODO by the author"
PIPELINES = {"segmentation": "image-segmentation", "regression": "tabular-regression"}
MOST_NAMES = 50  # of classes or columns
LEAK = {  # what crossed, by method
    "decoupled": "Activations at the cut and the labels of training samples went up; no gradient came down{feedback}. "
                 "In tests the auxiliary head's class probabilities went up too, where the task has any.",
    "conventional": "Activations at the cut and the labels of training samples went up, gradients came down.",
    "centralized": "Nothing was sent: all data were in one place.",
}  # fmt: skip


def write_card(folders: Sequence[Path], out: Path) -> None:
    """Raises InputError where there is no finished run."""
    refuse_file("--out", out)
    if not (folders[0] / "result.json").is_file():
        raise InputError(str(folders[0]), "a finished run's folder", "no result.json in it", "check the path")
    saved, result = SavedRun(folders), read_result(folders[0])
    text = model_card(saved, result)
    with replacing(out) as partial:
        partial.write_text(text)


def model_card(saved: SavedRun, result: Mapping[str, Any]) -> str:
    signature = _signature(saved)
    parts = [_header(saved.config, result, signature), *_body(saved, result, signature)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _signature(saved: SavedRun) -> Signature | None:
    """A client's, which knows of the data, or the server's; None where neither is here."""
    for part in ("whole", "client_half", "server_half"):
        try:
            return saved.signature(part)
        except InputError:
            continue
    return None


def _header(config: Config, result: Mapping[str, Any], signature: Signature | None) -> str:
    said: dict[str, Any] = {"library_name": "pytorch", "tags": ["halfpass", "split-learning", config.method]}
    if (pipeline := _pipeline(config, signature)) is not None:
        said["pipeline_tag"] = pipeline
    metrics = [
        {"type": name, "value": round(float(value), 6)} for name, value in (result.get("test") or {}).items()
        if isinstance(value, int | float)
    ]  # fmt: skip
    if metrics and pipeline is not None:
        data = {"name": str(result.get("dataset") or "the clients' own"), "type": _slug(str(result.get("dataset")))}
        run = {"task": {"type": pipeline}, "dataset": data, "metrics": metrics}
        said["model-index"] = [{"name": f"{config.model.name} ({config.method})", "results": [run]}]
    return f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True).strip()}\n# license: {TODO}\n---"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _pipeline(config: Config, signature: Signature | None) -> str | None:
    task, feeding = config.task.name, None if signature is None else signature.feeding
    if task == "classification":
        pictures = feeding is not None and bool(feeding.mean)
        table = feeding is not None and feeding.reads == "table"
        return "image-classification" if pictures else "tabular-classification" if table else None
    return PIPELINES.get(task) if task == "segmentation" or (feeding is not None and feeding.reads == "table") else None


# --- the text ---------------------------------------------------------------------------------------------------------


def _body(saved: SavedRun, result: Mapping[str, Any], signature: Signature | None) -> Iterator[str]:
    config = saved.config
    yield f"# {config.model.name}, trained by {config.method} split learning" if config.method != "centralized" else (
        f"# {config.model.name}, trained in one place"
    )
    yield f"**Purpose and users:** {TODO}: what it is for, and what not."
    yield "## Score\n\n" + _scores(result)
    yield "## Data\n\n" + "\n".join(f"- {line}" for line in _data(saved, result, signature))
    yield "## Training\n\n" + _table(_settings(config, result, signature))
    if sites := result.get("sites"):
        yield "## Score of each site\n\n" + _sites(sites)
    yield "## Bytes and memory\n\n" + _table(_bytes(result))
    yield "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(config))
    yield "## How to load it\n\n" + _loading(config, signature)


def _scores(result: Mapping[str, Any]) -> str:
    rows = []
    names = {"test": "server half", "aux_test": "client half and its auxiliary head", "joint_test": "both, averaged"}
    for part, who in names.items():
        for metric, value in (result.get(part) or {}).items():
            rows.append((who if result.get("method") != "centralized" else "network", metric, _number(value)))
    if not rows:
        return f"No score was recorded. {TODO}."
    head = "| who answers | metric | last epoch, test set |\n| --- | --- | ---: |\n"
    return head + "\n".join(f"| {who} | {metric} | {value} |" for who, metric, value in rows)


def _sites(sites: Sequence[Mapping[str, Any]]) -> str:
    metrics = list(dict.fromkeys(name for site in sites for name in (site.get("test") or {})))
    head = f"| client | test samples | {' | '.join(metrics)} |\n| ---: | ---: | {' | '.join('---:' for _ in metrics)} |"
    rows = [
        f"| {site['client']} | {site['samples']} | "
        + " | ".join(_number((site.get("test") or {}).get(metric)) for metric in metrics) + " |"
        for site in sites
    ]  # fmt: skip
    return "\n".join([head, *rows])


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _counts(run: Path) -> str:
    """Of the samples, as the rows of the last epoch have it."""
    file = run / "metrics.jsonl"
    try:
        rows = [bounded.parse_json(line) for line in bounded.read_text(file, bounded.MOST_JSON_BYTES).splitlines()]
        last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
        trained = sum(row["samples"] for row in last if row["process"] not in ("server", "edge"))
        tested = next((row["tested"] for row in reversed(last) if row["tested"]), None)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return f"Numbers of samples: {TODO}."
    return f"Training samples in an epoch: {trained:,}." + ("" if tested is None else f" Test samples: {tested:,}.")


def _data(saved: SavedRun, result: Mapping[str, Any], signature: Signature | None) -> Iterator[str]:
    config = saved.config
    yield f"Data set: {result.get('dataset') or 'the clients’ own'}. Its origin, who is in it, its licence: {TODO}."
    yield _counts(saved.folders[0])
    yield f"Clients: {config.clients.count}, partition {config.clients.partition}" + (
        f" (alpha {config.clients.alpha:g})." if config.clients.partition == "dirichlet" else "."
    )
    if signature is None:
        return
    if signature.names:
        more = "" if len(signature.names) <= MOST_NAMES else f" and {len(signature.names) - MOST_NAMES} more"
        yield f"Outputs: {signature.outputs}: {', '.join(signature.names[:MOST_NAMES])}{more}."
    else:
        yield f"Outputs: {signature.outputs}, without names."
    if signature.feeding is not None:
        yield f"Inputs: {signature.feeding.as_text()}."


def _settings(config: Config, result: Mapping[str, Any], signature: Signature | None) -> Iterator[tuple[str, Any]]:
    yield "method", config.method
    yield "task", config.task.name
    if config.method != "centralized":
        yield "cut behind", result.get("cut") or (None if signature is None else signature.cut)
        yield "second cut, of an edge", config.model.edge_cut
        yield "auxiliary head", config.model.head if config.method == "decoupled" else None
        yield "topology", config.clients.topology if config.clients.count > 1 else None
        yield "codec", config.wire.codec
        yield "gradient of every so many batches", config.train.feedback_every
    yield "initial weights", config.model.weights or ("published ones" if config.model.pretrained else None)
    train = config.train
    yield "epochs", train.epochs
    yield "batch size", train.batch_size
    yield "optimizer", train.optimizer
    yield "learning rate", f"{train.lr:g}, {train.schedule}"
    yield "weight decay", train.weight_decay
    yield "precision", train.precision
    yield "seed", train.seed
    yield "training time, s", result.get("train_seconds")
    environment = result.get("environment") or {}
    yield "hardware", environment.get("hardware") or environment.get("cpu")
    yield "PyTorch", environment.get("torch")
    yield "halfpass", environment.get("halfpass") or environment.get("commit")


def _bytes(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for way, kinds in (result.get("bytes") or {}).items():
        if isinstance(kinds, Mapping):
            for kind, count in kinds.items():
                yield f"{way}: {kind}, bytes", count or None
        else:
            yield f"{way.replace('_', ' ')}, bytes", kinds
    for way, count in (result.get("evaluation_bytes") or {}).items():
        yield f"in tests {way}, bytes", count or None
    for who, peak in (result.get("peak_memory_bytes") or {}).items():
        peak = max(peak, default=None) if isinstance(peak, list) else peak
        yield f"peak memory of {'one process' if who == 'colocated' else who}, bytes", peak


def _table(pairs: Iterator[tuple[str, Any]]) -> str:
    known = [(name, value) for name, value in pairs if value is not None]
    rows = [f"| {name} | {f'{value:,}' if isinstance(value, int) else _number(value)} |" for name, value in known]
    return "\n".join(["| what | value |", "| --- | --- |", *rows]) if rows else "Nothing was recorded."


def _limits(config: Config) -> Iterator[str]:
    every = config.train.feedback_every
    feedback = "" if every is None else f", but of one batch in {every}"
    yield LEAK[config.method].format(feedback=feedback)
    if config.method != "centralized":
        yield ("Activations tell something of the inputs: this is no privacy guarantee. See halfpass's "
               "docs/concepts/threat-model.md for who sees what.")  # fmt: skip
        if config.clients.count > 1 and config.clients.topology != "independent":
            yield "The clients' halves passed through the server, which hands them on."
    yield "One training with one seed; the score of another may differ."
    yield f"Groups and conditions on which it was not tested, and known failures: {TODO}."


def _loading(config: Config, signature: Signature | None) -> str:
    example = "inputs"
    if signature is not None and signature.feeding is not None:
        example = {"pictures": '"picture.png"', "table": '"table.csv"'}.get(signature.feeding.reads, "array")
    code = ", allow_code=True" if ":" in config.model.name or ":" in config.task.name else ""
    return (
        "```python\nimport halfpass\n\n"
        f'predicted = halfpass.load("RUN"{code}).predict({example})  # RUN: the folder of this run\n'
        "print(predicted.rows())\n```\n\n"
        "`halfpass export RUN --format state` writes a state dict for the network's own code, `--format onnx` ONNX; a "
        "JSON file beside says how to feed either."
    )
