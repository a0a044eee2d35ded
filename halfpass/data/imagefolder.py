"""Folders of pictures, one for each class. Check: `pytest tests/test_data.py`."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from halfpass.errors import InputError, reason

Arrays = tuple[Tensor, Tensor]  # inputs (N, 3, H, W) uint8 in channels-last memory, labels (N,) int64
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_imagefolder(path: str | None, image_size: int, limit: int | None) -> tuple[Arrays, Arrays, list[str]]:
    """Training pictures, test pictures and class names out of `path/train/CLASS/*` and `path/test/CLASS/*` (or `val`).

    RGB, the shorter side resized to `image_size` pixels, the middle square kept. The classes take turns in the order of
    the samples, so that the first `limit` of a split, the only ones decoded, are a fair mixture.
    """
    if path is None:
        raise InputError("data.path", "a folder with train and test inside", "none", "give the folder")
    if image_size < 1:
        raise InputError("data.image_size", "at least 1 pixel", f"{image_size}", "32 is usual for small networks")
    root = Path(path).expanduser()
    train = _pictures(root / "train")
    test = _pictures(root / "test" if (root / "test").is_dir() or not (root / "val").is_dir() else root / "val")
    if different := sorted(train.keys() ^ test.keys()):
        found = ", ".join(f"{name!r} only in {'train' if name in train else 'test'}" for name in different[:5])
        raise InputError(str(root), "the same classes in train and test", found, "give each class to both")
    return _decode_all(train, image_size, limit), _decode_all(test, image_size, limit), list(train)


def _pictures(split: Path) -> dict[str, list[Path]]:
    """Class name → its pictures, both sorted."""
    if not split.is_dir():
        remedy = "lay it out as train/CLASS/picture.png, test/CLASS/picture.png"
        raise InputError(str(split), "a folder for each class", "no such folder", remedy)
    folders = sorted(folder for folder in split.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    pictures = {
        folder.name: sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
        for folder in folders
    }
    empty = next((folder for folder in folders if not pictures[folder.name]), None if folders else split)
    if empty is not None:
        remedy = "add some or remove the folder" if folders else "make a folder for each class"
        raise InputError(str(empty), f"pictures ({', '.join(PICTURE_SUFFIXES)})", "none", remedy)
    return pictures


def _decode_all(pictures: dict[str, list[Path]], image_size: int, limit: int | None) -> Arrays:
    turns = sorted(
        (rank, label, file) for label, files in enumerate(pictures.values()) for rank, file in enumerate(files)
    )[:limit]
    pixels = torch.empty(len(turns), image_size, image_size, 3, dtype=torch.uint8)  # (N, H, W, C)
    for i, (_, _, file) in enumerate(turns):
        pixels[i] = torch.from_numpy(_decode(file, image_size))
    return pixels.permute(0, 3, 1, 2), torch.tensor([label for _, label, _ in turns], dtype=torch.int64)


def _decode(file: Path, image_size: int) -> np.ndarray:
    try:
        with Image.open(file) as image:
            picture = _eight_bits(image).convert("RGB")
            square = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BILINEAR)
        return np.array(square)  # (H, W, 3) uint8
    except Exception as error:  # every decoder has errors of its own
        found = f"an unreadable file ({reason(error)})"
        raise InputError(str(file), "a picture", found, "mend or remove it") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Of 16 bits per pixel the upper 8; Pillow's conversion would make all from 256 on white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per pixel, where 8 or 16 can be read")
    return image
