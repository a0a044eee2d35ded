"""`paper`: a grid of trainings from one file, several at a time, resumed where it stopped, in the middle of trainings.

A grid file has `settings`, by their dotted names, for every training; `seeds`; and `axes`, each with choices by name,
whose settings hold where a training takes that choice. There is a training for every combination and every seed; a
choice may name `seeds` of its own, and of several such the one with the fewest counts.
"""

import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfpass.bounded import MOST_YAML_BYTES, parse_yaml, read_text
from halfpass.config import Config, as_dict, flatten, from_dict, nested
from halfpass.errors import InputError, RunError, near_miss
from halfpass.files import alone_in
from halfpass.report import tables
from halfpass.run import checkpoint, setup
from halfpass.run.children import Child, stopping
from halfpass.run.records import CHECKPOINT, RunFolder, difference, read_config, read_result
from halfpass.run.train import process_count, tracked_together

POLL_SECONDS = 0.2
REMEDY = "look at examples/paper/small.yaml"


@dataclass(frozen=True)
class Member:
    """One training of a grid."""

    name: str  # its choices and its seed
    choices: dict[str, str]  # by axis, and its seed
    config: Config  # its `out` is its run folder

    @property
    def folder(self) -> Path:
        return self.config.folder

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").is_file()

    @property
    def begun(self) -> bool:
        """Whether it can be gone on with."""
        return checkpoint.there(self.folder / CHECKPOINT)


def read_grid(file: Path, out: Path, changes: Mapping[str, Any]) -> list[Member]:
    """The trainings of a grid file, seeds outermost, in folders under `out`; `changes` are settings that hold for all.

    Raises InputError where the file is no grid, a setting is unknown or refused, or two trainings have one name.
    """
    grid = _read(file)
    axes: dict[str, dict[str, dict[str, Any]]] = grid["axes"]
    for settings in (grid["settings"], *(choice for axis in axes.values() for choice in axis.values()), changes):
        if own := {"train.seed", "out"} & flatten(settings).keys():
            raise InputError(str(file), "settings other than the seed and the folder", min(own), "use seeds, and --out")
    members: list[tuple[int, Member]] = []
    for names in itertools.product(*axes.values()):
        choices = dict(zip(axes, map(str, names), strict=True))
        taken = [dict(axes[axis][name]) for axis, name in zip(axes, names, strict=True)]
        seeds = min([grid["seeds"], *(choice.pop("seeds") for choice in taken if "seeds" in choice)], key=len)
        for number, seed in enumerate(seeds):
            name = "-".join([*(choices[axis].replace("/", "_") for axis in axes), f"seed_{seed}"])
            if any(member.name == name for _, member in members):
                raise InputError(str(file), "another name for every training", f"{name} twice", "rename a choice")
            flat: dict[str, Any] = {}
            for settings in (grid["settings"], *taken, changes, {"train.seed": seed, "out": str(out / name)}):
                flat.update(flatten(settings))
            if flat.get("server.store") is not None:  # each has one of its own, as it has a folder
                flat["server.store"] = str(Path(flat["server.store"]) / name)
            try:
                chosen = choices | {"seed": str(seed)}
                members.append((number, Member(name, chosen, from_dict(nested(flat)))))
            except InputError as error:
                place = f"{file}, {name}: {error.place}"
                raise InputError(place, error.expected, error.found, error.remedy) from None
    return [member for _, member in sorted(members, key=lambda pair: pair[0])]


def _read(file: Path) -> dict[str, Any]:
    """The content of a grid file, its shape checked."""
    try:
        grid = parse_yaml(read_text(file, MOST_YAML_BYTES))
    except OSError as error:
        raise InputError(str(file), "a grid file", str(error.strerror), "name one, e.g. in examples/paper") from None
    except ValueError as error:
        raise InputError(str(file), "YAML", " ".join(str(error).split()), "correct it") from None
    if not isinstance(grid, dict) or set(grid) != {"settings", "seeds", "axes"}:
        found = ", ".join(map(str, grid)) if isinstance(grid, dict) else type(grid).__name__
        raise InputError(str(file), "settings, seeds and axes", found or "nothing", REMEDY)
    _check(f"{file}, settings", grid["settings"], dict, "settings by name")
    _check(f"{file}, seeds", grid["seeds"], list, "a list of at least one")
    _check(f"{file}, axes", grid["axes"], dict, "axes by name")
    for axis, choices in grid["axes"].items():
        _check(f"{file}, {axis}", choices, dict, "choices by name")
        for name, settings in choices.items():
            if settings != {}:  # a choice may leave everything as it is
                _check(f"{file}, {axis} {name}", settings, dict, "settings by name")
            if "seeds" in settings:
                _check(f"{file}, {axis} {name}, seeds", settings["seeds"], list, "a list of at least one")
    return grid


def _check(place: str, value: object, kind: type, expected: str) -> None:
    if not isinstance(value, kind) or not value:
        raise InputError(place, expected, repr(value), REMEDY)


def choose(members: Sequence[Member], wanted: Sequence[str]) -> list[Member]:
    """Those of the choices `wanted`, each AXIS=CHOICE, of an axis that comes more than once those of any; seed is an
    axis too. Raises InputError where there are none."""
    choices: dict[str, set[str]] = {}
    for word in wanted:
        for axis, choice in read_pairs("--only", [word]).items():
            choices.setdefault(axis, set()).add(str(choice))
    axes = ", ".join(members[0].choices)
    for axis, some in choices.items():
        if axis not in members[0].choices:
            raise InputError("--only", f"an axis of {axes}", axis, near_miss(axis, members[0].choices, "correct it"))
        known = {found for member in members if (found := member.choices.get(axis))}
        for choice in sorted(some - known):
            raise InputError("--only", f"{axis} of {', '.join(sorted(known))}", choice, "correct it")
    chosen = [member for member in members if all(member.choices.get(axis) in some for axis, some in choices.items())]
    if not chosen:
        raise InputError("--only", "choices that the grid combines", " ".join(wanted), "see the choices' own seeds")
    return chosen


