"""How much main memory this machine, or this container, has."""

from __future__ import annotations

import os
from pathlib import Path


def main_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Total and available bytes; a container's limit counts where it is lower."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # macOS counts no available memory that one could ask for without a child process.
        return total, total
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if ":" in line}
    total = kib["MemTotal"] * 1024
    available = kib.get("MemAvailable", kib["MemFree"]) * 1024
    for limit, used in _cgroup_limits(root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return total, available


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """Limit and use in bytes of this process's memory cgroups and their ancestors."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        # Inside a container the path may be the host's, while the mount is the container's own.
        for each in (folder, *folder.parents):
            if each.is_relative_to(base):
                pair = _number(each / limit), _number(each / used)
                if pair[0] is not None and pair[1] is not None:
                    found.append((pair[0], pair[1]))
    return found


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None  # absent, or "max"
