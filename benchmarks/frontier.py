"""Test accuracy against the bytes at the socket, for every way to send less: CIFAR-10, ResNet-20, real processes.

    python benchmarks/frontier.py --data DIR              all trainings, hours; into results/frontier.json
    python benchmarks/frontier.py --data DIR --only "NAME; NAME" --jobs 1
    python benchmarks/frontier.py --plot                  docs/results/frontier.svg from results/frontier.json

Every training is `halfpass train --runtime processes` in a folder of its own under runs/frontier: what is finished
there is not trained again, so the command resumes where it stopped, and rows are written as they come. Rows are those
of result.json with what the table shows, in words. Seconds in them mean nothing: several trainings share the machine.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from halfpass.commands.grid import Member, grid_rows, read_pairs, run_grid
from halfpass.config import from_dict, nested
from halfpass.errors import HalfpassError
from halfpass.files import write_json
from halfpass.report.theme import COLOURS, INK, WHITE, picture_file
from halfpass.run.records import command_line, environment

ROOT = Path(__file__).resolve().parents[1]
REFERENCE, UNCOMPRESSED = "conventional, float32", "decoupled"  # what the ratios of every row are to
CODEC_ORDER = ["none", "fp16", "bf16", "int8", "int4", "int2"]
RECIPE = {
    "data.name": "cifar10", "model.name": "resnet20", "model.cut": "stage_2.2", "model.head": "linear",
    "train.epochs": 12, "train.precision": "bf16", "train.threads": 1,
}  # fmt: skip


def decoupled(codec: str, every: int = 1, replay: int = 1, **more: Any) -> dict[str, Any]:
    return {"method": "decoupled", "wire.codec": codec, "wire.every": every, "server.replay": replay, **more}


def conventional(codec: str, **more: Any) -> dict[str, Any]:
    return {"method": "conventional", "wire.codec": codec, **more}


# Under bf16 autocast what crosses is bfloat16 already, and `none` sends it as it is; codec bf16 would change nothing.
# Nor would leaving out zstd, but for the bytes; the table of codecs says how many.
RUNS: dict[str, dict[str, Any]] = {
    UNCOMPRESSED: decoupled("none"),
    "decoupled, int4+zstd": decoupled("int4+zstd"),
    "decoupled, int2+zstd": decoupled("int2+zstd"),
    "decoupled, int4+zstd, every 2, replay 2": decoupled("int4+zstd", 2, 2),
    "conventional": conventional("none"),
    "decoupled, int8+zstd": decoupled("int8+zstd"),
    REFERENCE: conventional("none", **{"train.precision": "fp32"}),
    "decoupled, micro-batches of 32": decoupled("none", **{"train.micro_batch": 32}),
    "decoupled, int4+zstd, every 4": decoupled("int4+zstd", 4),
    "decoupled, int4+zstd, every 4, replay 4": decoupled("int4+zstd", 4, 4),
    "conventional, int8+zstd": conventional("int8+zstd"),
    "decoupled, fp16": decoupled("fp16"),
    "conventional, fp16": conventional("fp16"),
    "decoupled, int4+zstd, every 2": decoupled("int4+zstd", 2),
    "decoupled, int4+zstd, replay 2": decoupled("int4+zstd", 1, 2),
    "decoupled, int2+zstd, every 2, replay 2": decoupled("int2+zstd", 2, 2),
    "decoupled, int8+zstd, feedback 16": decoupled("int8+zstd", **{"train.feedback_every": 16}),
    "decoupled, int8+zstd, feedback 4": decoupled("int8+zstd", **{"train.feedback_every": 4}),
    "decoupled, int8+zstd, feedback 1": decoupled("int8+zstd", **{"train.feedback_every": 1}),
}  # fmt: skip


def trainings(work: Path, changes: Mapping[str, Any]) -> list[Member]:
    """All of RUNS, with `changes` to the recipe, in folders under `work`."""
    members = []
    for name, settings in RUNS.items():
        out = work / name.replace(", ", "-").replace(" ", "")
        config = from_dict(nested({**RECIPE, **settings, "runtime": "processes", **changes, "out": str(out)}))
        members.append(Member(name, {}, config))
    return members


def socket_bytes(result: dict[str, Any]) -> int:
    return int(result["bytes"]["socket_up"] + result["bytes"]["socket_down"])


def rows(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Of all trainings that are finished, with the ratios where the reference is."""
    found = {row["training"]: row for row in grid_rows(members)}
    made = []
    for name, result in found.items():
        auxiliary, evaluation = result["aux_test_accuracy"], result["evaluation_bytes"]
        ratios: dict[str, float | None] = {
            "test_accuracy_percent": 100 * result["test_accuracy"],
            "aux_test_accuracy_percent": None if auxiliary is None else 100 * auxiliary,
            "socket_gigabytes": socket_bytes(result) / 1e9,
            "evaluation_gigabytes": (evaluation["up"] + evaluation["down"]) / 1e9,
            "times_less_than_conventional_float32": None, "points_below_uncompressed_decoupled": None,
        }  # fmt: skip
        if REFERENCE in found:
            ratios["times_less_than_conventional_float32"] = socket_bytes(found[REFERENCE]) / socket_bytes(result)
        if UNCOMPRESSED in found:
            lost = found[UNCOMPRESSED]["test_accuracy"] - result["test_accuracy"]
            ratios["points_below_uncompressed_decoupled"] = 100 * lost
        made.append({"training": name, "ratios": ratios} | result)
    return made


