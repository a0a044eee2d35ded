"""A table of picture files and their targets. Check: `pytest tests/test_own_data.py`."""

from pathlib import Path

from torch import Tensor

from halfpass.data.imagefolder import IMAGENET_MEAN, IMAGENET_STD
from halfpass.data.own import with_overlap
from halfpass.data.pictures import PICTURE_SUFFIXES, Pictures, Range, check_size, gray_range, read_pictures
from halfpass.data.samples import Dataset, Samples
from halfpass.data.source import Source, comma_separated
from halfpass.data.tables import Rows, number_of_outputs, read_splits, read_targets
from halfpass.errors import choice_error


def read_imagetable(source: Source) -> Dataset:
    """Pictures whose paths are in the column data.picture (the first one, by default), from the table's folder on, and
    targets as `tables.py` reads them."""
    check_size(source.image_size)
    splits = read_splits(source)
    column = source.picture or next(iter(splits[0].columns))
    if column not in splits[0].columns:
        raise choice_error("data.picture", splits[0].columns, column)
    targets, names = read_targets(source, *splits)
    root = source.folder("the table")
    root = root if root.is_dir() else root.parent
    files = [_files(root, rows, column) for rows in splits]
    grays = gray_range((file for split in files for file in split), source.gray_range)
    train, test = (_read(source, split, target, grays) for split, target in zip(files, targets, strict=True))
    unused = [name for name in splits[0].columns if name not in (column, *comma_separated(source.target))]
    return with_overlap(Dataset(
        source.name, train, test, number_of_outputs(source, train, test, names), IMAGENET_MEAN, IMAGENET_STD,
        names=names,
        notes=(f"data {root}: columns that are not used: {', '.join(unused)}",) if unused else (),
        scales=() if grays is None else (("gray range", list(grays)),),
    ))  # fmt: skip


def _files(root: Path, rows: Rows, column: str) -> list[Path]:
    files = [root / value for value in rows.columns[column]]
    for i, file in enumerate(files):
        if file.suffix.lower() not in PICTURE_SUFFIXES:
            raise rows.error(i, column, f"a picture ({', '.join(PICTURE_SUFFIXES)})", "set data.picture, or convert it")
        if not file.is_file():
            raise rows.error(i, column, f"a file in {root}", "check the path")
    return files


def _read(source: Source, files: list[Path], targets: Tensor, grays: Range | None) -> Samples:
    return read_pictures(Pictures(files, targets, source.image_size, grays), source.loading, source.workers)
