"""`halfpass cuts`: every place where a network can be cut, what each costs, and which to take. Nothing is trained: what
a cut costs is measured by one forward pass on the CPU (`halfpass/networks/cut_table.py`). Tests: tests/test_cuts.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from halfpass.config import Config
from halfpass.data.datasets import KNOWN_SHAPES
from halfpass.errors import InputError
from halfpass.files import refuse_file, replacing
from halfpass.networks.cut_table import CutRow, cut_table
from halfpass.run.network import NO_HEAD, names_of, some_samples
from halfpass.run.setup import load_data, task_of

AFFORD = 50.0  # per cent of the computing
BAR = 14  # columns
FIGURES = (".svg", ".pdf", ".png")
PIPE_COLUMNS = 160


@dataclass(frozen=True)
class Choice:
    """What a cut costs, as shares of the whole network; the client has the head too."""

    row: CutRow
    client_flops: int  # of a sample's forward pass
    client_share: float  # per cent of the computing of client, head and server
    client_parameters: int

    @property
    def kilobytes(self) -> float:
        """Of a sample, in float32."""
        return self.row.activation_bytes_per_sample / 1e3


def print_cuts(config: Config, afford: float = AFFORD, numbers: bool = False) -> None:
    """Prints the cuts, and writes a figure of them to `config.out`, where that is a file. The data set is read only
    where its sample shape is not known by its name."""
    if not 0 < afford <= 100:
        raise InputError("--afford", "per cent of the computing, above 0 and at most 100", f"{afford:g}", "correct it")
    figure = None if config.out is None else _figure_file(Path(config.out))
    title, rows = _rows(config)
    choices = [_choice(row) for row in rows]
    taken = recommended(choices, afford, with_head=_needs_head(config))
    print(title)
    console = Console()
    console = console if console.is_terminal else Console(width=PIPE_COLUMNS)
    console.print(_drawing(choices, taken))
    if numbers:
        console.print(_table(rows))
    print(advice(choices, taken, afford))
    if figure is not None:
        with replacing(figure) as partial:
            _write_figure(partial, figure.suffix, title, choices, taken)
        print(f"figure: {figure}")


def _needs_head(config: Config) -> bool:
    return config.method == "decoupled" and config.model.head != NO_HEAD


def _rows(config: Config) -> tuple[str, list[CutRow]]:
    """What is cut, in words, and its cuts."""
    model, data = config.model, config.data
    samples = None
    if data.name in KNOWN_SHAPES:
        sample_shape, classes = KNOWN_SHAPES[data.name]
        shape = "×".join(map(str, sample_shape))
    else:
        read = load_data(data)
        sample_shape, samples = read.train.sample_shape, some_samples(read)
        classes, shape = task_of(config, read).outputs, read.train.kinds()[0]
    head = "linear" if model.head == NO_HEAD else model.head
    rows = cut_table(
        model.name, sample_shape, classes, head, samples=samples, frozen=model.freeze, may_cross=names_of(model),
    )  # fmt: skip
    what = "classes" if config.task.name == "classification" else "outputs"
    return f"{model.name} on {data.name} ({shape}, {classes} {what}), head {model.head}, which the client has too", rows


def _choice(row: CutRow) -> Choice:
    flops, parameters = row.client_flops + (row.head_flops or 0), row.client_parameters + (row.head_parameters or 0)
    return Choice(row, flops, 100 * flops / max(1, flops + row.server_flops), parameters)


def recommended(choices: Sequence[Choice], afford: float, *, with_head: bool) -> Choice | None:
    """Of the cuts at which the client and its head compute at most `afford` per cent, and where the head fits, that
    which sends the fewest bytes; of several the latest, for a head learns better behind more layers. None where there
    is no such cut."""
    possible = [
        choice for choice in choices
        if choice.client_share <= afford and (choice.row.head_parameters is not None or not with_head)
    ]  # fmt: skip
    return min(reversed(possible), key=lambda choice: choice.row.activation_bytes_per_sample, default=None)


def advice(choices: Sequence[Choice], taken: Choice | None, afford: float) -> str:
    """One line: which cut to take, and why."""
    if not choices:
        return "no layer can be cut; halfpass train --model.cut LAYER says what stands against it"
    if taken is None:
        least = min(choices, key=lambda choice: choice.client_share)
        return (
            f"no cut leaves the client at most {afford:g} % of the computing: the least is {least.row.layer}, "
            f"{least.client_share:.0f} %; give --afford {least.client_share + 1:.0f}, or another head"
        )
    equal = [c for c in choices if c.kilobytes == taken.kilobytes and c.client_share <= afford]
    latest = ", and is the latest that does" if len(equal) > 1 else ""
    return (
        f"take {taken.row.layer}: of the cuts at which the client computes at most {afford:g} % (--afford), it sends "
        f"the least, {taken.kilobytes:,.1f} kB a sample{latest}; the client computes {taken.client_share:.0f} %"
    )


# ------------------------------------------------------------------------------------------------- on the terminal


def _drawing(choices: Sequence[Choice], taken: Choice | None) -> Table:
    """The recommended cut is marked by an arrow and in bold."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("cut", overflow="fold")
    for column in ("crosses", "kB a sample", "client computes %", "client's parameters"):
        table.add_column(column, no_wrap=column != "crosses")
    largest = [max((value for value in values), default=0) for values in zip(*map(_drawn, choices), strict=True)]
    for choice in choices:
        cells = [f"{_bar(value, most)} {text}" for value, most, text in zip(
            _drawn(choice), largest, _texts(choice), strict=True
        )]  # fmt: skip
        mark = "→ " if choice is taken else "  "
        table.add_row(f"{mark}{_names(choice.row)}", _crossing(choice.row), *cells,
                      style="bold" if choice is taken else None)  # fmt: skip
    return table


