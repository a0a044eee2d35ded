"""`halfpass cuts`: every place where a network can be cut, as a table."""

from rich.console import Console
from rich.table import Table

from halfpass.config import Config, DataConfig, ModelConfig, TaskConfig
from halfpass.data.datasets import KNOWN_SHAPES
from halfpass.networks.cut_table import CutRow, cut_table
from halfpass.run.network import names_of, some_samples
from halfpass.run.setup import load_data, task_of


def print_cuts(model: ModelConfig, data: DataConfig, task: TaskConfig) -> None:
    """Prints one row per cut. The data set is read only where its sample shape is not known by its name."""
    samples = None
    if data.name in KNOWN_SHAPES:
        sample_shape, classes = KNOWN_SHAPES[data.name]
        shape = "×".join(map(str, sample_shape))
    else:
        read = load_data(data)
        sample_shape, samples = read.train.sample_shape, some_samples(read)
        classes = task_of(Config(data=data, model=model, task=task), read).outputs
        shape = read.train.kinds()[0]
    rows = cut_table(
        model.name, sample_shape, classes, model.head, samples=samples, frozen=model.freeze, may_cross=names_of(model),
    )
    what = "classes" if task.name == "classification" else "outputs"
    print(f"{model.name} on {data.name} ({shape}, {classes} {what}), head {model.head}; FLOPs of one forward pass")
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(_table(rows))
    if not rows:
        print("no layer can be cut; halfpass train --model.cut LAYER says what stands against it")


def _table(rows: list[CutRow]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("cut")
    columns = ("crosses", "kB/sample", "client params", "server params", "client MFLOP", "server MFLOP", "head params",
               "head MFLOP")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        crosses = " + ".join("×".join(map(str, shape)) for shape in row.activation_shapes)
        table.add_row(", ".join([row.layer, *row.also]), crosses,
                      f"{row.activation_bytes_per_sample / 1e3:.1f}",
                      f"{row.client_parameters:,}" + ("" if row.client_trained else " (frozen)"),
                      f"{row.server_parameters:,}", f"{row.client_flops / 1e6:.2f}", f"{row.server_flops / 1e6:.2f}",
                      _or_dash(row.head_parameters, "{:,}"),
                      _or_dash(row.head_flops and row.head_flops / 1e6, "{:.3f}"))  # fmt: skip
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
