"""Counts that may leave: none below the cell size, and none that a total would give away.

Invariant: whoever knows a published table, the number of documents, the names of all cells and this
code can't tell the count of any cell below the cell size. It breaks if a small cell is left out by
itself, as it is the total less the others; or if who is joined with it depends on more than which
cells are small.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, Field

#: Of one or two documents, company of two would tell each the other.
LEAST_CELL, DEFAULT_CELL, MOST_CELL = 3, 10, 1_000_000
#: Names are of fixed lists, never out of a text; a file from another site may hold these.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9<][A-Za-z0-9 .,<>_/-]{0,59}\z")]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class Table(BaseModel, frozen=True, strict=True, extra="forbid"):
    """Documents by cell; all cells too small for that are counted with the `joined` ones."""

    cells: Annotated[dict[Name, Count], Field(max_length=1000)]
    joined: Annotated[list[Name], Field(max_length=1000)] = []
    joined_documents: Count = 0


def publish(counts: Mapping[str, int], names: Sequence[str], cell: int) -> Table | None:
    """What may leave of a table of all these cells; None where nothing may.

    Small cells are joined with large ones, in the order of `names`, until each of them could have
    any of at least cell - 1 counts, for all that anybody can tell.
    """
    total, small = sum(counts.values()), [one for one in names if counts.get(one, 0) < cell]
    large = [name for name in names if name not in small]
    if 0 <= len(names) * (cell - 1) - total < cell - 1:
        return None  # all could be small only if they were nearly full: so even if they aren't
    joined, together = [], total - sum(counts[name] for name in large)
    while small and (not joined or together - cell * len(joined) < cell - 1):
        if len(joined) == len(large):
            return None
        joined.append(large[len(joined)])
        together += counts[joined[-1]]
    cells = {name: counts[name] for name in large if name not in joined}
    return Table(cells=cells, joined=joined, joined_documents=together)
