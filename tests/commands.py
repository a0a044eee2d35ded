"""`halfpass` commands as from a terminal, forked from a process that has imported what they need: that takes seconds.

Those that start processes of their own are not for this: they would be forked here too, and not as children.
"""

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from halfpass.run import fork_server

_forking = {"_link": None, "_server": None}  # a fork server beside that of this process's own children


def start(words, folder, stdout, stderr):
    """The process, `stdout` and `stderr` being descriptors; the former may be subprocess.PIPE."""
    with contextlib.chdir(folder), mock.patch.multiple(fork_server, CHILD="HALFPASS_FORKED", **_forking):
        process = fork_server.fork(words, stdout=stdout, stderr=stderr)
        _forking.update(_link=fork_server._link, _server=fork_server._server)
    return process or subprocess.Popen(
        [sys.executable, "-m", "halfpass", *words], cwd=folder, stdout=stdout, stderr=stderr, text=True
    )


class Command:
    """One with pipes, as `subprocess.Popen` would give it."""

    def __init__(self, words, folder):
        read, write = os.pipe()
        self.process = start(list(map(str, words)), folder, subprocess.PIPE, write)
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
