"""`halfpass` commands as from a terminal, forked from a process that has imported what they need: that takes seconds.

Those that start processes of their own are not for this: they would be forked here too, and not as children.
"""

import contextlib
import subprocess
import sys
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
