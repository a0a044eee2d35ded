"""The step of this checkout beside that of an older one: did anything become slower or larger?

    git worktree add ../before 8777336
    python benchmarks/before.py ../before --out results/before.json

Each checkout has a process of its own, which trains ResNet-20 decoupled on random pictures, as row (a) of step.py does.
The two take turns, A B A B …, one waiting while the other works; a ratio is that of two turns one after the other,
and the figure is the median of the ratios. Both must end with the same weights. Nothing else should run meanwhile.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from halfpass.errors import RunError
from halfpass.files import write_json
from halfpass.run.records import command_line, environment

ROOT = Path(__file__).resolve().parents[1]
BOUND, MEMORY_BOUND = 1.02, 1.01
# What runs in each checkout, with its own benchmarks/step.py: a turn for each line that comes in.
TURN = """
import hashlib, os, resource, statistics, sys
import torch, step
data = step.augmented_data()
config = step.with_precision(step.MIDDLE, sys.argv[2])
run = step.local_run(config, data, step.first_batches(data, int(sys.argv[1])))
for epoch, _ in enumerate(sys.stdin):
    seconds = statistics.median(step.step_seconds(run.train, epoch))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    halves = (run.clients[0].half, run.server.half)
    digest = hashlib.sha256()
    for half in halves:
        for name, value in sorted(half.state_dict().items()):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
    print("turn", seconds, peak, digest.hexdigest(), flush=True)
"""


class Checkout:
    """A process that trains by one checkout's code, a turn when it is asked."""

    def __init__(self, tree: Path, steps: int, precision: str) -> None:
        self.tree = tree
        path = os.pathsep.join([str(tree), str(tree / "benchmarks")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", TURN, str(steps), precision], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": path}, cwd=tree,
        )  # fmt: skip

    def turn(self) -> tuple[float, float, str]:
        """(median seconds of a step, peak memory so far in MiB, digest of the weights)."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("turn "):
                _, seconds, peak, digest = line.split()
                return float(seconds), float(peak), digest
        raise RunError(str(self.tree), "a turn of training", "a process that ended", "see its error above")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(before: Path, steps: int, rounds: int, precision: str) -> dict[str, Any]:
    """One row."""
    with contextlib.ExitStack() as stack:
        sides = [Checkout(tree, steps, precision) for tree in (ROOT, before)]
        for side in sides:
            stack.callback(side.stop)
        turns = [[side.turn() for side in sides] for _ in range(rounds + 1)][1:]  # the first is not counted
    (_, peak, digest), (_, other_peak, other_digest) = turns[-1]
    if digest != other_digest:
        raise RunError("the two checkouts", "the same weights", "others", "find what changed the arithmetic")
    ratios = sorted(a[0] / b[0] for a, b in turns)
    return {
        "precision": precision, "steps": steps, "rounds": rounds, "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]], "memory_ratio": peak / other_peak,
        "seconds_per_step": statistics.median(a[0] for a, _ in turns),
        "before_seconds_per_step": statistics.median(b[0] for _, b in turns),
        "peak_mib": peak, "before_peak_mib": other_peak,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("before", type=Path, help="the older checkout, with a benchmarks/step.py")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=25, help="turns of each side")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    if not (options.before / "benchmarks" / "step.py").is_file():
        parser.error(f"{options.before}: expected a checkout of halfpass, found no benchmarks/step.py")
    older = options.before.resolve()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=older, capture_output=True, text=True)
    rows = []
    for precision in ("fp32", "bf16"):
        row = measure(older, options.steps, options.rounds, precision)
        rows.append(row)
        print(f"{precision}: {row['ratio']:.3f} × the seconds of {commit.stdout.strip()} (≤ {BOUND}), "
              f"quartiles {row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f}; "
              f"{row['memory_ratio']:.3f} × its memory (≤ {MEMORY_BOUND})", flush=True)  # fmt: skip
    if options.out is not None:
        command, older_commit = command_line("python benchmarks/before.py"), commit.stdout.strip()
        about = {"command": command, "before": older_commit, "environment": environment()}
        write_json(options.out, {**about, "rows": rows})
    return int(any(row["ratio"] > BOUND or row["memory_ratio"] > MEMORY_BOUND for row in rows))


if __name__ == "__main__":
    sys.exit(main())
