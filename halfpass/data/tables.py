"""Tables: CSV files of numbers and categories, and target columns. Check: `pytest tests/test_own_data.py`.

Numbers are standardized by the training rows' mean and deviation, categories become one 0-or-1 value each. One target
column of text, of names in data.classes, or of 0, 1, 2 and so on, is a class, int64; of other numbers, float32. Several
are float32 (N, L), NaN where a value is missing.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfpass.data.own import class_names, with_overlap
from halfpass.data.samples import Dataset, Samples, outputs
from halfpass.data.source import Source, comma_separated
from halfpass.errors import InputError, choice_error, reason
from halfpass.seed import derive_seed

MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}  # whatever their case
MOST_CATEGORIES = 1000  # of one column


@dataclass(frozen=True)
class Rows:
    """Rows of one split, by column; `places` says where each was read."""

    places: list[str]
    columns: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.places)

    def error(self, i: int, column: str, expected: str, remedy: str) -> InputError:
        found = repr(self.columns[column][i])
        return InputError(f"{self.places[i]}, column {column!r}", expected, found, remedy)


def read_table(source: Source) -> Dataset:
    """Inputs (N, F) float32 of all columns but the target and those that data.ignore names."""
    train, test = read_splits(source)
    targets, names = read_targets(source, train, test)
    ignored, categories = comma_separated(source.ignore), _categories(source.categorical)
    for setting, chosen in (("ignore", ignored), ("categorical", tuple(categories))):
        for column in chosen:
            if column not in train.columns:
                raise choice_error(f"data.{setting}", train.columns, column)
    left_out = (*comma_separated(source.target), *ignored)
    parts, columns, scales, notes = [], [], [], []
    for column in (name for name in train.columns if name not in left_out):
        if column in categories or not _is_numeric(train, test, column):
            given = categories.get(column)
            choices = given or _choices(train, column)
            parts.append([_one_hot(rows, column, choices, strict=bool(given)) for rows in (train, test)])
            columns.append([column, list(choices)])
            notes += _unseen(source.name, test, column, choices)
        else:
            values = [_numbers(rows, column) for rows in (train, test)]
            mean, std = float(values[0].mean()), float(values[0].std()) or 1.0
            parts.append([_standardized(value, mean, std) for value in values])
            columns.append([column, "number"])
            scales.append([column, mean, std])
    if not parts:
        raise InputError("data.ignore", "at least one column beside the target", "none", "leave columns in")
    first, second = (
        Samples(torch.from_numpy(np.concatenate([part[i] for part in parts], 1)).float(), targets[i]) for i in (0, 1)
    )
    return with_overlap(Dataset(
        source.name, first, second, number_of_outputs(source, first, second, names), (), (), names=names,
        notes=tuple(notes), sites=(("columns", columns),), scales=(("mean and deviation of columns", scales),),
    ))  # fmt: skip


def encode(
    rows: Rows, columns: Sequence[tuple[str, Any]], scales: Sequence[tuple[str, float, float]]
) -> tuple[Tensor, list[str]]:
    """((N, F) float32, what is to be said of it) of further rows, by what a data set says of its columns: names with
    categories or "number", in order, and (name, mean, deviation) of the numbers."""
    known, parts, notes = {name: (mean, std) for name, mean, std in scales}, [], []
    for column, kind in columns:
        if kind == "number":
            parts.append(_standardized(_numbers(rows, column), *known[column]))
        else:
            parts.append(_one_hot(rows, column, tuple(kind), strict=False))
            notes += _unseen("csv", rows, column, tuple(kind))
    return torch.from_numpy(np.concatenate(parts, 1)).float(), notes


def _standardized(values: np.ndarray, mean: float, std: float) -> np.ndarray:
    """(N,) → (N, 1)"""
    return ((values - mean) / std)[:, None]


def number_of_outputs(source: Source, train: Samples, test: Samples, names: tuple[str, ...]) -> int:
    counted = source.classes is not None and source.classes.isdigit()
    return int(str(source.classes)) if counted else outputs(train, test, names)


# --- Rows -------------------------------------------------------------------------------------------------------------


def read_splits(source: Source) -> tuple[Rows, Rows]:
    """Training and test rows: `train.csv` and `test.csv` in the folder data.path, or the one file that it is, of which
    data.test_share is tested on, always the same rows."""
    path = source.folder("a folder with train.csv and test.csv, or one file")
    if len(source.separator) != 1:
        raise InputError("data.separator", "one character", repr(source.separator), "it is a comma in most files")
    if path.is_dir():
        if source.test_share is not None:
            expected = f"its default where {path} has train.csv and test.csv"
            raise InputError("data.test_share", expected, str(source.test_share), "leave it out")
        train, test = (read_rows(path / f"{part}.csv", source.separator) for part in ("train", "test"))
        if different := sorted(train.columns.keys() ^ test.columns.keys()):
            where = "train.csv" if different[0] in train.columns else "test.csv"
            found = f"{different[0]!r} only in {where}"
            raise InputError(str(path), "the same columns in both files", found, "mend one")
    else:
        rows = read_rows(path, source.separator)
        if source.test_share is None:
            raise InputError("data.test_share", f"a share of {path} to be tested on", "none", "0.2 is usual")
        tested = round(source.test_share * len(rows))
        if not 0 < tested < len(rows):
            found = f"{source.test_share} of {len(rows)} rows"
            raise InputError("data.test_share", "a share that leaves rows to both", found, "0.2 is usual")
        draws = torch.Generator().manual_seed(derive_seed("test share"))
        order = torch.randperm(len(rows), generator=draws).tolist()
        train, test = _rows(rows, sorted(order[tested:])), _rows(rows, sorted(order[:tested]))
    return _rows(train, range(min(len(train), source.limit or len(train)))), _rows(
        test, range(min(len(test), source.limit or len(test)))
    )


def _rows(rows: Rows, chosen: Sequence[int]) -> Rows:
    columns = {name: [values[i] for i in chosen] for name, values in rows.columns.items()}
    return Rows([rows.places[i] for i in chosen], columns)


def read_rows(file: Path, separator: str) -> Rows:
    """All rows of a CSV file with a header; raises InputError where it is none."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as content:
            reader = csv.reader(content, delimiter=separator, strict=True)
            header = [name.strip() for name in next(reader, [])]
            read = [(f"{file}, row {reader.line_num}", [value.strip() for value in row]) for row in reader if row]
    except FileNotFoundError:
        raise InputError(str(file), "a CSV file", "no such file", "check data.path") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(str(file), "a CSV file in UTF-8", reason(error), "mend it") from error
    if len(set(header)) < len(header) or "" in header or not header:
        wrong = next((name for name in header if header.count(name) > 1), "none" if not header else "an empty one")
        raise InputError(f"{file}, row 1", "a name for each column, each once", repr(wrong), "name the columns")
    for place, row in read:
        if len(row) != len(header):
            raise InputError(place, f"{len(header)} values, as in the header", f"{len(row)}", "check data.separator")
    if not read:
        raise InputError(str(file), "rows below the header", "none", "give it some")
    columns = {name: [row[i] for _, row in read] for i, name in enumerate(header)}
    return Rows([place for place, _ in read], columns)


