"""A fork server that stands ready in a process forked for a test, should it want one.

multiprocessing starts a Python for it, which takes five seconds to import PyTorch and Photon.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
from multiprocessing import util


def stand_by() -> None:
    """Fork the server now, before threads run here; it begins when multiprocessing starts one."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        try:
            _wait(theirs)
        finally:
            os._exit(0)
    theirs.close()
    start, waiting = util.spawnv_passfds, [pid]

    def begin(path, args, passfds) -> int:
        if not waiting or "multiprocessing.forkserver" not in args[-1]:
            return start(path, args, passfds)
        numbers = list(map(int, passfds))
        socket.send_fds(ours, [json.dumps([args[-1], numbers]).encode()], numbers)
        return waiting.pop()

    util.spawnv_passfds = begin


def _wait(begun: socket.socket) -> None:
    """Do as `python -c COMMAND` does, with the files that it is to inherit and no others."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    message, files, _, _ = socket.recv_fds(begun, 1 << 20, 8)
    if not message:  # the process is over
        return
    signal.signal(signal.SIGINT, before)
    command, numbers = json.loads(message)
    beyond = max([begun.fileno(), *numbers, *files]) + 1
    kept = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, beyond) for file in files]
    os.closerange(3, beyond)
    for file, number in zip(kept, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)
    exec(command, {"__name__": "__main__"})
