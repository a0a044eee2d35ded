"""Test accuracy and bytes where the client answers by itself as soon as its auxiliary head is sure: digits, CIFAR-10.

    python benchmarks/early_exit.py --data DIR   trains both, where they are not in --work yet; results/early_exit.json
    python benchmarks/early_exit.py              digits alone
    python benchmarks/early_exit.py --plot       docs/results/early-exit.svg from results/early_exit.json

Both trainings are short: what matters is the way between the head alone and the server half alone. A row is one
threshold of `halfpass predict --exit_above`, over the whole test set in batches of the run's size: bytes are those of
the messages that such a client and server exchange, counted in one process.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import halfpass
from halfpass.config import Config, DataConfig, ModelConfig, TrainConfig, as_dict
from halfpass.data.batches import test_batches
from halfpass.errors import HalfpassError
from halfpass.files import write_json
from halfpass.report.theme import COLOURS, INK, picture_file
from halfpass.run import setup
from halfpass.run.records import command_line, environment, read_config, refuse_changes
from halfpass.run.saved import SavedRun
from halfpass.tree import call, prediction
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.answering import Agreed, write_question
from halfpass.wire.messages import write_tensor

ROOT = Path(__file__).resolve().parents[1]
NEVER = "never"
SHOWN = (NEVER, 0.99, 0.95, 0.9, 0.8, 0.6, 0.0)  # in the figure: others would cover each other
THRESHOLDS: tuple[float | None, ...] = (None, 0.999, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.0)


def trainings(work: Path, data: str | None) -> list[Config]:
    """One thread each, so that it may run beside other work."""
    found = [Config(train=TrainConfig(epochs=4, threads=1), out=str(work / "digits"))]
    if data is not None:
        found.append(Config(
            data=DataConfig("cifar10", data, limit=5_000), model=ModelConfig("resnet20"),
            train=TrainConfig(epochs=3, test_every=3, threads=1), out=str(work / "cifar10"),
        ))  # fmt: skip
    return found


def trained(config: Config) -> SavedRun:
    if (config.folder / "result.json").is_file():
        refuse_changes(config.folder, config, as_dict(read_config(config.folder)))
    else:
        halfpass.train(config)
    return SavedRun([config.folder])


def rows_of(saved: SavedRun, config: Config) -> list[dict[str, Any]]:
    """One for each threshold."""
    torch.set_num_threads(1)
    signature = saved.signature("client_half")
    network = saved.network(signature)
    assert network.head is not None
    network.halves.client.load_state_dict(saved.weights("client_half"))
    network.head.load_state_dict(saved.weights("auxiliary_head"))
    network.halves.server.load_state_dict(saved.weights("server_half"))
    for part in (network.halves.client, network.head, network.halves.server):
        part.eval()
    data = setup.load_data(config.data)
    agreed = Agreed(signature.run, network.cut, network.fingerprint, config.wire.codec)
    made = list(_batches(network, data, config.train.at_once))
    return [_row(config, agreed, made, threshold) for threshold in THRESHOLDS]


Answered = tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]  # what crosses, head's and server's answers, labels


@torch.no_grad()
def _batches(network: Any, data: Any, size: int) -> Iterator[Answered]:
    task = network.task
    for inputs, labels in test_batches(data, data.test, size):
        crossing = call(network.halves.client, inputs)
        head, server = prediction(network.head(crossing[0])), prediction(network.halves.server(*crossing))
        yield crossing, task.probabilities(head.float()), task.probabilities(server.float()), labels


def _row(config: Config, agreed: Agreed, batches: Sequence[Answered], threshold: float | None) -> dict[str, Any]:
    samples = right = sent = right_of_head = up = down = 0
    for crossing, head, server, labels in batches:
        ask = torch.ones(len(labels), dtype=torch.bool) if threshold is None else head.amax(1) < threshold
        answers = torch.where(ask[:, None], server, head)
        hits = answers.argmax(1) == labels
        samples, right, sent = samples + len(labels), right + int(hits.sum()), sent + int(ask.sum())
        right_of_head += int(hits[~ask].sum())
        if ask.any():
            up += write_question(agreed, tuple(tensor[ask] for tensor in crossing)).ByteSize()
            down += pb.Answers(outputs=write_tensor(server[ask])).ByteSize()
    return {
        "data": config.data.name, "model": config.model.name, "exit above": NEVER if threshold is None else threshold,
        "accuracy %": 100 * right / samples, "sent %": 100 * sent / samples, "bytes up per sample": up / samples,
        "bytes down per sample": down / samples,
        "accuracy of what the head answered %": 100 * right_of_head / (samples - sent) if samples > sent else None,
        "samples": samples,
    }  # fmt: skip


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Accuracy against the share of bytes, a panel for each data set; some thresholds stand at their points."""
    names = list(dict.fromkeys(row["data"] for row in rows))

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("constrained")
        panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
        for axes, name, colour in zip(panels, names, COLOURS, strict=False):
            _panel(axes, [row for row in rows if row["data"] == name], colour)

    file.write_text(picture_file("early-exit", 2.8 * len(names), paint), encoding="utf-8")


def _panel(axes: Any, own: Sequence[dict[str, Any]], colour: str) -> None:
    most = max(row["bytes up per sample"] for row in own)
    x, y = [100 * row["bytes up per sample"] / most for row in own], [row["accuracy %"] for row in own]
    axes.plot(x, y, marker="o", color=colour)
    for row, left, height in zip(own, x, y, strict=True):
        if row["exit above"] in SHOWN:
            said = "all sent" if row["exit above"] == NEVER else f"{row['exit above']:g}"
            axes.annotate(said, (left, height), (0, -11), textcoords="offset points", ha="center", color=INK)
    axes.set(
        title=f"{own[0]['data']}, {own[0]['model']}", xlabel=f"% of {most:,.0f} bytes up per sample",
        ylabel="test accuracy (%)", xlim=(-6, 108),
    )  # fmt: skip
    axes.margins(y=0.2)
    axes.grid()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", help="folder of CIFAR-10, official layout")
    parser.add_argument("--work", type=Path, default=Path("runs/early-exit"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "early_exit.json")
    parser.add_argument("--plot", action="store_true", help="draw the figure from --out, measure nothing")
    options = parser.parse_args()
    if options.plot:
        draw(json.loads(options.out.read_text())["rows"], ROOT / "docs" / "results" / "early-exit.svg")
        return 0
    made = {"environment": environment(), "command": command_line("python benchmarks/early_exit.py")}
    try:
        configs = trainings(options.work, options.data)
        rows = [row for config in configs for row in rows_of(trained(config), config)]
    except HalfpassError as error:
        print(f"early_exit: {error}", file=sys.stderr)
        return error.exit_status
    write_json(options.out, {**made, "rows": rows})
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
