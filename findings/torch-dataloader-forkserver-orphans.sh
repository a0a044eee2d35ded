#!/bin/bash
# What one would expect: a DataLoader's workers end when the process that draws from them is killed. PyTorch's workers
#   look every five seconds whether their parent is still there, so that they do.
# What happens: they look at the process that forked them. With multiprocessing's fork server that is the server, which
#   is kept alive by the workers themselves: when the training is killed, workers and server live on for ever, with what
#   the data set holds in memory. With fork and with spawn they end after five seconds.
# For whom it matters: the fork server is the default on Linux from Python 3.14 on. Trainings that run out of memory or
#   are killed by a scheduler or a supervisor leave their workers behind; each restart adds more.
# Remedy: a worker_init_fn that waits for multiprocessing.parent_process().sentinel in a thread, and ends the worker.
# Version: torch 2.13.0, Python 3.11. Date: 2026-11-29.
# Installs it in a temporary folder and runs it; fails where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0 numpy==2.4.0
cat > "$folder/training.py" <<'PYTHON'
import sys
import time

import torch
from torch.utils.data import DataLoader


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return torch.tensor(i)


if __name__ == "__main__":
    batches = iter(DataLoader(Numbers(), batch_size=2, num_workers=2, multiprocessing_context=sys.argv[1]))
    next(batches)
    print(*(worker.pid for worker in batches._workers), flush=True)
    time.sleep(600)
PYTHON
cat > "$folder/kill.py" <<'PYTHON'
import os
import signal
import subprocess
import sys
import time

import torch


def alive(pids):
    found = []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] != "Z":
                    found.append(pid)
        except FileNotFoundError:
            pass
    return found


print("torch", torch.__version__, "Python", sys.version.split()[0])
left = {}
for method in ("fork", "spawn", "forkserver"):
    training = subprocess.Popen([sys.executable, sys.argv[1], method], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in training.stdout.readline().split()]
    assert len(alive(workers)) == 2
    training.kill()
    training.wait()
    began = time.monotonic()
    while alive(workers) and time.monotonic() - began < 30:
        time.sleep(0.2)
    left[method] = len(alive(workers))
    print(f"{method}: {left[method]} of 2 workers alive {time.monotonic() - began:.0f} s after the training was killed")
    for pid in alive(workers):
        os.kill(pid, signal.SIGKILL)
assert left == {"fork": 0, "spawn": 0, "forkserver": 2}, "changed"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/kill.py" "$folder/training.py"
