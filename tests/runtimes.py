"""A training in one process and between processes, and what it wrote."""

import dataclasses
import json

from plain import equal
from safetensors.torch import load_file

from halfpass.run.train import train


def train_in_both_runtimes(settings, folder, owners=("client-0", "client-1", "server")):
    """Holds that processes and one process end with the same weights of all `owners`; returns both results."""
    runtimes = ("local", "processes")
    results = {name: train(dataclasses.replace(settings, runtime=name, out=str(folder / name))) for name in runtimes}
    for owner in owners:
        local, processes = (load_file(folder / name / f"{owner}.safetensors") for name in runtimes)
        assert equal(local, processes), owner
        assert not equal(local, {name: value + 1 for name, value in processes.items()})
    return results


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
