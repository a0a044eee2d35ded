"""Whether halfpass cuts real public networks exactly: every one of architectures.py, at three layers.

    python -m venv zoo && zoo/bin/pip install --no-deps -r benchmarks/models-requirements.txt -e .
    zoo/bin/python benchmarks/models.py --json results/models.json

Nothing is downloaded: weights and samples are random. What is right is decided here, by running the uncut network
beside the two halves, and not by the check of `split` itself. Each network has a process of its own.

    --only resnet18,BertModel      these          --family timm     families whose name has it
    --resume                       goes on where the rows beside the results file (.jsonl) end
    --build                        only builds each network and takes a step of it

Where raw input is needed above the cut and is one of MAY_CROSS, the cut is tried again with the leave of
`model.may_cross`, which the row then has too.

A row's outcome: ok (halves and network are the same, bit for bit), refused (InputError), wrong (accepted, and
something differs), crash (anything else). Exit status: 1 where one is wrong or crashed.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import Architecture, every, package
from torch import Tensor, nn

import halfpass
from halfpass import tree
from halfpass.errors import InputError, reason
from halfpass.files import write_json
from halfpass.run.records import command_line, environment

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"early": 0.2, "middle": 0.5, "late": 0.8}
NEAR = 0.12  # so far from its place a better kind of layer is taken
SPLIT_BATCH = 4
RATE = 1e-3
WAIT = 5  # times its seconds at work a network may take by the clock: others may use the machine
# Inputs beside the samples themselves: a graph's edges, what a decoder is given, what a diffusion model is told.
MAY_CROSS = ("edges", "adjacency", "decoder_input_ids", "encoder_hidden_states")
OUTCOMES = ("ok", "refused", "wrong", "crash")

Row = dict[str, Any]


# --- The one place that calls halfpass --------------------------------------------------------------------------------


def split(model: nn.Module, layer: str, inputs: tree.Tree, may_cross: Sequence[str] = ()) -> halfpass.Halves:
    """The halves, from samples where `split` takes them."""
    if "inputs" in halfpass.split.__annotations__:
        return halfpass.split(model, layer, inputs, may_cross)  # type: ignore[call-arg]
    if not isinstance(inputs, Tensor):
        raise InputError(f"layer {layer!r}", "one tensor", "several", "wait for a cut that takes trees")
    return halfpass.split(model, layer)


# --- Values of any form -----------------------------------------------------------------------------------------------


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a tuple, dict, dataclass or plain object holds, with names."""
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(i), part) for i, part in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif type(value).__module__.partition(".")[0] in ("transformers", "diffusers", "monai") and hasattr(
        value, "__dict__"
    ):
        yield from vars(value).items()


def flat(value: Any, name: str = "", depth: int = 0) -> dict[str, Any]:
    """Its tensors and plain values by their place."""
    if isinstance(value, Tensor | int | float | str | bool | None):
        return {name: value}
    return {
        place: leaf
        for key, part in (parts(value) if depth < 8 else ())
        for place, leaf in flat(part, f"{name}.{key}" if name else key, depth + 1).items()
    }


def floating(value: Any) -> list[Tensor]:
    return [leaf for leaf in flat(value).values() if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def same(one: Any, other: Any) -> bool:
    """Bit for bit; NaN is NaN."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and one == other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def difference(one: Any, other: Any) -> str:
    """How two values differ, in a few words."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return f"{_kind(one)} against {_kind(other)}"
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{tuple(one.shape)} {one.dtype} against {tuple(other.shape)} {other.dtype}"
    gap = (one.double() - other.double()).abs().max().item()
    return f"by {gap:.1e} of {one.double().abs().max().item():.1e}"


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)[:40]


# --- The oracle -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One pass: a training step, or an evaluation."""

    training: bool
    batch: int
    seed: int

    def __str__(self) -> str:
        return f"{'training' if self.training else 'evaluation'}, batch {self.batch}, seed {self.seed}"


# in this order, on one network and one pair of halves, with a step of the weights after each
CASES = [
    Case(True, 2, 0),
    Case(True, 3, 1),
    Case(False, 2, 0),
    Case(False, 3, 1),
    Case(True, 2, 2),
    Case(True, 3, 2),
    Case(False, 3, 2),
]


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def random_states() -> dict[str, Any]:
    numbers = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "python": str(random.getstate()),
        "numpy": str([part.tolist() if isinstance(part, np.ndarray) else part for part in numbers]),
    }


