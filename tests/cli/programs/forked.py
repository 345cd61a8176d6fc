"""`photon` in a process forked from one that has imported it, as if started anew."""

from __future__ import annotations

import os
import resource
import signal
import sys

import waiting_fork_server

# Given by the one who forked: argv, files for stdout and stderr, how large a file may get, whether
# a fork server of its own is to be started as ever.
_given = globals()


def main() -> None:
    # A suite started in the background inherits an ignored SIGINT; a person's shell does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, path in ((1, _given["out"]), (2, _given["error"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    if _given["file_limit_bytes"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = (_given["file_limit_bytes"], resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    if not _given["starts_fork_server"]:
        waiting_fork_server.stand_by()
    sys.argv = ["photon", *_given["words"]]
    from photon.cli.main import main as photon

    photon()


if __name__ == "__main__":
    main()
