"""What may leave, by trying every table that there is."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon.examine.cells import Table, publish


def told(counts: dict[str, int], cell: int) -> tuple[Table | None, int]:
    """What anybody knows: the table, and how many documents there are."""
    return publish(counts, [*counts], cell), sum(counts.values())


@pytest.mark.parametrize(
    ("cell", "cells", "most"), [(3, 2, 20), (3, 3, 16), (3, 4, 12), (4, 3, 16)]
)
def test_no_small_cell_can_be_computed(cell: int, cells: int, most: int) -> None:
    # All tables of up to `most` documents, by what is known of them.
    names = [f"c{n}" for n in range(cells)]
    tables: dict[Any, list[tuple[int, ...]]] = defaultdict(list)
    for counts in product(range(most + 1), repeat=cells):
        if 2 * cell <= sum(counts) <= most:  # of fewer nothing is published
            table, documents = told(dict(zip(names, counts, strict=True)), cell)
            tables[table.model_dump_json() if table else None, documents].append(counts)
    suppressed = 0
    for (text, documents), possible in tables.items():
        table = None if text is None else Table.model_validate_json(text)
        for place, name in enumerate(names):
            values = {counts[place] for counts in possible}
            if not (table and name in table.cells) and min(values) < cell:
                suppressed += 1
                assert len(values) >= cell - 1, (text, documents, name, values)
    assert suppressed > 10


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(3, 20), st.integers(0, 19))
def test_counts_are_those_of_the_text_and_none_is_small(
    counts: list[int], cell: int, lone: int
) -> None:
    given_counts = {f"c{n}": count for n, count in enumerate([*counts, lone])}
    table, documents = told(given_counts, cell)
    if table is None:
        return
    published = [*table.cells.values(), *([table.joined_documents] if table.joined else [])]
    assert min(published) >= cell
    assert sum(published) == documents
    assert all(given_counts[name] == count for name, count in table.cells.items())
    # Each small cell could be anything below the cell size: the others take up the difference.
    small = [name for name in given_counts if name not in (*table.cells, *table.joined)]
    assert all(given_counts[name] < cell for name in small)
    if small:
        assert table.joined_documents - cell * len(table.joined) >= cell - 1


def test_a_small_cell_takes_a_large_one_with_it() -> None:
    table = publish({"en": 900, "de": 50, "nl": 3}, ["de", "en", "fr", "nl"], 10)
    assert table == Table(cells={"en": 900}, joined=["de"], joined_documents=53)
    assert publish({"found": 500, "not": 400}, ["not", "found"], 10) == Table(
        cells={"not": 400, "found": 500}
    )
    # Nine and ten: the ten could be no other number if it stood alone.
    assert publish({"a": 10, "b": 9, "c": 9}, ["a", "b", "c"], 10) is not None
    assert publish({"a": 9, "b": 9}, ["a", "b"], 10) is None


def test_company_does_not_depend_on_counts() -> None:
    names = ["a", "b", "c"]
    for counts in ({"a": 40, "b": 90, "c": 2}, {"a": 90, "b": 40, "c": 2}):
        table = publish(counts, names, 10)
        assert table is not None
        assert table.joined == ["a"]