def draw(found: Sequence[dict[str, Any]], file: Path) -> None:
    """Accuracy against socket bytes, a logarithmic axis: colour for the codec, marker for what else is done."""
    codecs = list(dict.fromkeys(row["codec"].removesuffix("+zstd") for row in found))
    colours = dict(zip(sorted(codecs, key=CODEC_ORDER.index), COLOURS, strict=False))
    kinds = {kind: (marker, filled) for kind, marker, filled in map(_look, found)}

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        for row in found:
            _, marker, filled = _look(row)
            colour = colours[row["codec"].removesuffix("+zstd")]
            axes.plot(
                socket_bytes(row) / 1e9, 100 * row["test_accuracy"], linestyle="", marker=marker, markersize=6,
                color=colour, markerfacecolor=colour if filled else WHITE,
            )  # fmt: skip
        alone = statistics.median(row["aux_test_accuracy"] for row in found if _learns_alone(row))
        axes.axhline(100 * alone, color=INK, linestyle=":", linewidth=1)
        axes.annotate(
            "the client half and its own head, nothing sent", (0, 100 * alone), (4, -3), ha="left", va="top",
            xycoords=("axes fraction", "data"), textcoords="offset points",
        )  # fmt: skip
        axes.set(xscale="log", xlabel="GB of training at the socket, up and down")
        axes.set_ylabel("test accuracy, last epoch (%)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid()
        patches = [Line2D([], [], color=colour, linewidth=5, label=codec) for codec, colour in colours.items()]
        title = "codec, with or without zstd"
        figure.legend(handles=patches, loc="outside upper left", title=title, ncols=4, alignment="left")
        handles = [
            Line2D(
                [], [], linestyle="", marker=marker, markersize=6, color=INK, markerfacecolor=INK if full else WHITE,
                label=kind,
            )
            for kind, (marker, full) in kinds.items()
        ]
        figure.legend(handles=handles, loc="outside lower left")

    file.write_text(picture_file("frontier", 3.5 + 0.18 * len(kinds), paint), encoding="utf-8")


def _learns_alone(row: dict[str, Any]) -> bool:
    """Whether the client half learned from whole batches by its head alone: the same in all such rows."""
    return row["method"] == "decoupled" and not row.get("feedback_every") and not row.get("micro_batch")


def _look(row: dict[str, Any]) -> tuple[str, str, bool]:
    """(what is done beside encoding, marker, whether it is filled)"""
    if row["method"] == "conventional":
        return "conventional", "s", True
    if row.get("feedback_every"):
        marker = {1: "P", 4: "X", 16: "*"}[row["feedback_every"]]
        return f"decoupled, feedback every {row['feedback_every']}", marker, True
    if row.get("micro_batch"):
        return f"decoupled, micro-batches of {row['micro_batch']}", "D", True
    every, replay = row["every"], row["replay"]
    words = [f"every {every}"] * (every > 1) + [f"replay {replay}"] * (replay > 1)
    return ", ".join(["decoupled", *words]), {1: "o", 2: "^", 4: "v"}[every], replay == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of CIFAR-10, official layout")
    parser.add_argument("--only", help="names of trainings, separated by semicolons")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, of two processes each")
    parser.add_argument("--work", type=Path, default=Path("runs/frontier"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "frontier.json")
    parser.add_argument("--plot", action="store_true", help="draw docs/results/frontier.svg from --out, train nothing")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="NAME=VALUE", help="settings for all")
    options = parser.parse_args()
    if options.plot:
        draw(json.loads(options.out.read_text())["rows"], ROOT / "docs" / "results" / "frontier.svg")
        return 0
    if options.data is None:
        parser.error("--data is needed")
    names = [name.strip() for name in options.only.split(";")] if options.only else list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"--only: expected names of {'; '.join(RUNS)}, found {unknown[0]!r}")
    made = {"environment": environment(), "command": command_line("python benchmarks/frontier.py")}
    try:
        members = trainings(options.work, {"data.path": options.data, **read_pairs("--set", options.set)})

        def write_rows() -> None:
            for member in members:
                if member.finished:  # its store is gigabytes, and not needed any more
                    shutil.rmtree(member.folder / "store", ignore_errors=True)
            if found := rows(members):
                write_json(options.out, {**made, "rows": found})

        run_grid([member for member in members if member.name in names], options.jobs, write_rows)
    except HalfpassError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
