"""Runs beside each other, and silos: told and drawn by what compares."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from pages import read, report

from photon.dashboard import ComparisonRow, comparison_table, write_report
from photon.dashboard.digest import read_digest
from photon.errors import RunError
from photon.telemetry.events import (
    Evaluated,
    RoundFinished,
)


def test_a_picture_of_its_own(folder, stream, tmp_path):
    run, alone = folder(stream().whole(), "fed"), folder(stream(silos=["judicial"]).whole(), "j")
    loss = write_report(run, out=tmp_path / "loss.svg").read_text()
    beside = write_report(run, out=tmp_path / "beside.svg", compare={"alone: judicial": alone})
    for text, word in ((loss, "shared held-out"), (beside.read_text(), "alone: judicial")):
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert word in "".join(root.itertext())
        colours = set(re.findall(r"var\(--([a-z0-9-]+)\)", text))
        assert all(text.count(f"--{name}: #") == 2 for name in colours)  # light and dark
    assert write_report(run, out=tmp_path / "again.svg").read_text() == loss
    with pytest.raises(RunError, match="nothing to draw yet"):
        write_report(folder([stream().started()], "begun"), out=tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def bytes_per_token(event, *, silos):
    """The event as a text gives it whose tokens are longer in one silo than in the others."""
    factor = 1.5 if event.silo in silos else 1.0
    return event.model_copy(update={"bits_per_byte": event.bits_per_byte / factor})


def test_bits_per_byte_are_drawn_where_texts_of_silos_differ(folder, stream):
    title = "Bits per byte in each silo"
    whole = list(stream().whole())
    assert title not in report(folder, whole).titles
    languages = [
        bytes_per_token(e, silos=["judicial"]) if isinstance(e, Evaluated) else e for e in whole
    ]
    page = read(write_report(folder(languages, "languages")))
    assert page.titles[2] == title
    assert "compare silos by this, not by perplexity" in page.text
    unknown = [
        e.model_copy(update={"bits_per_byte": None}) if isinstance(e, Evaluated) and e.silo else e
        for e in languages
    ]
    assert title not in read(write_report(folder(unknown, "unknown"))).titles
    crowd = stream(silos=[f"client-{i}" for i in range(20)], rounds=2).whole()
    crowd = [
        bytes_per_token(e, silos=["client-3"]) if isinstance(e, Evaluated) else e for e in crowd
    ]
    assert title in read(write_report(folder(crowd, "crowd"))).titles


def test_runs_with_other_tokenizers_are_compared_by_bits_per_byte(folder, stream):
    run = folder(stream().whole(), "fed")
    others = stream(silos=["centralised"], kind="train", floor=4.4)
    words = [
        bytes_per_token(e, silos=[None]) if isinstance(e, Evaluated) else e for e in others.whole()
    ]
    page = read(write_report(run, compare={"words": folder(words, "words")}))
    ours, theirs = read_digest(run).last, read_digest(run.with_name("words")).last
    gap = theirs.bits_per_byte / ours.bits_per_byte - 1
    assert theirs.perplexity > ours.perplexity
    assert gap < 0
    assert f"−{-gap * 100:.1f}%" in page.text
    assert "Bits per byte against this run" in page.text
    assert "held-out bits per byte" in page.text


def test_a_train_run_is_told_as_one(folder, stream):
    made = stream(silos=["centralised"], kind="train", per_silo=False, batch_size=64)
    events = [
        e.model_copy(
            update=dict.fromkeys(
                ("bytes_up", "bytes_down", "total_bytes_up", "total_bytes_down"), 0
            )
        )
        if isinstance(e, RoundFinished)
        else e
        for e in made.whole()
    ]
    page = report(folder, events)
    assert "One model of 1.1M parameters was trained centrally, on pooled text" in page.text
    assert "over 192 optimizer steps" in page.text
    assert "a central run exchanges nothing" in page.text
    assert "Bytes exchanged" not in page.titles
    assert "less than an exchange" not in page.text


def test_other_runs_are_overlaid_and_tabled(folder, stream):
    run = folder(stream().whole(), "fed")
    pooled = folder(stream(silos=["centralised"], kind="train", batch_size=64).whole(), "pooled")
    alone = folder(stream(silos=["judicial"], floor=5.0, per_silo=False).whole(), "alone")
    page = read(write_report(run, compare={"centralised": pooled, "alone: judicial": alone}))
    assert "Against other runs" in page.titles
    last, other = read_digest(run).last, read_digest(alone).last
    gap = other.perplexity / last.perplexity - 1
    assert f"alone: judicial 393k {other.perplexity:.0f}" in page.text
    assert f"+{gap * 100:.1f}%" in page.text
    overlay = re.findall(r"<svg.*?</svg>", page.raw, flags=re.DOTALL)[2]
    assert "var(--silo-3)" in overlay  # A silo alone keeps its colour.
    assert "stroke-dasharray" in overlay


def test_a_run_to_compare_that_has_no_evaluation_is_in_the_table(folder, stream):
    run = folder(stream().whole(), "fed")
    empty = folder([stream().started()], "empty")
    page = read(write_report(run, compare={"empty": empty}))
    assert "empty not finished 0 – – –" in page.text
    assert "Against other runs" not in page.titles


def test_the_terminal_table_compares(folder, stream):
    import io

    from rich.console import Console

    fed = ComparisonRow.read("federated", folder(stream().whole(), "a"), federated=True)
    rows = [
        fed,
        ComparisonRow("centralised", 3_100_000, fed.perplexity * 0.9, 1.496, 61.0),
        ComparisonRow("alone: [bold]judicial", 786_432, fed.perplexity * 1.5, 1.66, None),
        ComparisonRow("untested", 0, None, None, None),
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(rows))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert lines[1:] == [
        "federated 1.6M 118 1.530 – 1 min 54 s",
        "centralised 3.1M 107 1.496 −10.0% 1 min 01 s",
        "alone: [bold]judicial 786k 178 1.660 +50.0% –",
        "untested 0 – – – –",
    ]


def test_a_central_run_over_many_silos_has_one_curve(folder, stream):
    silos = [f"client-{i:02d}" for i in range(64)]
    central = stream(silos=["centralised"], kind="train", per_silo=False)
    started = stream(silos=silos, kind="train", sample=1).started()
    page = report(folder, [started, *list(central.whole())[1:]])
    assert "was trained centrally, on pooled text" in page.text
    assert "training loss of" not in page.text