# --- Values -----------------------------------------------------------------------------------------------------------


def _missing(value: str) -> bool:
    return value.casefold() in MISSING


def _number(value: str) -> float | None:
    try:
        number = math.nan if "_" in value else float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_numeric(*splits_and_column: Any) -> bool:
    """Whether the column holds numbers. Raises InputError where it holds numbers and text, which may be a slip."""
    *splits, column = splits_and_column
    numbers = [[_number(value) is not None or _missing(value) for value in rows.columns[column]] for rows in splits]
    if not any(map(any, numbers)):
        return False
    if all(map(all, numbers)):
        return True
    written = any(_number(value) is not None for rows in splits for value in rows.columns[column])
    if not written:
        return False  # text, and missing values, which `_one_hot` names
    rows, i = next((rows, row.index(False)) for rows, row in zip(splits, numbers, strict=True) if False in row)
    remedy = "correct it, or name the column in data.categorical"
    raise rows.error(i, column, "a number, like others of this column", remedy)


def _numbers(rows: Rows, column: str, *, missing: bool = False) -> np.ndarray:
    """(N,) float64; NaN where a value is missing, if it may be."""
    numbers = [_number(value) for value in rows.columns[column]]
    for i, number in enumerate(numbers):
        if number is None and not (missing and _missing(rows.columns[column][i])):
            expected = "a number, or nothing" if missing else "a number"
            raise rows.error(i, column, expected, "fill it in, or leave the row out")
    return np.array([math.nan if number is None else number for number in numbers])


