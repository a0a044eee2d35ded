"""Raw inputs, such as a picture file or a table's row, → what a network was trained on, without the data set.

A run saves a `Feeding` beside its weights. What is made here is what the data set itself would have made, bit for bit.
Check: `pytest tests/test_predict.py`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfpass.data.batches import as_network_inputs
from halfpass.data.own import from_array
from halfpass.data.pictures import PICTURE_SUFFIXES, decode
from halfpass.data.samples import INTEGERS, Dataset
from halfpass.data.tables import Rows, encode, read_rows
from halfpass.errors import InputError, reason
from halfpass.tree import Tree, flatten, unflatten

PICTURES, TABLE, ARRAYS = "pictures", "table", "arrays"
READS = {"imagefolder": PICTURES, "imagetable": PICTURES, "cifar10": PICTURES, "cifar100": PICTURES, "csv": TABLE}
MOST_ARRAY_BYTES = 2**33  # of an array or of those in a file, which is read whole
REMEDY = "train again, or restore the file"
Kinds = Mapping[str, tuple[str, tuple[int, ...]]]  # by name: dtype and shape of one sample


@dataclass(frozen=True)
class Feeding:
    """What a data set did to its raw inputs."""

    reads: str  # pictures, table or arrays
    inputs: Kinds  # raw: uint8 pictures (C, H, W) are normalized, all others are taken as they are
    mean: tuple[float, ...] = ()  # per channel of uint8 pictures, of pixels / 255
    std: tuple[float, ...] = ()
    gray_range: tuple[int, int] | None = None  # of 16-bit pictures: what is black and what is white
    columns: tuple[tuple[str, Any], ...] = ()  # of a table: (name, categories or "number")
    scales: tuple[tuple[str, float, float], ...] = ()  # (name, mean, deviation) of its numbers
    separator: str = ","

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        return self.inputs[""][1][-1]

    def batches(self, raw: Tree, size: int) -> list[Any]:
        """Raw samples → the network's inputs, `size` samples in each batch but the last."""
        named = flatten(raw)
        count = len(next(iter(named.values())))
        parts = [slice(first, min(first + size, count)) for first in range(0, count, size)]
        return [
            as_network_inputs(unflatten({name: leaf[part] for name, leaf in named.items()}), self.mean, self.std)
            for part in parts
        ]

    def pictures(self, files: Sequence[Path]) -> Tensor:
        """(N, 3, S, S) uint8; raises InputError that names a file which is no picture."""
        self._refuse_unless(PICTURES, "a picture file")
        for file in files:
            if not file.is_file():
                raise InputError(str(file), "a picture", "no such file", "check the path")
        size = self.image_size
        pixels = torch.empty(len(files), size, size, 3, dtype=torch.uint8)
        for i, file in enumerate(files):
            pixels[i] = torch.from_numpy(decode(file, size, self.gray_range))
        return pixels.permute(0, 3, 1, 2)

    def table(self, file: Path) -> tuple[Tensor, list[str], list[str]]:
        """((N, F) float32, the place of each row, what is to be said of them) of a CSV file. Columns that the network
        does not take, such as the target, are passed over."""
        self._refuse_unless(TABLE, "a table")
        return self._encoded(str(file), read_rows(file, self.separator))

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, list[str], list[str]]:
        """As `table`, of rows that are in memory: values by column."""
        self._refuse_unless(TABLE, "a table's row")
        places = [f"row {i}" for i in range(len(rows))]
        for place, row in zip(places, rows, strict=True):
            if missing := [name for name, _ in self.columns if name not in row]:
                raise InputError(place, f"a value of column {missing[0]!r}", "none", "give all columns")
        columns = {name: [str(row[name]) for row in rows] for name, _ in self.columns}
        return self._encoded("the rows", Rows(places, columns))

    def _encoded(self, place: str, rows: Rows) -> tuple[Tensor, list[str], list[str]]:
        names = [name for name, _ in self.columns]
        if missing := [name for name in names if name not in rows.columns]:
            found = ", ".join(list(rows.columns)[:20])
            raise InputError(place, f"a column {missing[0]!r}, as in training", f"columns {found}", "add it")
        values, notes = encode(rows, self.columns, self.scales)
        return values, rows.places, notes

    def array_file(self, file: Path) -> Tree:
        """The samples in an .npy file, or in an .npz file by the names of the inputs. Nothing is unpickled."""
        try:
            if file.stat().st_size > MOST_ARRAY_BYTES:
                raise ValueError(f"more than {MOST_ARRAY_BYTES} bytes")
            with file.open("rb") as opened:
                read = np.load(opened, allow_pickle=False)
                arrays = {name: read[name] for name in read.files} if isinstance(read, np.lib.npyio.NpzFile) else read
        except FileNotFoundError:
            raise InputError(str(file), "an array (.npy, .npz)", "no such file", "check the path") from None
        except Exception as error:  # NumPy and zipfile raise many kinds for what is no such file
            remedy = "write it with numpy.save or numpy.savez, of numbers alone"
            raise InputError(str(file), "an array (.npy, .npz)", reason(error), remedy) from None
        return self.arrays(arrays, str(file))

    def arrays(self, given: Any, place: str = "input") -> Tree:
        """Samples in memory, samples first: an array or tensor, or a mapping of them by the names of the inputs. Raises
        InputError where dtypes or shapes are not those of the training samples."""
        named = flatten(_tensors(place, given))
        expected = ", ".join(filter(None, self.inputs)) or "one array"
        if len(self.inputs) == 1 and len(named) == 1:  # whatever it is called
            named = {next(iter(self.inputs)): next(iter(named.values()))}
        if set(named) != set(self.inputs):
            found = ", ".join(map(repr, named)) if set(named) != {""} else "one array without a name"
            raise InputError(place, f"inputs {expected}", found, "give each by its name, in .npz or a dict")
        samples = {name: self._checked(f"{place} {name}".rstrip(), name, named[name]) for name in self.inputs}
        counts = {len(leaf) for leaf in samples.values()}
        if len(counts) != 1 or counts == {0}:
            found = " and ".join(map(str, sorted(counts)))
            raise InputError(place, "as many samples of each input, at least one", found, "give all of them")
        return unflatten(samples)

    def _checked(self, place: str, name: str, tensor: Tensor) -> Tensor:
        dtype, shape = self.inputs[name]
        expected = f"{dtype} of {('N', *shape)}".replace("'", "")
        if dtype == "float32" and tensor.is_floating_point():
            tensor = tensor.float()
        if dtype == "int64" and tensor.dtype in (*INTEGERS, torch.uint8):
            tensor = tensor.to(torch.int64)
        found = str(tensor.dtype).removeprefix("torch.")
        if tuple(tensor.shape) == shape and shape:  # a sample by itself
            tensor = tensor[None]
        if (found, tuple(tensor.shape[1:])) != (dtype, shape) or tensor.ndim < 1:
            remedy = "give samples as the training set had them, before any normalization"
            raise InputError(place, expected, f"{found} of {tuple(tensor.shape)}", remedy)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(place, "finite values", "NaN or infinity", "mend or remove them")
        return tensor

    def _refuse_unless(self, kind: str, given: str) -> None:
        if self.reads != kind:
            raise InputError("input", self.wants, given, "give that")

    @property
    def wants(self) -> str:
        """What can be given, in words."""
        kinds = "; ".join(f"{name} {dtype} of {('N', *shape)}".strip().replace("'", "")
                          for name, (dtype, shape) in self.inputs.items())  # fmt: skip
        arrays = f"arrays (.npy, .npz: {kinds})"
        if self.reads == PICTURES:
            return f"picture files ({', '.join(PICTURE_SUFFIXES)}), or {arrays}"
        if self.reads == TABLE:
            return f"a CSV file with the columns {', '.join(name for name, _ in self.columns)[:300]}"
        return arrays

    def as_text(self) -> str:
        """How to make the network's inputs of raw ones, for who has no halfpass."""
        if self.reads == TABLE:
            return ("columns in this order, as float32: a number is (value - mean) / deviation; a column of categories "
                    "is one 0 or 1 for each category in the order given")  # fmt: skip
        said = [f"{name or 'the input'} is {dtype} {shape}" for name, (dtype, shape) in self.inputs.items()]
        if self.mean:
            said.append("uint8 pixels become (pixels / 255 - mean) / std per channel, as float32")
        if self.reads == PICTURES:
            said.append(f"pictures are RGB, the shorter side resized to {self.image_size} pixels (bilinear), "
                        "the middle square kept")  # fmt: skip
        return "; ".join(said)


