from __future__ import annotations
from collections.abc import Mapping
from pathlib import Path
def write_report(run_folder: Path, *, out: Path | None = None, compare: Mapping[str, Path] | None = None) -> Path:
    return out or run_folder / "report.html"
