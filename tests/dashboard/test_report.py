"""The HTML report: what it says, what it draws, and what must never break it."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import pytest
from pages import read, report

from photon.dashboard import write_report
from photon.errors import DiskFullError, MachineError, RunNotFoundError
from photon.telemetry.events import (
    Evaluated,
    LocalProgress,
    UpdateDropped,
)

FIGURES = [
    "Loss",
    "Perplexity in each silo",
    "Where the time went, round by round",
    "Bytes exchanged",
    "Training speed of each silo",
]


def test_the_page_says_in_words_and_figures_what_the_run_did(folder, stream):
    made = stream(rounds=12, dropped={3: "judicial"}, lost={5: "republican"})
    page = report(folder, made.whole())
    assert (
        "Four silos trained one model of 1.1M parameters over 12 rounds without moving their "
        "text; perplexity on shared held-out text fell from 812 to 101." in page.text
    )
    tasks, dropped_tokens = 48, 65_536
    moved = 2 * 4 * 1_100_000 * tasks
    baseline = 4 * 1_100_000 * 2 * 32 * tasks
    assert made.tokens == tasks * 65_536 - dropped_tokens
    for words in (
        "perplexity 101 812 before training",
        "bits per byte 1.48",
        "rounds 12 of 12 32 local steps each",
        "tokens trained on 3.1M",
        f"bytes exchanged 422 MB {baseline // moved}× less than an exchange every step",
        "wall-clock time 3 min 48 s",
        "training 84%",
        "4 bytes × 1,100,000 parameters × 2 directions × 32 local steps × 48 tasks",
        "= 13.5 GB",
        "local training 84% (3 min 12 s)",
        "judicial 400k 40.0% 12 4.855 944 117 1.528 1",
        "update dropped judicial update has 3 values that are not finite",
        "worker lost republican worker 1: exit code -9 (killed)",
    ):
        assert words in page.text
    assert page.titles == [*FIGURES, "Where the time went, whole run"]
    assert page.text.count("Pseudo-gradient") == 1
    assert "not finished" not in page.text


def test_how_silos_trained_is_told_where_their_nodes_told_it(folder, stream):
    assert "How silos trained" not in report(folder, stream().whole()).text
    # 8 s of training a task; what is not told of them is "other".
    told = {"data_s": 0.5, "forward_s": 2.0, "backward_s": 4.0, "optimizer_s": 1.0}
    told |= {"mfu": 0.415, "communication_s": 0.8, "peak_memory_bytes": 3_000_000_000}
    page = report(folder, stream(step_s=told).whole())
    bars = [attrs["aria-label"] for _, attrs in page.tags if "step" in attrs.get("class", "")]
    assert bars == ["data 6%, forward 25%, backward 50%, optimizer 12%, other 6%"] * 4
    table = page.raw[page.raw.index("How silos trained") : page.raw.index("<h2>Incidents")]
    row = re.findall(r'<td class="n"[^>]*>([^<]*)</td>', table)[:7]
    assert row == ["16.4k", "10%", "41.5%", "3.0 GB", "–", "4.4 MB", "4.4 MB"]


def test_nothing_comes_from_elsewhere_and_nothing_needs_a_script(folder, stream):
    page = report(folder, stream().whole())
    assert all(ref.startswith("#") for ref in page.refs)
    assert "http" not in page.raw
    assert "url(" not in re.sub(r"url\(#", "", page.raw)
    assert "@import" not in page.raw
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object")]
    assert "prefers-color-scheme: dark" in page.raw
    assert "@media print" in page.raw


def test_a_phone_sees_all_of_every_figure_and_cell(folder, stream):
    told = stream(step_s={"forward_s": 2.0}, dropped={2: "judicial"})
    run, other = folder(told.whole(), "fed"), folder(stream(silos=["x"]).whole(), "other")
    page = read(write_report(run, compare={"alone": other}))
    assert "min-width: 640px" not in page.raw  # nothing is cut and scrolled
    wide = [attrs for tag, attrs in page.tags if attrs.get("class") == "plot roomy"]
    narrow = re.findall(r'<div class="plot narrow">(.*?)</div>', page.raw, re.S)
    assert len(wide) == len(narrow) == 2
    for svg in narrow:  # drawn for it, not shrunk until nobody can read it
        assert float(re.search(r'viewBox="0 0 (\S+) ', svg).group(1)) < 400
    for table in re.findall(r"<table>(.*?)</table>", page.raw, re.S):
        heads = [" ".join(head.split()) for head in re.findall(r"<th[^>]*>([^<]+)", table)]
        for cells in re.findall(r"<tr[^>]*>((?:<td|\s).*?)</tr>", table, re.S):
            names = re.findall(r'<td(?: class="[^"]*")?(?: data-label="([^"]*)")?', cells)
            assert len(names) == len(heads)
            # Each cell says its column's name, but for the one that names its row.
            assert [n for n, head in zip(names, heads, strict=True) if n != head] == [""]


def test_ids_are_unique_and_every_reference_has_one(folder, stream):
    page = report(folder, stream().whole())
    assert len(page.ids) == len(set(page.ids)) > 50
    wanted = {ref[1:] for ref in page.refs} | set(re.findall(r"url\(#([^)]+)\)", page.raw))
    assert wanted
    assert wanted <= set(page.ids)


def test_figures_follow_the_colour_scheme(folder, stream):
    page = report(folder, stream().whole())
    figures = re.findall(r"<svg.*?</svg>", page.raw, flags=re.DOTALL)
    assert len(figures) == len(FIGURES) + 1  # the loss for narrow screens
    for figure in figures:
        assert set(re.findall(r"#[0-9a-f]{6}\b", figure)) == set()
        assert "var(--" in figure
        assert 'role="img"' in figure
        assert "font-family" not in figure
    names = {name for name, _ in re.findall(r"(var\(--([a-z0-9-]+)\))", "".join(figures))}
    assert all(f"--{name[6:-1]}: #" in page.raw for name in names)


def test_a_silo_has_one_colour_everywhere(folder, stream):
    page = report(folder, stream().whole())
    colour = r"var\(--silo-2\)"  # independent
    figures = re.findall(r"<svg.*?</svg>", page.raw, flags=re.DOTALL)
    with_colour = [i for i, figure in enumerate(figures) if re.search(colour, figure)]
    assert with_colour == [0, 1, 2, 5]
    assert re.search(rf'background: {colour}"></span>independent', page.raw)


def test_the_same_events_give_the_same_bytes(folder, stream, tmp_path):
    run = folder(stream().whole())
    first = write_report(run, out=tmp_path / "a.html").read_bytes()
    second = write_report(run, out=tmp_path / "b.html").read_bytes()
    assert first == second
    code = (
        "import sys; from photon.dashboard import write_report;"
        "write_report(sys.argv[1], out=sys.argv[2]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    other = tmp_path / "c.html"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, run, other], check=True, env=environment)
    assert other.read_bytes() == first


#: What moves a cursor, turns text round, or is no character at all.
MOVES = "\x1b[2J\x07\x9b\u202egood\ud800"
HOSTILE = "<script>alert(1)</script>\"'&$x_1$ {{7*7}}"


def test_shares_of_time_are_shown_once_the_run_says_them(folder, stream):
    events = list(stream(rounds=2).whole())
    assert "goodput" not in report(folder, events).text
    told = {"goodput": 0.891, "utilisation": 0.987, "tokens_lost": 4_096, "simulated_s": 7_325.0}
    events[-1] = events[-1].model_copy(update={"summary": told})
    page = report(folder, events)
    assert "simulated time 2 h 02 min by the run's clock" in page.text
    assert "goodput 89% of silos' time is in the model; 4.1k tokens lost" in page.text
    assert "utilisation 99% the rest are transfers that nothing hid" in page.text
    events[-1] = events[-1].model_copy(update={"summary": {**told, "simulated_s": None}})
    assert "simulated time" not in report(folder, events).text


def test_hostile_names_stay_text(folder, stream):
    silos = [HOSTILE, "</svg><b>", "$\\frac{", "東京大学", MOVES]
    made = stream(silos=silos, run=HOSTILE + MOVES, dropped={2: HOSTILE}, lost={3: MOVES})
    told = UpdateDropped(round=4, silo=MOVES, reason=f"[/x] [link=https://evil.example]{MOVES}")
    whole = list(made.whole())
    first = whole[0].model_copy(update={"started_at": MOVES, "photon_version": MOVES})
    run = folder([first, *whole[1:-1], told, whole[-1]])
    config = 'name = "</pre><script>alert(2)</script>\x1b[2J\u202e"\n\tlr = 1'
    (run / "config.resolved.toml").write_text(config)
    other = folder(stream(silos=["x"], per_silo=False).whole(), "other")
    page = read(write_report(run, compare={HOSTILE: other, MOVES: other}))
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\ud800"} & set(page.raw)
    assert "[/x] [link=https://evil.example]" in page.text
    assert not [tag for tag, _ in page.tags if tag in ("script", "b")]
    assert page.text.count("<script>alert(1)</script>") >= 4
    assert "</pre><script>alert(2)</script>" in page.text
    assert "{{7*7}}" in page.text
    assert "東京大学" in page.text
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_a_run_without_evaluations_says_so(folder, stream):
    page = report(folder, stream(evaluate_every=0).whole())
    assert "it has not been evaluated on held-out text yet." in page.text
    assert "there is no perplexity to show" in page.text
    assert page.titles[0] == "Loss"
    assert "Perplexity in each silo" not in page.titles


def test_a_run_that_has_only_begun_has_a_page(folder, stream):
    made = stream()
    page = report(folder, [made.started()])
    assert "Four silos have so far trained" in page.text
    assert "This run is not finished: 0 of six rounds are complete" in page.text
    assert page.titles == []
    assert "details" not in [tag for tag, _ in page.tags]  # no run file, nothing to fold away


@pytest.mark.parametrize("rounds", [1, 2])
def test_few_rounds_draw(folder, stream, rounds):
    page = report(folder, stream(rounds=rounds, evaluate_every=rounds).whole())
    assert page.titles == [*FIGURES, "Where the time went, whole run"]
    assert f"over {'one round' if rounds == 1 else 'two rounds'} without" in page.text


def test_one_evaluation_is_a_point_not_a_fall(folder, stream):
    events = [e for e in stream().whole() if not isinstance(e, Evaluated) or e.round == 6]
    page = report(folder, events)
    assert "perplexity on shared held-out text is 118." in page.text


@pytest.mark.parametrize("count", [12, 13, 64])
def test_many_silos_stay_readable(folder, stream, count):
    silos = [f"client-{i:02d}" for i in range(count)]
    path = write_report(folder(stream(silos=silos, sample=8, rounds=20).whole()))
    page = read(path)
    figures = re.findall(r"<svg.*?</svg>", page.raw, flags=re.DOTALL)
    labels = [figure.count("<text") for figure in figures]
    assert max(labels) < 45
    assert path.stat().st_size < 1_500_000
    if count > 12:
        assert "one row per silo" in page.text
        assert f"{count} silos" in page.text
    assert page.text.count("client-") >= count  # All of them in the table.


def test_a_long_run_gives_a_small_page(folder, stream):
    made = stream(silos=[f"c{i}" for i in range(64)], sample=4, rounds=160, log_every=4)
    path = write_report(folder(made.whole()))
    assert path.stat().st_size < 2_500_000


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_diverged_run_draws_what_it_can(folder, stream, bad):
    events = [
        type(e)(**vars(e) | {"loss": bad, "perplexity": bad, "bits_per_byte": bad})
        if isinstance(e, Evaluated) and e.round >= 4
        else type(e)(**vars(e) | {"loss": bad})
        if isinstance(e, LocalProgress) and e.round >= 4
        else e
        for e in stream().whole()
    ]
    page = report(folder, events)
    assert "held-out text is no finite number: the model has diverged" in page.text
    assert "perplexity diverged 812 before training" in page.text
    assert "Three evaluations gave no finite number" in page.text
    assert not re.search(r"\b(nan|inf)\b", "".join(re.findall(r"<svg.*?</svg>", page.raw, re.S)))


def test_a_run_that_never_had_a_finite_number_still_has_a_page(folder, stream):
    page = report(folder, stream(first_loss=math.inf, floor=math.inf, rounds=2).whole())
    assert "the model has diverged" in page.text


def test_the_config_is_folded_away(folder, stream):
    run = folder(stream().whole())
    (run / "config.resolved.toml").write_text('[run]\nname = "presidents"\n')
    page = read(write_report(run))
    assert 'name = "presidents"' in page.text
    assert "details" in [tag for tag, _ in page.tags]


def test_a_folder_without_a_run_is_an_error(tmp_path, folder, stream):
    with pytest.raises(RunNotFoundError, match="no run in"):
        write_report(tmp_path)
    with pytest.raises(RunNotFoundError, match="no run_started"):
        write_report(folder(list(stream().whole())[1:9], "headless"))
    with pytest.raises(RunNotFoundError):
        write_report(folder(stream().whole()), compare={"gone": tmp_path / "gone"})
    assert not list(tmp_path.rglob("*.html"))


def test_the_page_is_written_whole_or_not_at_all(folder, stream, monkeypatch, tmp_path):
    run = folder(stream().whole())
    target = tmp_path / "deep" / "er" / "page.html"
    assert write_report(run, out=target) == target
    old = target.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"--out FILE|out FILE") as raised:
        write_report(run, out=target)
    assert "photon resume" not in raised.value.hint
    assert target.read_bytes() == old
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


def test_a_page_that_cant_be_written_or_a_run_that_cant_be_read_is_named(folder, stream, tmp_path):
    run = folder([stream().started()])
    (tmp_path / "file").write_text("mine")
    too_long = tmp_path / ("x" * 300)
    for out in (tmp_path / "file" / "page.html", too_long, run):
        with pytest.raises(MachineError) as raised:
            write_report(run, out=out)
        assert raised.value.message.startswith(f"{out}: ")
    for no_run in (tmp_path / "file", too_long):
        with pytest.raises(RunNotFoundError, match="no run in"):
            write_report(no_run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
    assert [path.name for path in run.iterdir()] == ["events.jsonl"]


def test_a_matplotlibrc_changes_nothing_and_nothing_is_left_changed(folder, stream, tmp_path):
    import matplotlib as mpl

    run = folder(stream(rounds=2).whole())
    plain = write_report(run, out=tmp_path / "a.html").read_bytes()
    with mpl.rc_context({"font.size": 20, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert write_report(run, out=tmp_path / "b.html").read_bytes() == plain
        assert mpl.rcParams["font.size"] == 20