def _tensors(place: str, given: Any) -> Any:
    """Nested tuples and dicts of numbers, whatever these are held in, as one of tensors."""
    if isinstance(given, Mapping):
        return {str(key): _tensors(place, part) for key, part in given.items()}
    if isinstance(given, tuple):
        return tuple(_tensors(place, part) for part in given)
    try:
        return given.detach().cpu() if isinstance(given, Tensor) else from_array(np.asarray(given))
    except (TypeError, ValueError, OverflowError):
        raise InputError(place, "numbers", type(given).__name__, "convert them") from None


def feeding_of(data: Dataset, separator: str = ",") -> Feeding:
    """What is to be kept of a data set."""
    one = data.train.take(torch.arange(1))
    inputs = {
        name: (str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape[1:]))
        for name, leaf in flatten(one.inputs).items()
    }
    more = dict(data.sites) | dict(data.scales)
    grays, scales = more.get("gray range"), more.get("mean and deviation of columns", ())
    return Feeding(
        READS.get(data.name, ARRAYS), inputs, tuple(data.mean), tuple(data.std),
        None if grays is None else (int(grays[0]), int(grays[1])),
        tuple((str(name), kind) for name, kind in more.get("columns", ())),
        tuple((str(name), float(mean), float(std)) for name, mean, std in scales), separator,
    )  # fmt: skip


