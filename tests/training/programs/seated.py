"""Takes a rank's seat in a process forked for it, then runs a program as if started anew."""

from __future__ import annotations

import os
import runpy
import sys

# Given by the one who forked: environment, argv, files for stdout and stderr.
_given = globals()


def main() -> None:
    os.environ.update(_given["environment"])
    for descriptor, path in ((1, _given["out"]), (2, _given["error"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = _given["argv"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