def loss_of(output: Any) -> Tensor:
    """Every floating output counts."""
    terms = [leaf.float().pow(2).mean() for leaf in floating(output)]
    return torch.stack(terms).sum()


def parameters(*modules: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for module in modules for n, p in module.named_parameters(remove_duplicate=False)}


def state(*modules: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, those that are not saved too."""
    named = dict(parameters(*modules))
    return named | {n: b for module in modules for n, b in module.named_buffers(remove_duplicate=False)}


def whole_pass(network: nn.Module, samples: tree.Tree, training: bool) -> Any:
    output = tree.call(network, samples)
    if training:
        loss_of(output).backward()
    return output


def halves_pass(halves: halfpass.Halves, samples: tree.Tree, training: bool) -> Any:
    """As two machines would: only the client half sees samples, only tensors cross, gradients go back."""
    sent = tree.call(halves.client, samples)
    after_client = torch.get_rng_state()
    received = [t.detach().clone().requires_grad_(t.requires_grad) for t in sent]
    torch.set_rng_state(after_client)
    output = halves.server(*received)
    if training:
        loss_of(output).backward()
        back = [(t, r.grad) for t, r in zip(sent, received, strict=True) if t.requires_grad and r.grad is not None]
        if back:
            torch.autograd.backward([t for t, _ in back], [g for _, g in back])
    return output


def observed(
    run: Callable[..., Any], what: Any, modules: Sequence[nn.Module], case: Case, samples: tree.Tree
) -> dict[str, Any]:
    """What a pass gives and leaves behind, by name."""
    for module in modules:
        module.train(case.training)
        module.zero_grad(set_to_none=True)
    seed_all(case.seed)
    own_samples = tree.map_leaves(Tensor.clone, samples)
    with torch.set_grad_enabled(case.training):
        output = run(what, own_samples, case.training)
    seen = {f"output {name}".rstrip(): leaf for name, leaf in flat(output).items()}
    seen |= {f"random state of {name}": value for name, value in random_states().items()}
    seen |= {f"gradient of {n}": p.grad for n, p in parameters(*modules).items()}
    return seen | {f"state {n}": value for n, value in state(*modules).items()}


@torch.no_grad()
def update(*modules: nn.Module) -> None:
    """A step of the weights."""
    for p in {id(p): p for p in parameters(*modules).values()}.values():
        if p.grad is not None:
            p.sub_(p.grad.clamp(-1, 1), alpha=RATE)


def compare(before: Mapping[str, Tensor], whole: dict[str, Any], halves: dict[str, Any]) -> str:
    """Where the halves did something else than the network, else "". A name that neither half has must not matter."""
    for name, value in whole.items():
        kind, _, own = name.partition(" ")
        if name in halves:
            if not same(value, halves[name]):
                return f"{name}: {difference(value, halves[name])}"
        elif name.startswith("gradient of "):
            if value is not None:
                return f"{name}: neither half has it"
        elif kind != "state" or (own in before and not same(before[own], value)):
            return f"{name}: neither half has it"
    extra = [name for name in halves if name not in whole]
    return f"{extra[0]}: the network has no such thing" if extra else ""


def judge(
    network: nn.Module, layer: str, architecture: Architecture, may_cross: Sequence[str] = ()
) -> tuple[str, str, list[str]]:
    """(outcome, reason, inputs that had to be allowed to cross) of one cut."""
    samples = architecture.inputs(SPLIT_BATCH, 100)
    given = copy.deepcopy(network)
    seed_all(7)
    try:
        halves = split(given, layer, tree.map_leaves(Tensor.clone, samples), may_cross)
    except InputError as error:
        names = [name for name in tree.flatten(samples) if name in MAY_CROSS]
        if names and not may_cross and "raw input" in str(error):
            outcome = judge(network, layer, architecture, names)
            return ("refused", str(error), []) if outcome[0] == "refused" else outcome
        return "refused", str(error), []
    changed = [name for name, value in state(network).items() if not same(value, state(given)[name])]
    if changed or given.training != network.training:
        return "wrong", f"split changed the network that it was given: {(changed or ['its mode'])[0]}", []
    whole = copy.deepcopy(network)
    before = state(network)
    for case in CASES:
        drawn = architecture.inputs(case.batch, 200 + case.seed)
        expected = observed(whole_pass, whole, [whole], case, drawn)
        found = observed(halves_pass, halves, [halves.client, halves.server], case, drawn)
        with torch.no_grad():
            where = compare(before, expected, found)
        update(whole)
        update(halves.client, halves.server)
        if where:
            return "wrong", f"{case}: {where}", list(may_cross)
    return "ok", "", list(may_cross)


# --- Where to cut -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A module that returned: how far the network was, and how good a place its kind is to cut at (0 best)."""

    name: str
    position: float
    kind: int
    depth: int


def layers(network: nn.Module, samples: tree.Tree) -> list[Layer]:
    """The modules that a cut could be behind, in the order of their last return in a training pass.

    The position is the share of the calls of modules with weights of their own that had begun before. Each has a
    floating output that depends on weights, and weights both below and above it.
    """
    network = copy.deepcopy(network).train()
    names = {module: name for name, module in network.named_modules()}
    weighted = {m for m in names if next(m.parameters(recurse=False), None) is not None}
    calls = 0
    returned: dict[str, tuple[nn.Module, int]] = {}

    def before(module: nn.Module, *_: Any) -> None:
        nonlocal calls
        calls += module in weighted

    def after(module: nn.Module, _: Any, output: Any) -> None:
        name = names[module]
        returned.pop(name, None)
        if any(leaf.requires_grad for leaf in floating(output)):
            returned[name] = (module, calls)

    for module in names:
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    seed_all(0)
    tree.call(network, samples)
    return [
        Layer(name, position / calls, _quality(network, name, module), name.count("."))
        for name, (module, position) in returned.items()
        if name and 0 < position < calls
    ]


def _quality(network: nn.Module, name: str, module: nn.Module) -> int:
    """0: one of a row of blocks; 1: another module of several; 2: a single layer with weights; 3: one without."""
    if next(module.children(), None) is None:
        return 2 if next(module.parameters(), None) is not None else 3
    return 0 if re.fullmatch(r".*?\d+", name.rpartition(".")[2]) else 1


def choose(found: list[Layer]) -> dict[str, str]:
    """A layer for each place: near it the best kind, the outermost, the nearest; else the nearest. All different."""
    chosen: dict[str, str] = {}
    left = found
    for place, share in PLACES.items():

        def order(layer: Layer, share: float = share) -> tuple[float, ...]:
            gap = round(abs(layer.position - share), 6)
            return (0, layer.kind, layer.depth, gap) if gap <= NEAR else (1, gap, layer.kind, layer.depth)

        if left:
            best = min(left, key=order)
            chosen[place] = best.name
            left = [layer for layer in left if layer.name != best.name]
    return chosen


# --- One network, in its own process ----------------------------------------------------------------------------------


def build(architecture: Architecture) -> nn.Module:
    """The network with its random weights. Copies of it must give finite numbers, and both the same ones."""
    seed_all(0)
    network = architecture.build().train()
    one, other = copy.deepcopy(network), copy.deepcopy(network)
    for case in CASES[1:3]:
        samples = architecture.inputs(case.batch, case.seed)
        seen, again = (observed(whole_pass, copied, [copied], case, samples) for copied in (one, other))
        if not all(bool(leaf.isfinite().all()) for leaf in floating(list(seen.values()))):
            raise ValueError("it does not give finite numbers")
        where = compare({}, seen, again)
        if where:
            raise ValueError(f"it does not do the same twice: {where}")
    return network


def settle() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"


def run_one(architecture: Architecture, only_build: bool, seconds: int, pipe: Connection) -> None:
    """Sends ("row", row) for each cut, or ("skipped", why). It is killed after so many seconds at work."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    settle()
    try:
        network = build(architecture)
        cuts = choose(layers(network, architecture.inputs(2, 0)))
        if not cuts:
            raise ValueError("no layer in it with weights below and above")
    except Exception as error:
        pipe.send(("skipped", reason(error)))
        return
    pipe.send(("built", cuts))
    for place, layer in {} if only_build else cuts.items():
        begun = time.perf_counter()
        try:
            outcome, why, allowed = judge(network, layer, architecture)
        except Exception as error:
            outcome, why, allowed = "crash", reason(error), []
        row = {
            "cut": layer,
            "place": place,
            "outcome": outcome,
            "reason": why,
            "seconds": round(time.perf_counter() - begun, 2),
        }
        if allowed:
            row["may_cross"] = allowed
        pipe.send(("row", row))


# --- The sweep --------------------------------------------------------------------------------------------------------

# what each family imports, once, before its networks are forked
PREPARED = {
    "torch_geometric": "torch_geometric.nn",
    "MONAI": "monai.networks.nets",
    "vit-pytorch": "vit_pytorch",
    "braindecode": "braindecode.models",
    "x-transformers": "x_transformers",
    "pytorchcv": "pytorchcv.model_provider",
    "transformers": "transformers.modeling_utils",
    "torchvision": "torchvision",
    "timm": "timm",
    "segmentation_models_pytorch": "segmentation_models_pytorch",
    "diffusers": "diffusers",
    "tables": "tabm",
    "click-through": "deepctr_torch.models",
}


def prepare(family: str) -> None:
    """A package that is missing is said by its networks, each of which then fails to build."""
    name = PREPARED.get(family.split()[0])
    if name:
        with contextlib.suppress(ImportError):
            package(name)


@dataclass
class Job:
    """A network's process and what it has sent."""

    architecture: Architecture
    process: Any
    pipe: Connection
    deadline: float
    cuts: dict[str, str] = dataclasses.field(default_factory=dict)
    done: list[str] = dataclasses.field(default_factory=list)
    skipped: str = ""
    over: bool = False

    @property
    def named(self) -> Row:
        return {"family": self.architecture.family, "architecture": self.architecture.name}


class Sweep:
    """Runs the networks, some at a time, and keeps their rows in a file that a later sweep can go on from."""

    def __init__(self, log: Path | None, seconds: int, only_build: bool) -> None:
        self.log, self.seconds, self.only_build = log, seconds, only_build
        self.rows: list[Row] = []
        self.skipped: list[Row] = []
        self.built: Counter[str] = Counter()
        self.finished = 0
        self.context = multiprocessing.get_context("fork")

    def resume(self) -> set[tuple[str, str]]:
        """Takes over the rows of networks whose last row is there, and names them."""
        if self.log is None or not self.log.exists():
            return set()
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        whole = {(line["family"], line["architecture"]) for line in lines if line.get("last")}
        kept = [line for line in lines if (line["family"], line["architecture"]) in whole]
        self.rows = [{k: v for k, v in line.items() if k != "last"} for line in kept if "outcome" in line]
        self.skipped = [line for line in kept if "why" in line]
        self.log.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return whole

    def run(self, architectures: list[Architecture], jobs: int) -> None:
        waiting, working = list(architectures), list[Job]()
        while waiting or working:
            while waiting and len(working) < jobs:
                working.append(self._start(waiting.pop(0)))
            rest = min(job.deadline for job in working) - time.monotonic()
            wait([job.pipe for job in working], timeout=max(0.0, min(rest, 1.0)))
            for job in working:
                self._receive(job)
            for job in [job for job in working if job.over]:
                self._finish(job, len(architectures))
                working.remove(job)

    def _start(self, architecture: Architecture) -> Job:
        prepare(architecture.family)
        here, there = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=run_one, args=(architecture, self.only_build, self.seconds, there), daemon=True
        )
        process.start()
        there.close()
        return Job(architecture, process, here, time.monotonic() + WAIT * self.seconds)

    def _receive(self, job: Job) -> None:
        try:
            while job.pipe.poll():
                kind, value = job.pipe.recv()
                if kind == "built":
                    job.cuts = value
                    self.built[job.architecture.family] += 1
                elif kind == "skipped":
                    job.skipped = value
                else:
                    job.done.append(value["place"])
                    self._keep(self.rows, job.named | value)
        except EOFError:
            job.over = True
        job.over = job.over or time.monotonic() > job.deadline

    def _finish(self, job: Job, total: int) -> None:
        late = time.monotonic() > job.deadline
        if late:
            job.process.kill()
        job.process.join()
        ended = job.process.exitcode
        late = late or ended in (-signal.SIGXCPU, -signal.SIGKILL)
        why = f"timeout: {self.seconds} s at work" if late else f"its process ended with {ended}"
        if not job.cuts:
            self._keep(self.skipped, job.named | {"why": job.skipped or why})
        elif not self.only_build:
            for place, layer in job.cuts.items():
                if place not in job.done:
                    row = {"cut": layer, "place": place, "outcome": "crash", "reason": why, "seconds": self.seconds}
                    self._keep(self.rows, job.named | row)
        self._keep([], job.named | {"last": True})
        mine = [row for row in self.rows if job.named.items() <= row.items()]
        told = " ".join(row["outcome"] for row in mine) or job.skipped or ("built" if job.cuts else why)
        self.finished += 1
        print(
            f"[{self.finished}/{total}] {job.architecture.family} {job.architecture.name}: {told}",
            file=sys.stderr,
            flush=True,
        )
        for row in mine:
            if row["outcome"] in ("wrong", "crash"):
                print(f"    {row['cut']}: {row['outcome']}: {row['reason']}", file=sys.stderr, flush=True)

    def _keep(self, where: list[Row], row: Row) -> None:
        where.append(row)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps(row) + "\n")


