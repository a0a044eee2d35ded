"""What a reader of a data set is asked for: the settings `data.*` as plain values."""

from dataclasses import dataclass
from pathlib import Path

from halfpass.errors import InputError


@dataclass(frozen=True)
class Source:
    """The arguments of `datasets.load`, named as in the configuration, where each is explained."""

    name: str
    path: str | None = None
    limit: int | None = None  # samples
    download: bool = False
    image_size: int = 32  # pixels, of a side
    crop_padding: int = 2  # pixels, on each side
    validation: int | None = None  # samples
    target: str | None = None
    target_kind: str = "auto"
    ignore: str | None = None
    categorical: str | None = None
    picture: str | None = None
    separator: str = ","
    test_share: float | None = None
    classes: str | None = None
    gray_range: str | None = None
    normalization: str = "agreed"
    loading: str = "auto"
    workers: int = 0

    def folder(self, what: str) -> Path:
        """`path`; raises InputError where none is given, for `what` should be there."""
        if self.path is None:
            raise InputError("data.path", what, "none", "give the folder")
        return Path(self.path).expanduser()


def comma_separated(names: str | None) -> tuple[str, ...]:
    return () if names is None else tuple(name.strip() for name in names.split(",") if name.strip())
