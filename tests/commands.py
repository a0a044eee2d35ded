"""`halfpass` commands as from a terminal, forked from a process that has imported what they need: that takes seconds.

It is the one that forks this process's own children. What a command starts itself is forked there too.
"""

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from halfpass.run import fork_server


def start(words, folder, stdout, stderr):
    """The process, `stdout` and `stderr` being descriptors; the former may be subprocess.PIPE."""
    words = list(map(str, words))
    with contextlib.chdir(folder), mock.patch.object(fork_server, "CHILD", "HALFPASS_FORKED"):  # it is nobody's child
        process = fork_server.fork(words, stdout=stdout, stderr=stderr)
    return process or subprocess.Popen(
        [sys.executable, "-m", "halfpass", *words], cwd=folder, stdout=stdout, stderr=stderr, text=True
    )


class Command:
    """One with pipes, as `subprocess.Popen` would give it."""

    def __init__(self, words, folder="."):
        read, write = os.pipe()
        self.process = start(words, folder, subprocess.PIPE, write)
        os.close(write)
        self.stdout, self.stderr = self.process.stdout, os.fdopen(read)
        self.poll, self.wait, self.pid = self.process.poll, self.process.wait, self.process.pid
        self.send_signal, self.terminate, self.kill = self.process.send_signal, self.process.terminate, self.process.kill

    @property
    def returncode(self):
        return self.process.returncode

    def communicate(self, timeout):
        """What is left of its output and its errors, once it has ended."""
        with ThreadPoolExecutor(2) as readers:
            texts = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return texts[0].result(), texts[1].result()