def feeding_as_dict(feeding: Feeding) -> dict[str, Any]:
    """Plain values, for JSON."""
    return dataclasses.asdict(feeding)


def feeding_from_dict(place: str, said: Any) -> Feeding:
    """The inverse of `feeding_as_dict`; raises InputError where it is none."""
    try:
        inputs = {str(name): (str(dtype), tuple(map(int, shape))) for name, (dtype, shape) in said["inputs"].items()}
        mean, std = (tuple(float(value) for value in said[key]) for key in ("mean", "std"))
        columns = tuple((str(n), kind if kind == "number" else [str(part) for part in kind])
                        for n, kind in said["columns"])  # fmt: skip
        scales = tuple((str(name), float(mean), float(std)) for name, mean, std in said["scales"])
        grays = said["gray_range"]
        made = Feeding(
            str(said["reads"]), inputs, mean, std, None if grays is None else (int(grays[0]), int(grays[1])),
            columns, scales, str(said["separator"]),
        )  # fmt: skip
        sound = made.reads in (PICTURES, TABLE, ARRAYS) and inputs and len(mean) == len(std) and all(
            math.isfinite(value) and value > 0 for value in std
        ) and all(n >= 0 for _, shape in inputs.values() for n in shape)
        sound = sound and {name for name, kind in columns if kind == "number"} <= {name for name, *_ in scales}
        sound = sound and (made.reads != TABLE or bool(columns))
        sound = sound and (made.reads != PICTURES or len(inputs.get("", ("", ()))[1]) == 3)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise InputError(f"{place}, how to feed it", "what halfpass wrote", reason(error), REMEDY) from None
    if not sound:
        raise InputError(f"{place}, how to feed it", "what halfpass wrote", "values that do not fit", REMEDY)
    return made
