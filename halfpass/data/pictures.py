"""Picture files → uint8 RGB squares. Check: `pytest tests/test_own_data.py`.

Turned as their EXIF orientation says, transparent parts black, grays of 16 bits scaled by the range that the data set
has. Several frames, contents of other formats than these, and pictures of more than MOST_PIXELS, of which only the
header is read then, are refused.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from halfpass.data.own import fits
from halfpass.data.samples import Samples, Stream
from halfpass.errors import InputError, reason
from halfpass.tree import Tree, map_leaves

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MOST_PIXELS = 2**25  # which take up to half a gigabyte while they are scaled
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
Range = tuple[int, int]  # lowest and highest gray


def decode(file: Path, image_size: int, grays: Range | None) -> np.ndarray:
    """(H, W, 3) uint8: the shorter side resized to `image_size` pixels, the middle square kept."""
    try:
        with _opened(file) as image:
            picture = _rgb(_upright(image), grays)
            square = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BILINEAR)
        return np.array(square)
    except InputError:
        raise
    except Exception as error:  # every decoder has errors of its own
        found = f"an unreadable file ({reason(error)})"
        raise InputError(str(file), "a picture", found, "mend or remove it") from error


def _opened(file: Path) -> Image.Image:
    """Its header alone is read. Raises InputError where it has too many pixels."""
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:  # Pillow's own bound
        found = "several times as many"
    else:
        if image.width * image.height <= MOST_PIXELS:
            return image
        found = f"{image.width} × {image.height}"
        image.close()
    raise InputError(str(file), f"a picture of at most {MOST_PIXELS:,} pixels", found, "scale it down or remove it")


def _upright(image: Image.Image) -> Image.Image:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a JPEG of a telephone, whose further frames are previews
        raise ValueError(f"{frames} frames, where one can be read")
    return ImageOps.exif_transpose(image)


def _rgb(image: Image.Image, grays: Range | None) -> Image.Image:
    if image.mode.startswith("I;16"):
        low, high = grays or (0, 2**16 - 1)
        levels = (np.arange(2**16, dtype=np.float64) - low) * (255 / max(high - low, 1))  # of each gray
        shown = torch.from_numpy(levels).round().clamp(0, 255).to(torch.uint8).numpy()
        return Image.fromarray(shown[np.asarray(image)]).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per pixel, where 8 or 16 can be read")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        whole = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", whole.size, (0, 0, 0, 255)), whole).convert("RGB")
    return image.convert("RGB")


def gray_range(files: Iterable[Path], given: str | None) -> Range | None:
    """Lowest and highest gray of all pictures of 16 bits, as `given` (LOW,HIGH) or as they have it; None where there
    are none. Files that cannot be read are left to `decode`."""
    if given is not None:
        parts = given.split(",")
        if len(parts) != 2 or not all(part.strip().isdigit() for part in parts) or not int(parts[0]) < int(parts[1]):
            raise InputError("data.gray_range", "LOW,HIGH, two whole numbers", repr(given), "for example 0,4095")
        return int(parts[0]), int(parts[1])
    ranges = [found for file in files if (found := _grays(file)) is not None]
    return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None


def _grays(file: Path) -> Range | None:
    try:
        with _opened(file) as image:
            if not image.mode.startswith("I;16"):
                return None
            levels = np.asarray(image)
            return int(levels.min()), int(levels.max())
    except Exception:  # `decode` says what is wrong with it
        return None


class Pictures:
    """Picture files and their targets, decoded one by one."""

    def __init__(self, files: Sequence[Path], targets: Tree, image_size: int, grays: Range | None) -> None:
        self.files, self.targets, self.image_size, self.grays = files, targets, image_size, grays

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tree]:
        pixels = torch.from_numpy(decode(self.files[index], self.image_size, self.grays)).permute(2, 0, 1)
        return pixels, map_leaves(lambda leaf: leaf[index], self.targets)


def read_pictures(pictures: Pictures, loading: str, workers: int) -> Samples:
    """All of them decoded, or a stream where that is asked for or they would not fit into memory."""
    count, size = len(pictures), pictures.image_size
    if loading == "stream" or (loading == "auto" and not fits(pictures)):
        return Stream(pictures, torch.arange(count), workers, pictures.targets)
    pixels = torch.empty(count, size, size, 3, dtype=torch.uint8)  # (N, H, W, C): channels last in memory
    for i, file in enumerate(pictures.files):
        pixels[i] = torch.from_numpy(decode(file, size, pictures.grays))
    return Samples(pixels.permute(0, 3, 1, 2), pictures.targets)


def check_size(image_size: int) -> None:
    if image_size < 1:
        raise InputError("data.image_size", "at least 1 pixel", f"{image_size}", "32 is usual for small networks")