# --- What is said -----------------------------------------------------------------------------------------------------


def by_family(rows: list[Row]) -> list[Row]:
    """Architectures, cuts and outcomes of each family, then of all."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    summary = []
    for family in [*families, "all"]:
        mine = [row for row in rows if family in (row["family"], "all")]
        counts = Counter(row["outcome"] for row in mine)
        names = {(row["family"], row["architecture"]) for row in mine}
        share = counts["ok"] / len(mine) if mine else 0.0
        summary.append(
            {
                "family": family,
                "architectures": len(names),
                "cuts": len(mine),
                **{o: counts[o] for o in OUTCOMES},
                "share": round(share, 4),
            }
        )
    return summary


def print_summary(sweep: Sweep) -> None:
    print(f"{'family':32} {'networks':>8} {'cuts':>5} {'ok':>5} {'refused':>7} {'wrong':>5} {'crash':>5} {'share':>6}")
    for row in by_family(sweep.rows):
        counts = f"{row['ok']:5} {row['refused']:7} {row['wrong']:5} {row['crash']:5}"
        print(f"{row['family']:32} {row['architectures']:8} {row['cuts']:5} {counts} {row['share']:6.1%}")
    reasons = Counter(re.sub(r"'[^']*'|\d+", "…", row["reason"]) for row in sweep.rows if row["outcome"] == "refused")
    for text, count in reasons.most_common(20):
        print(f"refused {count:4} times: {text}")
    for row in sweep.skipped:
        print(f"skipped: {row['family']} {row['architecture']}: {row['why']}")


def versions() -> dict[str, str]:
    """Of the packages that models-requirements.txt pins."""
    lines = (ROOT / "benchmarks" / "models-requirements.txt").read_text().splitlines()
    names = [line.partition("==")[0].strip() for line in lines if "==" in line and not line.startswith("#")]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whether halfpass cuts real public networks exactly.")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--seconds", type=int, default=60, help="of work for one network with its three cuts")
    parser.add_argument("--family", default="", help="only families whose name has this")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="only networks of these names")
    parser.add_argument("--limit", type=int, help="at most so many networks")
    parser.add_argument("--every", type=int, default=1, help="only each so-manieth network")
    parser.add_argument("--resume", action="store_true", help="go on from the .jsonl beside --json")
    parser.add_argument("--build", action="store_true", help="only build each network and take a step")
    parser.add_argument("--json", type=Path, help="results file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweeps, prints and writes; 0 when nothing is wrong and nothing crashed."""
    options = parse(arguments)
    command = command_line("python benchmarks/models.py", arguments)
    settle()
    wanted = [a for a in every() if options.family in a.family and (not options.only or a.name in options.only)]
    wanted = wanted[:: options.every][: options.limit]
    log = options.json and options.json.absolute().with_suffix(".jsonl")
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    if log is not None and not options.resume:
        log.unlink(missing_ok=True)
    sweep = Sweep(log, options.seconds, options.build)
    done = sweep.resume() if options.resume else set()
    with _explained_stop():
        sweep.run([a for a in wanted if (a.family, a.name) not in done], options.jobs)
    print_summary(sweep)
    if options.build:
        print(" ".join(f"{family}:{count}" for family, count in sweep.built.items()))
        return 1 if sweep.skipped else 0
    if options.json is not None:
        families = by_family(sweep.rows)
        content = {"environment": environment(), "command": command, "versions": versions(), "families": families}
        write_json(options.json, content | {"skipped": sweep.skipped, "rows": sweep.rows})
    return 1 if any(row["outcome"] in ("wrong", "crash") for row in sweep.rows) else 0


@contextlib.contextmanager
def _explained_stop() -> Iterator[None]:
    """Ctrl-C ends the sweep with what there is."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; --resume goes on", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
