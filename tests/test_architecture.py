"""The house: imports go one way, and each folder imports no more than its part of the work needs."""

import ast
from pathlib import Path

import pytest

import halfpass

ROOT = Path(halfpass.__file__).parent
COMMON = {"bounded", "cut", "errors", "seed", "plugin", "tree"}
ALLOWED = {  # a folder may import the common files, itself, and these
    "algorithm": {"arithmetic"},
    "arithmetic": {"networks"},  # its kernels are made of graphs
    "networks": set(),
    "tasks": {"networks"},
    "data": set(),
    "wire": set(),
    "report": {"config", "files"},
    "run": {"algorithm", "arithmetic", "networks", "tasks", "data", "wire", "config", "files"},
    "flower": {"run", "report", "commands", "config", "files"},
    "nvflare": {"run", "report", "commands", "config", "files"},
    "commands": {"algorithm", "arithmetic", "networks", "tasks", "data", "wire", "run", "report", "config", "files"},
}
ABOVE = {
    "cut": {"errors", "tree"}, "errors": set(), "bounded": set(), "seed": set(), "plugin": {"errors"}, "tree": {"errors"}, "files": {"bounded", "errors"}, "config": {"errors", "files"},
}


def imports(file):
    """All that the file imports, wherever in it, in full: `from a import b` as a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(file):
    """First names under halfpass that the file imports."""
    return {name.split(".")[1] for name in imports(file) if name.startswith("halfpass.")}


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_one_way(file):
    room = file.relative_to(ROOT).parts[0]
    if room in ("__init__.py", "__main__.py"):
        return
    name = room.removesuffix(".py")
    allowed = ABOVE[name] if name in ABOVE else COMMON | ALLOWED[name] | {name}
    assert imported_rooms(file) <= allowed


def test_the_reader_of_imports_sees_them(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "import halfpass.commands.cli\ndef f():\n    from halfpass.wire import codec\n    from halfpass import cut\n    from time import sleep\n"
    )
    assert imported_rooms(file) == {"commands", "wire", "cut"}
    assert "time.sleep" in set(imports(file))


@pytest.mark.parametrize("room", ["algorithm", "arithmetic", "networks", "data", "wire"])
def test_what_computes_has_no_processes_clocks_or_sockets_and_wire_no_training(room):
    computes = {"socket", "time", "subprocess", "threading", "grpc"}
    forbidden = {"wire": {"torch.optim", "subprocess"}}.get(room, computes)
    for file in set((ROOT / room).glob("*.py")) - {ROOT / "data" / "workers.py"}:  # which are processes
        found = {name for name in imports(file) for part in forbidden if f"{name}.".startswith(f"{part}.")}
        assert not found, file


def test_public_names_exist_once():
    assert len(set(halfpass.__all__)) == len(halfpass.__all__)
    assert all(hasattr(halfpass, name) for name in halfpass.__all__)
