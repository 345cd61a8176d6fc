"""The HTML report: what it says, what it draws, and what must never break it."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from photon.dashboard import ComparisonRow, comparison_table, write_report
from photon.dashboard.digest import read_digest
from photon.dashboard.report import baseline_formula, headline, tiles
from photon.errors import DiskFullError, MachineError, RunError, RunNotFoundError
from photon.telemetry.events import (
    Evaluated,
    LocalProgress,
    Notice,
    RoundFinished,
    RoundStarted,
    UpdateDropped,
)

VOID = {"meta", "br", "link", "img", "input", "hr"}
FIGURES = [
    "Loss",
    "Perplexity in each silo",
    "Where the time went, round by round",
    "Bytes exchanged",
    "Training speed of each silo",
]


class Page(HTMLParser):
    """Parses strictly enough to find unbalanced tags, and collects what tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.raw, self.stack, self.tags, self.words, self.ids, self.refs = text, [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self._see(tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._see(tag, attrs)

    def _see(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.refs.append(value)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def titles(self):
        return re.findall(r"<h3>([^<]+)</h3>", self.raw)


def read(path):
    return Page(path.read_text("utf-8"))


def report(folder, events, **options):
    return read(write_report(folder(events), **options))


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
        "utilisation 84%",
        "4 bytes × 1,100,000 parameters × 2 directions × 32 local steps × 48 tasks",
        "= 13.5 GB",
        "local training 84% (3 min 12 s)",
        "judicial 400k 40.0% 12 4.855 944 117 1",
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


def test_a_stopped_run_says_so_first(folder, stream):
    made = stream(rounds=12)
    events = [e for e in made.whole() if getattr(e, "round", 0) <= 4][:-1]
    page = report(folder, [*events, made.stopped(5)])
    assert "This run was stopped in round 5 (interrupted by Ctrl-C)." in page.text
    assert "4 of 12 rounds are complete" in page.text
    assert "over 4 of 12 rounds" in page.text
    assert "run stopped" in page.text


def test_a_killed_run_is_unfinished(folder, stream):
    events = [e for e in stream(rounds=12).whole() if getattr(e, "round", 0) <= 4][:-1]
    page = report(folder, events)
    assert "its process ended without saying so" in page.text


def test_a_resumed_run_counts_each_round_once_and_lists_what_happened(folder, stream):
    straight = stream(dropped={2: "judicial"})
    resumed = stream(dropped={2: "judicial"})
    run = folder(resumed.resumed(stop_in=4))
    page = read(write_report(run))
    digest, whole = read_digest(run), read_digest(folder(straight.whole(), "straight"))
    assert [cost.round for cost in digest.rounds] == [1, 2, 3, 4, 5, 6]
    assert (digest.tokens, digest.bytes_up, digest.tasks) == (
        whole.tokens,
        whole.bytes_up,
        whole.tasks,
    )
    assert digest.silos["judicial"].training == whole.silos["judicial"].training
    assert digest.superseded > 0
    assert digest.state == "finished"
    kinds = [incident.kind for incident in digest.incidents]
    assert kinds == ["update dropped", "run stopped", "resumed"]
    assert "goes on after round 3" in page.text
    assert f"{digest.superseded} events of rounds that a resume ran again" in page.text


def test_an_incident_of_a_round_run_again_is_marked(folder, stream):
    made = stream(lost={4: "judicial"})
    events = list(made.resumed(stop_in=4))
    lost = next(e for e in stream(lost={4: "judicial"}).whole() if e.name == "worker_lost")
    at = next(i for i, e in enumerate(events) if e.name == "run_stopped")
    digest = read_digest(folder([*events[:at], lost, *events[at:]]))
    marks = [(i.kind, i.undone) for i in digest.incidents]
    assert marks == [
        ("worker lost", True),
        ("run stopped", False),
        ("resumed", False),
        ("worker lost", False),
    ]


def test_a_run_of_several_sessions_is_told_from_its_beginning(folder, stream):
    made = stream(dropped={3: "judicial"})
    events = list(made.resumed(stop_in=4))
    at = next(i for i, e in enumerate(events) if e.name == "run_started" and i)
    later = {"started_at": "2026-01-09T10:00:00+00:00", "time_s": 57.0}
    events[at] = events[at].model_copy(update=later)  # the clock of the checkpoint
    events[at - 1] = events[at - 1].model_copy(update={"time_s": 70.0})
    lost = next(e for e in stream(dropped={4: "republican"}).whole() if e.name == "update_dropped")
    run = folder([*events[: at - 1], lost, *events[at - 1 :]])
    page, digest = read(write_report(run)), read_digest(run)
    assert "Started 2026-01-02T03:04:05+00:00 Resumed one time, last 2026-01-09T10" in page.text
    times = [incident.time_s for incident in digest.incidents]
    assert times == sorted(times)
    # Every drop that is an incident counts, of a round that was run again, too.
    drops = {name: silo.dropped for name, silo in digest.silos.items() if silo.dropped}
    assert drops == {"judicial": 1, "republican": 1}


def test_what_a_silo_received_to_evaluate_counts_as_received(folder, stream):
    events = [
        e.model_copy(update={"bytes_down": 0})
        if e.name == "local_finished"
        else e.model_copy(update={"bytes_down": 4_400_000})
        if isinstance(e, Evaluated) and e.silo and e.round
        else e
        for e in stream(step_s={"forward_s": 1.0}).whole()
    ]
    page = report(folder, events)
    table = page.raw[page.raw.index("How silos trained") : page.raw.index("<h2>Incidents")]
    assert re.findall(r'<td class="n"[^>]*>([^<]*)</td>', table)[6] == "4.4 MB"


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


def test_silos_that_tell_no_steps_have_a_curve_of_rounds(folder, stream):
    whole = list(stream().whole())
    events = [e for e in whole if not isinstance(e, LocalProgress) or e.silo != "judicial"]
    silos = read_digest(folder(events)).silos
    assert [tokens for tokens, _ in silos["judicial"].training] == [
        262_144 * i for i in range(1, 7)
    ]
    assert len(silos["republican"].training) == 24  # four reports a round


def test_a_notice_of_the_run_itself_is_of_no_silo(folder, stream):
    note = Notice(round=2, silo="", text="local.lr = 0.1 (was 0.2)")
    run = folder([*stream().whole(), note])
    assert "notice – local.lr = 0.1 (was 0.2)" in read(write_report(run)).text
    assert "" not in read_digest(run).silos


def test_lines_that_are_missing_do_not_matter(folder, stream):
    whole = list(stream().whole())
    for kind in {type(e) for e in whole} - {type(whole[0])}:
        page = report(folder, [e for e in whole if type(e) is not kind])
        assert "1.1M parameters" in page.text


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


def test_the_config_is_folded_away(folder, stream):
    run = folder(stream().whole())
    (run / "config.resolved.toml").write_text('[run]\nname = "presidents"\n')
    page = read(write_report(run))
    assert 'name = "presidents"' in page.text
    assert "details" in [tag for tag, _ in page.tags]
    assert "details" not in [tag for tag, _ in report(folder, stream().whole()).tags[:0]]


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


def test_bytes_per_step_formula_counts_only_finished_rounds(folder, stream):
    made = stream(rounds=12)
    events = [e for e in made.whole() if getattr(e, "round", 0) <= 4][:-1]
    begun = RoundStarted(round=5, global_step=128, participants=list(made.silos))
    digest = read_digest(folder([*events, begun]))
    assert digest.tasks == 16
    assert digest.baseline_bytes == 4 * 1_100_000 * 2 * 32 * 16
    assert "16 tasks" in baseline_formula(digest)
    assert "4 of 12" in headline(digest)
    assert next(t for t in tiles(digest) if t.name == "rounds").value == "4 of 12"


def test_time_adds_up_to_the_wall_clock(folder, stream):
    digest = read_digest(folder(stream().whole()))
    phases = dict(digest.phases_s)
    assert sum(phases.values()) == pytest.approx(max(digest.wall_s, sum(phases.values())))
    assert phases["local training"] == pytest.approx(6 * 16.0)
    assert all(cost.other_s >= 0 for cost in digest.rounds)


def test_workers_side_by_side_do_not_use_more_than_the_whole_round(folder, stream):
    events = [
        e.model_copy(update={"local_train_s": 64.0}) if isinstance(e, RoundFinished) else e
        for e in stream().whole()
    ]
    digest = read_digest(folder(events))
    assert all(cost.local_train_s <= cost.round_s for cost in digest.rounds)
    assert digest.utilisation <= 1.0


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


def test_a_matplotlibrc_changes_nothing_and_nothing_is_left_changed(folder, stream, tmp_path):
    import matplotlib as mpl

    run = folder(stream(rounds=2).whole())
    plain = write_report(run, out=tmp_path / "a.html").read_bytes()
    with mpl.rc_context({"font.size": 20, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert write_report(run, out=tmp_path / "b.html").read_bytes() == plain
        assert mpl.rcParams["font.size"] == 20


def test_a_run_first_evaluated_after_a_round_says_after_which(folder, stream):
    events = [e for e in stream().whole() if not isinstance(e, Evaluated) or e.round > 0]
    page = report(folder, events)
    assert "fell from 233 after round 1 to 118." in page.text
    assert "perplexity 118 233 after round 1" in page.text


def test_a_kill_between_checkpoint_and_last_line_of_a_round_loses_no_totals(folder, stream):
    made = stream()
    events = [e for e in made.whole() if not (isinstance(e, RoundFinished) and e.round == 3)]
    at = next(i for i, e in enumerate(events) if isinstance(e, RoundStarted) and e.round == 4)
    resumed = made.started(resumed_from_round=3)
    digest = read_digest(folder([*events[:at], resumed, *events[at:]]))
    assert digest.superseded == 0
    assert (digest.tokens, digest.bytes_up) == (made.tokens, made.bytes)
    assert digest.tasks == 24
    assert [p.tokens for p in digest.evaluations] == [262_144 * i for i in range(7)]
    assert read(write_report(digest.folder)).titles[0] == "Loss"


def test_a_central_run_over_many_silos_has_one_curve(folder, stream):
    silos = [f"client-{i:02d}" for i in range(64)]
    central = stream(silos=["centralised"], kind="train", per_silo=False)
    started = stream(silos=silos, kind="train", sample=1).started()
    page = report(folder, [started, *list(central.whole())[1:]])
    assert "was trained centrally, on pooled text" in page.text
    assert "training loss of" not in page.text