def read_pairs(option: str, words: Sequence[str]) -> dict[str, Any]:
    """`data.path=DIR train.epochs=2` → values by name; raises InputError for a word that is no such pair."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(option, "NAME=VALUE", repr(word), "put an equals sign between them")
        if key in found:
            raise InputError(option, f"{key} once", "twice", "leave one out")
        try:
            found[key] = parse_yaml(value)
        except ValueError as error:
            raise InputError(option, f"a value for {key}", f"{value!r} ({error})", "correct it") from None
    return found


def run_grid(members: Sequence[Member], jobs: int, write_rows: Callable[[], None]) -> None:
    """Trains what is not finished, `jobs` at a time, each in a process of its own; calls `write_rows` first, and
    whenever one has ended. Raises RunError at the end where some failed, InputError where another grid is at work in
    the same folder.
    """
    if jobs < 1:
        raise InputError("--jobs", "at least 1", str(jobs), "2 is usual")
    for member in members:
        _check_same(member)
    waiting = [member for member in members if not member.finished]
    _prepare(waiting)
    with alone_in(members[0].folder.parent):
        _train(members, waiting, jobs, write_rows)


def _train(members: Sequence[Member], waiting: Sequence[Member], jobs: int, write_rows: Callable[[], None]) -> None:
    failed: list[str] = []
    write_rows()
    print(f"{len(members) - len(waiting)} of {len(members)} trainings are there already", file=sys.stderr, flush=True)
    began = time.monotonic()
    for done, (member, error) in enumerate(_run(waiting, jobs), 1):
        if error is None:
            said = tables.said(read_result(member.folder))
        else:
            failed.append(member.name)
            said = str(error)
        left = (time.monotonic() - began) / done * (len(waiting) - done) / 60
        line = f"{done} of {len(waiting)}: {member.name}: {said}; about {left:.0f} min to go"
        print(line, file=sys.stderr, flush=True)
        write_rows()
    if failed:
        found = f"{len(failed)} that failed: {', '.join(failed[:3])}"
        raise RunError("grid", f"{len(waiting)} trainings to their end", found, "see above; start again to go on")


def _check_same(member: Member) -> None:
    """Refuses a folder in which a training with other settings is finished, or can be gone on with."""
    if not (member.finished or member.begun):
        return
    if other := difference(member.config, as_dict(read_config(member.folder))):
        key, value, found = other
        remedy = "choose another folder for the runs"
        raise InputError(str(member.folder), f"a training with {key} {value}", f"one with {found}", remedy)


def _prepare(members: Sequence[Member]) -> None:
    """Raises InputError where settings or data of one cannot be used; seeds make no difference to that."""
    checked: dict[str, Config] = {}
    for member in members:
        recipe, server = replace(member.config.train, seed=0), replace(member.config.server, store=None)
        config = replace(member.config, train=recipe, server=server, out=None)
        checked[json.dumps(as_dict(config))] = config
    for _, same_data in itertools.groupby(sorted(checked.values(), key=_data_key), key=_data_key):
        configs = list(same_data)
        data = setup.load_data(configs[0].data)
        for config in configs:
            setup.prepare(config, data)


def _data_key(config: Config) -> str:
    return json.dumps(as_dict(config)["data"])


def _run(waiting: Sequence[Member], jobs: int) -> Iterator[tuple[Member, RunError | None]]:
    """Each member as it ends, and why where it failed."""
    queue = list(waiting)
    running: list[tuple[Member, Child]] = []
    children: list[Child] = []
    with stopping(children):
        while queue or running:
            while queue and len(running) < jobs:
                member = queue.pop(0)
                children.append(_start(member, jobs))
                running.append((member, children[-1]))
            for member, child in list(running):
                if child.status() is not None:
                    running.remove((member, child))
                    children.remove(child)
                    yield member, child.failure() if child.status() else None
            time.sleep(POLL_SECONDS)


def _start(member: Member, jobs: int) -> Child:
    """`halfpass resume`, where the training was broken off behind an epoch; else `halfpass train`, anew: what one that
    did not get that far has left goes, its store too."""
    threads = setup.threads_each(member.config, jobs * process_count(member.config))
    config = replace(member.config, train=replace(member.config.train, threads=threads))
    config = tracked_together(member.folder.parent, config)
    if member.begun:
        RunFolder(member.folder).write_config(config)  # the data may be elsewhere by now
        return Child(member.name, ["resume", str(member.folder), "--allow_code"], quiet=True)
    if (member.folder / "config.yaml").is_file():  # and nothing else
        shutil.rmtree(member.folder)
        if (store := member.config.server.store) is not None and (Path(store) / "store.json").is_file():
            shutil.rmtree(store)
    folder = RunFolder.create(member.folder, config)
    return Child(member.name, ["train", "--config", str(folder.path / "config.yaml")], quiet=True)


def grid_rows(members: Sequence[Member]) -> list[dict[str, Any]]:
    """result.json of every training that is finished, with its name and the choices that result.json does not tell.

    Raises InputError where one of them is of other settings.
    """
    rows = []
    for member in members:
        _check_same(member)
        if member.finished:
            result = read_result(member.folder)
            further = {axis: choice for axis, choice in member.choices.items() if axis not in result}
            rows.append({"training": member.name, **result, **({"settings": further} if further else {})})
    return rows
