"""Sets the version wherever it is written: `make version V=0.2.0`, or `python release/version.py 0.2.0 [2026-12-01]`.

pyproject.toml is what the package, `halfpass --version` and result files say; CITATION.cff and CHANGELOG.md follow.
What CHANGELOG.md lists as unreleased becomes the section of the version. Nothing is written unless all of it can be.
Check: `pytest tests/test_version.py`.
"""

import datetime
import re
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parent.parent
UNRELEASED = "## [Unreleased]\n"
FIELDS = {"pyproject.toml": r'^version = "(.+)"$', "CITATION.cff": r"^version: (.+)$"}


def main(words: list[str]) -> int:
    try:
        if len(words) not in (1, 2):
            raise ValueError(f"arguments: expected a version and perhaps a day, found {len(words)}; give V=0.2.0")
        changed = changes(ROOT, words[0], words[1] if len(words) == 2 else datetime.date.today().isoformat())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for file, text in changed.items():
        file.write_text(text)
    print(f"{words[0]}: {', '.join(file.name for file in changed)}; now: make test, commit, git tag v{words[0]}")
    return 0


def changes(root: Path, version: str, day: str) -> dict[Path, str]:
    """The new text of each file. Raises ValueError where the version, the day or a file is not as it should be."""
    texts = {name: (root / name).read_text() for name in (*FIELDS, "CHANGELOG.md")}
    _check_version(version, texts)
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", day) or not _is_day(day):
        raise ValueError(f"day: expected one as 2026-12-01, found {day!r}; leave it out for today")
    texts["pyproject.toml"] = _put(texts["pyproject.toml"], FIELDS["pyproject.toml"], f'version = "{version}"')
    cited = re.sub(r"^date-released: .*\n", "", texts["CITATION.cff"], flags=re.MULTILINE)
    texts["CITATION.cff"] = _put(cited, FIELDS["CITATION.cff"], f"version: {version}\ndate-released: {day}")
    texts["CHANGELOG.md"] = _released(texts["CHANGELOG.md"], version, day)
    return {root / name: text for name, text in texts.items()}


def _check_version(version: str, texts: dict[str, str]) -> None:
    try:
        parsed = Version(version)
    except InvalidVersion:
        raise ValueError(f"version: expected one as 0.2.0 or 0.2.0rc1, found {version!r}; give V=0.2.0") from None
    if str(parsed) != version or len(parsed.release) != 3 or parsed.local or parsed.is_devrelease or parsed.epoch:
        raise ValueError(f"version: expected three numbers, as 0.2.0 or 0.2.0rc1, found {version!r}; give V=0.2.0")
    written = {name: re.findall(pattern, texts[name], re.MULTILINE) for name, pattern in FIELDS.items()}
    for name, found in written.items():
        if len(found) != 1:
            raise ValueError(f"{name}: expected one line with the version, found {len(found)}; mend the file")
    now = written["pyproject.toml"][0]
    if parsed < Version(now) or f"## [{version}]" in texts["CHANGELOG.md"]:
        raise ValueError(f"version: expected one after {now}, or {now} where that is not released, found {version}")


def _is_day(day: str) -> bool:
    try:
        datetime.date.fromisoformat(day)
    except ValueError:
        return False
    return True


def _put(text: str, pattern: str, line: str) -> str:
    return re.sub(pattern, lambda _: line, text, count=1, flags=re.MULTILINE)


def _released(text: str, version: str, day: str) -> str:
    before, heading, after = text.partition(UNRELEASED)
    entries = after.partition("\n## ")[0]
    if not heading or "- " not in entries:
        raise ValueError(f"CHANGELOG.md: expected a list below {UNRELEASED.strip()!r}, found none; say what is new")
    return f"{before}{heading}\n## [{version}] - {day}\n{after}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
