"""Folders of pictures, one for each class. Check: `pytest tests/test_data.py tests/test_own_data.py`."""

from pathlib import Path

import torch

from halfpass.data.own import class_names, with_overlap
from halfpass.data.pictures import PICTURE_SUFFIXES, Pictures, Range, check_size, gray_range, read_pictures
from halfpass.data.samples import Dataset, Samples
from halfpass.data.source import Source
from halfpass.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Folders = dict[str, list[Path]]  # class → its pictures, both sorted


def read_imagefolder(source: Source) -> Dataset:
    """Pictures out of `path/train/CLASS/**` and `path/test/CLASS/**` (or `val`), subfolders included.

    RGB, the shorter side resized to `image_size` pixels, the middle square kept. The classes take turns in the order of
    the samples, so that the first `limit` of a split, the only ones decoded, are a fair mixture. The classes are the
    folders, sorted, or what `data.classes` names; a class that is named need not have pictures here.
    """
    check_size(source.image_size)
    root = source.folder("a folder with train and test inside")
    names = class_names(source.classes)
    left_out: list[Path] = []
    train = _pictures(root / "train", names, left_out)
    other = root / "test" if (root / "test").is_dir() or not (root / "val").is_dir() else root / "val"
    test = _pictures(other, names, left_out)
    if different := sorted(train.keys() ^ test.keys()):
        found = ", ".join(f"{name!r} only in {'train' if name in train else 'test'}" for name in different[:5])
        remedy = "give each class to both, or name all in data.classes"
        raise InputError(str(root), "the same classes in train and test", found, remedy)
    turns = [_in_turn(split)[: source.limit] for split in (train, test)]
    grays = gray_range((file for split in turns for _, file in split), source.gray_range)
    first, second = (_read(split, source, grays) for split in turns)
    number = len(train)
    if source.classes is not None and source.classes.isdigit():
        number = int(source.classes)
    scales = () if grays is None else (("gray range", list(grays)),)
    data = Dataset(
        source.name, first, second, number, IMAGENET_MEAN, IMAGENET_STD, names=tuple(train), scales=scales,
        notes=_note(root, left_out),
    )  # fmt: skip
    return with_overlap(data)


def _pictures(split: Path, names: tuple[str, ...], left_out: list[Path]) -> Folders:
    """Puts files that are no pictures into `left_out`."""
    if not split.is_dir():
        remedy = "lay it out as train/CLASS/picture.png, test/CLASS/picture.png"
        raise InputError(str(split), "a folder for each class", "no such folder", remedy)
    inside = sorted(entry for entry in split.iterdir() if not entry.name.startswith("."))
    left_out += [entry for entry in inside if not entry.is_dir()]
    pictures = {folder.name: _files(folder, left_out) for folder in inside if folder.is_dir()}
    if names:
        if unknown := next((name for name in pictures if name not in names), None):
            remedy = "name it there too, or remove the folder"
            raise InputError(str(split / unknown), f"a class of data.classes, {', '.join(names)}", unknown, remedy)
        pictures = {name: pictures.get(name, []) for name in names}
    empty = next((split / name for name in pictures if not pictures[name]), None if pictures else split)
    if empty is not None and (not names or not any(pictures.values())):
        remedy = "add some or remove the folder" if pictures else "make a folder for each class"
        raise InputError(str(empty), f"pictures ({', '.join(PICTURE_SUFFIXES)})", "none", remedy)
    return pictures


def _files(folder: Path, left_out: list[Path]) -> list[Path]:
    """The pictures in it and in its subfolders."""
    files = []
    for entry in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in entry.relative_to(folder).parts):
            continue
        if entry.is_file() and entry.suffix.lower() in PICTURE_SUFFIXES:
            files.append(entry)
        elif not entry.is_dir() or entry.is_symlink():  # a link to a folder could lead round in a circle
            left_out.append(entry)
    return files


def _in_turn(folders: Folders) -> list[tuple[int, Path]]:
    """(label, file)"""
    turns = sorted(
        (rank, label, file) for label, files in enumerate(folders.values()) for rank, file in enumerate(files)
    )
    return [(label, file) for _, label, file in turns]


def _read(split: list[tuple[int, Path]], source: Source, grays: Range | None) -> Samples:
    labels = torch.tensor([label for label, _ in split], dtype=torch.int64)
    pictures = Pictures([file for _, file in split], labels, source.image_size, grays)
    return read_pictures(pictures, source.loading, source.workers)


def _note(root: Path, left_out: list[Path]) -> tuple[str, ...]:
    if not left_out:
        return ()
    which = f"the file {left_out[0]} is" if len(left_out) == 1 else f"{len(left_out)} files are"
    first = "" if len(left_out) == 1 else f", the first {left_out[0]}"
    return (f"data {root}: {which} left out{first}; pictures end in {', '.join(PICTURE_SUFFIXES)}",)