def _drawn(choice: Choice) -> tuple[float, float, float]:
    return choice.kilobytes, choice.client_share, choice.client_parameters


def _texts(choice: Choice) -> tuple[str, str, str]:
    share = f"{choice.client_share:.0f}" if choice.row.head_parameters is not None else f"{choice.client_share:.0f} –"
    frozen = "" if choice.row.client_trained else " (frozen)"
    return f"{choice.kilobytes:,.1f}", share, f"{choice.client_parameters:,}{frozen}"


def _bar(value: float, most: float) -> str:
    """To an eighth of a column."""
    eighths = round(8 * BAR * value / most) if most else 0
    full, rest = divmod(eighths, 8)
    return ("█" * full + " ▏▎▍▌▋▊▉"[rest]).ljust(BAR + 1)[: BAR + 1] if eighths else "▏".ljust(BAR + 1)


def _names(row: CutRow) -> str:
    return ", ".join([row.layer, *row.also])


def _crossing(row: CutRow) -> str:
    return " + ".join("×".join(map(str, shape)) for shape in row.activation_shapes)


def _table(rows: list[CutRow]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, title="FLOPs of a sample's forward pass")
    table.add_column("cut")
    columns = ("client params", "server params", "client MFLOP", "server MFLOP", "head params", "head MFLOP")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.layer, f"{row.client_parameters:,}" + ("" if row.client_trained else " (frozen)"),
                      f"{row.server_parameters:,}", f"{row.client_flops / 1e6:.2f}", f"{row.server_flops / 1e6:.2f}",
                      _or_dash(row.head_parameters, "{:,}"),
                      _or_dash(row.head_flops and row.head_flops / 1e6, "{:.3f}"))  # fmt: skip
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


# ------------------------------------------------------------------------------------------------------ as a figure


def _figure_file(file: Path) -> Path:
    if file.suffix not in FIGURES:
        raise InputError("out", f"a file that ends in {', '.join(FIGURES)}", str(file), "name it so")
    refuse_file("out", file)
    return file


def _write_figure(file: Path, suffix: str, title: str, choices: Sequence[Choice], taken: Choice | None) -> None:
    from halfpass.report.cut_figure import cut_figure

    columns = [
        ("kB a sample", [choice.kilobytes for choice in choices]),
        ("client computes %", [choice.client_share for choice in choices]),
        ("client's parameters", [float(choice.client_parameters) for choice in choices]),
    ]
    names = [choice.row.layer for choice in choices]
    chosen = None if taken is None else choices.index(taken)
    file.write_bytes(cut_figure(title, names, columns, chosen, suffix.removeprefix(".")))
