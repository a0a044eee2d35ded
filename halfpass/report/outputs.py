"""Files that `report` writes: named as what they are, and never in the place of another's.

Each kind is known again by how it begins, so that a report takes the place of an earlier one and of nothing else.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from halfpass.errors import InputError
from halfpass.files import refuse_file

LOOKED_AT = 2**22  # bytes


class Kind(NamedTuple):
    """A kind of file: endings of its name, what those of halfpass hold, and what else to do for another kind."""

    endings: Sequence[str]
    mark: re.Pattern[bytes]
    otherwise: str


PAGE = Kind((".html", ".htm"), re.compile(rb"\A<!DOCTYPE html>.{,600}<title>halfpass report: ", re.DOTALL),
            "a page is HTML; --figures DIR writes SVG and PDF, --csv FILE and --latex FILE tables")  # fmt: skip
CSV = Kind((".csv",), re.compile(rb"\Aseries,method,n,seeds,"), "name it so")
LATEX = Kind((".tex",), re.compile(rb"\A% halfpass report: "), "name it so")
SVG = Kind((".svg",), re.compile(rb"\A<!-- halfpass report -->"), "name it so")
PDF = Kind((".pdf",), re.compile(rb"\A%PDF.*/Creator \(halfpass report\)", re.DOTALL), "name it so")


def refuse_output(place: str, file: Path, kind: Kind) -> None:
    """Raises InputError where `file` cannot be written, is not named as one of that kind, or is there already and no
    empty file and none that halfpass wrote. Devices and pipes are written to as they are."""
    refuse_file(place, file)
    if file.exists() and not file.is_file():
        return
    if file.suffix.lower() not in kind.endings:
        raise InputError(place, f"a name that ends in {' or '.join(kind.endings)}", str(file), kind.otherwise)
    try:
        with file.open("rb") as opened:
            content = opened.read(LOOKED_AT)
    except FileNotFoundError:
        return
    except OSError as error:
        found = f"{file} ({error.strerror})"
        raise InputError(place, "a file that can be read", found, "choose another name") from None
    if content and not kind.mark.search(content):
        expected = "a new file, or one that halfpass report wrote"
        raise InputError(place, expected, f"another at {file}", "choose another name, or remove it")