def _categories(text: str | None) -> dict[str, tuple[str, ...]]:
    """`color=red|green,ward` → categories by column, none where the training rows are to tell."""
    pairs = (part.partition("=") for part in comma_separated(text))
    return {name.strip(): tuple(part.strip() for part in named.split("|")) if named else () for name, _, named in pairs}


def _choices(rows: Rows, column: str) -> tuple[str, ...]:
    for i, value in enumerate(rows.columns[column]):
        if _missing(value):
            raise rows.error(i, column, "a value", "fill it in, or leave the row out")
    choices = tuple(sorted(set(rows.columns[column])))
    if len(choices) > MOST_CATEGORIES:
        found = f"{len(choices)} different ones"
        raise InputError(f"column {column!r}", f"at most {MOST_CATEGORIES} categories", found, "name it in data.ignore")
    return choices


def _one_hot(rows: Rows, column: str, choices: tuple[str, ...], *, strict: bool) -> np.ndarray:
    """(N, categories). `strict`: the categories were given, and no others may be in the training rows."""
    values = rows.columns[column]
    for i, value in enumerate(values):
        if _missing(value) and value not in choices:
            raise rows.error(i, column, "a value", "fill it in, or leave the row out")
        if strict and value not in choices:
            raise rows.error(i, column, f"a category of {', '.join(choices)}", "name it in data.categorical too")
    return (np.array(values)[:, None] == np.array(choices)).astype(np.float64)


def _unseen(name: str, test: Rows, column: str, choices: tuple[str, ...]) -> list[str]:
    unseen = [i for i, value in enumerate(test.columns[column]) if value not in choices]
    if not unseen:
        return []
    where, value = test.places[unseen[0]], test.columns[column][unseen[0]]
    said = f"{value!r} is in no training row and counts as none of its categories ({len(unseen)} rows)"
    return [f"data {name}: {where}, column {column!r}: {said}"]


# --- Targets ----------------------------------------------------------------------------------------------------------


def read_targets(source: Source, train: Rows, test: Rows) -> tuple[list[Tensor], tuple[str, ...]]:
    """Targets of both splits, and the names of classes or target columns."""
    columns = comma_separated(source.target)
    if not columns:
        remedy = f"choose of {', '.join(train.columns)}"
        raise InputError("data.target", "the target column, or several", "none", remedy)
    for column in columns:
        if column not in train.columns:
            raise choice_error("data.target", train.columns, column)
    if len(columns) > 1:
        values = [np.stack([_numbers(rows, column, missing=True) for column in columns], 1) for rows in (train, test)]
        return [torch.from_numpy(value).float() for value in values], columns
    column, names = columns[0], class_names(source.classes)
    for rows in (train, test):
        for i, value in enumerate(rows.columns[column]):
            if _missing(value) and value not in names:
                raise rows.error(i, column, "a target", "fill it in, or leave the row out")
    numeric = not names and source.target_kind != "classes" and _is_numeric(train, test, column)
    if numeric or source.target_kind == "numbers":
        numbers = [_numbers(rows, column) for rows in (train, test)]
        seen = np.unique(np.concatenate(numbers))
        counted = np.array_equal(seen, np.arange(len(seen))) or (source.classes is not None and _whole(seen))
        dtype = torch.int64 if counted and source.target_kind == "auto" else torch.float32
        return [torch.from_numpy(value).to(dtype) for value in numbers], ()
    names = names or tuple(sorted({*train.columns[column], *test.columns[column]}))
    return [_class_numbers(rows, column, names) for rows in (train, test)], names


def _whole(values: np.ndarray) -> bool:
    return bool((values == np.floor(values)).all() and values[0] >= 0)


def _class_numbers(rows: Rows, column: str, names: tuple[str, ...]) -> Tensor:
    numbers = {name: number for number, name in enumerate(names)}
    for i, value in enumerate(rows.columns[column]):
        if value not in numbers:
            raise rows.error(i, column, f"a class of data.classes, {', '.join(names)}", "name it there too")
    return torch.tensor([numbers[value] for value in rows.columns[column]], dtype=torch.int64)
