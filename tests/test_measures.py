"""Memory and time: the peak against an allocation of known size, the clock against known sleeps."""

import dataclasses
import platform
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from runtimes import rows_of

from halfpass.config import ClientsConfig, Config, DataConfig, ModelConfig, TrainConfig
from halfpass.run import centralized, epochs, local, records, setup
from halfpass.run.epoch import Tally
from halfpass.run.memory import PeakMemory
from halfpass.run.train import train, with_threads
from halfpass.tasks.table import classes


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is of all time")
def test_a_known_allocation_shows_also_after_it_is_freed_and_after_an_earlier_larger_one():
    earlier = torch.ones(100 * 2**20, dtype=torch.uint8)
    del earlier
    memory = PeakMemory(torch.device("cpu"))
    assert memory.peak_bytes() < 8 * 2**20
    now = torch.ones(50 * 2**20, dtype=torch.uint8)
    del now
    assert 48 * 2**20 <= memory.peak_bytes() < 60 * 2**20  # the kernel counts resident pages in batches


def test_a_clock_is_read_after_the_gpu_is_done(monkeypatch):
    """The authors' timers did not synchronize (paper notes)."""
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: (calls.append(device), time.sleep(0.05)))
    tally = Tally(torch.device("cuda", 0))
    with tally.busy():
        pass
    assert calls == [torch.device("cuda", 0)]
    assert tally.busy_seconds >= 0.05


def test_evaluation_takes_no_training_time(tmp_path, monkeypatch):
    """By a clock that goes on in tests alone."""
    now = [0.0]

    def timed(test):
        def tested(*arguments):
            now[0] += 1e6
            return test(*arguments)

        return tested

    monkeypatch.setattr(local.LocalRun, "test", timed(local.LocalRun.test))
    monkeypatch.setattr(centralized, "test_whole", timed(centralized.test_whole))
    for module in (epochs, centralized):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for method in ("decoupled", "centralized"):
        recipe = TrainConfig(epochs=1, batch_size=64, threads=1)
        outcome = train(Config(method=method, data=DataConfig(limit=128), train=recipe, out=str(tmp_path / method)))
        assert outcome["train_seconds"] < 1e6
    assert now == [2e6]


def test_mean_loss_is_over_samples_not_over_steps():
    tally = Tally(torch.device("cpu"))
    tally.add(1.0, samples=30)
    tally.add(3.0, samples=10)
    assert tally.mean_loss == 1.5
    assert (tally.steps, tally.samples) == (2, 40)


def test_a_result_is_of_all_epochs_and_clients():
    """Peaks are the largest, seconds add up, those of clients on average, and accuracies are the last epoch's."""
    def row(epoch, process, busy, peak, **accuracy):
        tally = Tally(torch.device("cpu"), busy_seconds=busy, peak_memory_bytes=peak)
        return records.row(epoch, process, tally, 10.0, **accuracy)

    rows = [
        row(0, "client-0", 1.0, 50, aux_test_accuracy=0.1), row(0, "client-1", 3.0, 40, aux_test_accuracy=0.2),
        row(0, "server", 2.0, 70, test_accuracy=0.9),
        row(1, "client-0", 2.0, 60, aux_test_accuracy=0.5), row(1, "client-1", 4.0, 30, aux_test_accuracy=0.25),
        row(1, "server", 5.0, 80, test_accuracy=0.75),
    ]  # fmt: skip
    settings = Config(runtime="processes", clients=ClientsConfig(2, "independent"), train=TrainConfig(epochs=2))
    found = records.result(settings, classes(10), "block_2", rows, records.Wires([], None), {})
    assert (found["test_accuracy"], found["aux_test_accuracy"]) == (0.75, 0.375)
    assert found["peak_memory_bytes"] == {"client": [60, 40], "server": 80, "colocated": None}
    assert found["seconds"] == {"client_busy": 5.0, "client_waiting": 15.0, "server_busy": 7.0, "server_waiting": 13.0}
    assert found["train_seconds"] == 20.0


FAULTS = """
import resource, torch
from halfpass.config import Config, TrainConfig
from halfpass.networks.models import build_model
from halfpass.run.setup import settle_process
torch.set_num_threads(1)
half, x = build_model("resnet20", (3, 32, 32), 10, seed=0).stage_1, torch.randn(64, 16, 32, 32)
def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        half(x).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(3)
left = faults(5)
settle_process(Config(train=TrainConfig(threads=1)))
faults(3)
print(left, faults(5))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
def test_memory_that_a_step_frees_is_there_for_the_next():
    """Page faults of five steps: many with malloc as it comes, hardly any once the process is settled for training."""
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    left, kept = map(int, said.split())
    assert kept < 0.3 * left, said


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(setup, "available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for runtime, clients, threads, each in [
        ("local", 3, None, 8), ("processes", 1, None, 4), ("processes", 3, None, 2), ("processes", 20, None, 1), ("processes", 3, 5, 5),
    ]:  # fmt: skip
        settings = Config(runtime=runtime, clients=ClientsConfig(clients), train=TrainConfig(threads=threads))
        assert with_threads(settings).train.threads == each


def test_a_change_anywhere_in_the_package_marks_the_commit(tmp_path, monkeypatch):
    files = {name: tmp_path / "halfpass" / name / "x.py" for name in ("run", "learn")}
    for file in files.values():
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    name = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(records, "__file__", str(files["run"]))
    clean = records.environment()["commit"]
    files["learn"].write_text("2\n")
    assert records.environment()["commit"] == f"{clean}+"


def test_what_a_run_says_of_threads_and_memory_is_its_own(tmp_path):
    """Not the caller's threads; and not the other side's memory, where they are processes (the server half is small)."""
    torch.set_num_threads(2)
    run = Config(
        runtime="processes", data=DataConfig("digits", limit=512), model=ModelConfig("digits-cnn", "block_4"),
        train=TrainConfig(epochs=3, batch_size=256, threads=1), out=str(tmp_path / "run"),
    )  # fmt: skip
    train(run)
    peaks = {side: [row["peak_memory_bytes"] for row in rows_of(tmp_path / "run") if row["process"] == side] for side in ("client-0", "server")}
    assert max(peaks["server"]) < min(peaks["client-0"])
    assert train(dataclasses.replace(run, runtime="local", out=str(tmp_path / "local")))["environment"]["threads"] == 1
