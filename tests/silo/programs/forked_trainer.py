"""`python -m photon.silo` in a process forked from one that has imported it, as if started anew."""

from __future__ import annotations

import os
import runpy
import sys

from photon.silo import service

# Given by the one who forked: argv after the module, a file for stdout and stderr, and how long it
# may take over its last words (None: as ever).
_given = globals()


def main() -> None:
    os.setsid()
    file = os.open(_given["out"], os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    if _given["last_words_s"] is not None:
        service._LAST_WORDS_S = _given["last_words_s"]
    sys.argv = ["photon.silo", *_given["words"]]
    runpy.run_module("photon.silo", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
