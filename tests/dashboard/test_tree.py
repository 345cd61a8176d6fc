"""A tree in its report: the drawing, whom attention heard, routes, leaves' scores."""

import re
import shutil

import pytest
from pages import read

from photon.config import parse_run_config, write_resolved
from photon.dashboard import write_report
from photon.dashboard.digest import read_digest
from photon.dashboard.tree import heard, leaf_scores
from photon.telemetry.events import Evaluated, KeyMerged, LocalFinished, ResidualRouted

SILOS = ("eu.paris", "eu.oslo", "boston")
HOSTILE = "<script>alert(1)</script>"


def run_file(folder, **parts):
    tree = {"eu": {"silos": ["eu.paris", "eu.oslo"], "rounds": 2}}
    tables = {
        "run": {"name": "world"},
        "model": {"preset": "tiny"},
        "data": {"path": "nowhere"},
        "parts": {"key": ["last:0.3"], "key_rule": "attention", **parts},
        "federation": {"rounds": 3, "children": tree},
        "local": {"steps": 32},
    }
    write_resolved(parse_run_config(tables), folder / "config.resolved.toml")


def told(number):
    """What a group tells between its members' tasks and the end of a round."""
    yield LocalFinished(
        round=number, silo="eu", loss=5.0, first_loss=5.0, last_loss=5.0, tokens=2 * 65_536,
        update_norm=1.0, train_s=1.0, load_s=0.0, publish_s=0.0, bytes_down=1, bytes_up=1,
    )  # fmt: skip
    eu = {"layers.1": [0.75, 0.25], "lm_head": [0.5, 0.5]}
    yield KeyMerged(round=number, silo="eu", participants=["eu.paris", "eu.oslo"], shares=eu)
    top = {"layers.1": [0.5, 0.5], "lm_head": [0.5, 0.5]}
    yield KeyMerged(round=number, silo="", participants=["boston", "eu"], shares=top)
    for to, outcome in ((None, "unplaced"), ("boston", "taken")):
        yield ResidualRouted(
            round=number, silo="", at_jurisdiction="UN", module="lm_head", origin=f"eu/{HOSTILE}",
            origin_jurisdiction="EU", to=to, to_jurisdiction="US" if to else "", cosine=0.2,
            hops=1, bytes=2_000, outcome=outcome,
        )  # fmt: skip


@pytest.fixture
def tree(folder, stream):
    made = stream(silos=SILOS, run="world", rounds=3)
    events = [made.started(), *made.evaluations(0)]
    for number in (1, 2, 3):
        *inside, end = made.round(number)
        events += [*inside, *told(number), end]
    run = folder([*events, made.finished()])
    run_file(run)
    return run


def test_who_merges_with_whom_is_drawn(tree):
    page = read(write_report(tree))
    drawn = page.raw[page.raw.index('<ul class="tree">') : page.raw.index("Boxes: federations")]
    words = " ".join(re.sub(r"<[^>]+>", " ", drawn).split())
    assert words.startswith("world 3 × 32 steps eu 2 × 16 steps paris ")
    assert re.search(r"paris \d+ oslo \d+ boston \d+$", words)
    assert drawn.count('class="federation"') == 2
    # Colour and length say who is worst: here the silo that the stream has last.
    opacities = [float(one) for one in re.findall(r"opacity: ([\d.]+)", drawn)]
    assert opacities == sorted(opacities)
    assert (opacities[0], opacities[-1]) == (0.35, 1.0)


def test_a_federation_is_no_silo(tree):
    digest = read_digest(tree)
    assert list(digest.silos) == list(SILOS)
    assert list(digest.groups) == ["eu"]
    page = read(write_report(tree))
    assert "Three silos trained one model" in page.text
    silos = page.raw[page.raw.index("<h2>Silos") : page.raw.index("<h2>Incidents")]
    assert silos.count('<td class="name">') == 3


def test_attention_is_held_against_tokens(tree):
    found = heard(read_digest(tree))
    assert list(found) == ["", "eu"]
    assert found["eu"][""]["eu.paris"] == {n: pytest.approx([1.5, 1.0]) for n in (1, 2, 3)}
    assert found["eu"]["lm_head"]["eu.oslo"][3] == pytest.approx([1.0])
    # "eu" trained on twice as many tokens, and counted for no more.
    assert found[""][""]["eu"][1] == pytest.approx([0.75, 0.75])
    page = read(write_report(tree))
    maps = re.findall(r'<svg[^>]*aria-label="Heat map\. ([^"]+)"', page.raw)
    assert maps == [
        f"{name}, {which}"
        for name in ("world", "eu")
        for which in ("mean of its key layers", "layers.1", "lm_head")
    ]
    assert "paris, round 1: ×1.25" in page.text
    assert "in full colour ×1.50 or more" in page.text


def test_a_long_run_has_bins_and_no_attention_no_heat_map(folder, stream):
    made = stream(silos=SILOS, rounds=90)
    shares = {"lm_head": [0.5, 0.3, 0.2]}
    rounds = [list(made.round(number)) for number in range(1, 91)]
    events = [
        one
        for number, round in enumerate(rounds, 1)
        for one in (*round, KeyMerged(round=number, silo="", participants=SILOS, shares=shares))
    ]
    found = heard(read_digest(folder([made.started(), *events])))
    assert len(found[""][""]["boston"]) == 30
    assert all(len(cell) == 3 for cell in found[""][""]["boston"].values())
    plain = folder(stream(silos=SILOS).whole(), "plain")
    run_file(plain)
    page = read(write_report(plain))
    assert '<ul class="tree">' in page.raw
    assert "Whom attention heard" not in page.text
    assert "Where residuals went" not in page.text


def test_where_residuals_went_is_told_with_both_jurisdictions(tree):
    page = read(write_report(tree))
    assert f"eu/{HOSTILE} EU → boston US taken 3 6.0 kB" in page.text
    assert f"eu/{HOSTILE} EU → – unplaced 3 6.0 kB" in page.text
    flows = page.raw[page.raw.index('aria-label="Flow diagram') :]
    flows = flows[: flows.index("</svg>")]
    assert flows.count("<path") == 2  # a line and its head: what was not placed goes nowhere
    assert "→ boston: taken, 3" in flows
    assert not [tag for tag, _ in page.tags if tag == "script"]


def with_baselines(tree, stream, folder):
    """Flat FL is worse on one leaf; two of three silos have trained alone."""
    (tree / "baselines/local-only").mkdir(parents=True)
    for name, scores in {
        "flat-FL": {"eu.paris": 90.0, "eu.oslo": 900.0, "boston": 80.0},
        "local-only/eu.paris": {"eu.paris": 50.0},
        "local-only/boston": {"boston": 850.0},
    }.items():
        events = [
            one.model_copy(update={"perplexity": scores[one.silo]})
            if isinstance(one, Evaluated) and one.silo
            else one
            for one in stream(silos=list(scores), rounds=3).whole()
        ]
        shutil.move(folder(events, name.replace("/", "-")), tree / "baselines" / name)


def test_leaves_are_told_beside_baselines_that_are_there(tree, stream, folder):
    assert "Perplexity in each leaf" not in read(write_report(tree)).text
    with_baselines(tree, stream, folder)
    rows, best = leaf_scores(read_digest(tree), {})
    assert list(rows) == ["this run", "flat FL", "local only"]
    assert set(rows["local only"]) == {"eu.paris", "boston"}  # and so no mean
    ours, flat, alone = rows.values()
    assert ours[""] == pytest.approx(
        (ours["eu.paris"] * ours["eu.oslo"] * ours["boston"]) ** (1 / 3)
    )
    assert best["eu.oslo"] == ours["eu.oslo"] < flat["eu.oslo"] == 900
    assert best["eu.paris"] == alone["eu.paris"]
    assert best["boston"] == flat["boston"]
    page = read(write_report(tree, compare={"another": tree / "baselines/flat-FL"}))
    table = page.raw[page.raw.index("Perplexity in each leaf") :]
    table = table[: table.index("</table>")]
    names = re.findall(r'<td class="name">([^<]+)<', table)
    assert names == ["this run", "flat FL", "local only", "another"]
    cells = [re.findall(r'<td class="n( best)?"', row) for row in table.split("<tr>")[2:]]
    assert [["best" in one for one in row] for row in cells] == [
        [True, False, True, False],
        [False, False, False, True],
        [False, True, False, False],
        [False, False, False, True],
    ]


def test_pictures_follow_the_colour_scheme_and_say_what_they_are(tree):
    raw = read(write_report(tree)).raw
    new = raw[raw.index('<ul class="tree">') : raw.index("How it learned")]
    assert not re.findall(r"#[0-9a-f]{6}\b", new)
    assert new.count("<svg") == new.count('role="img"') == 7


def test_a_run_file_that_cant_be_read_costs_the_drawing_only(tree):
    (tree / "config.resolved.toml").write_text("[run")
    page = read(write_report(tree))
    assert '<ul class="tree">' not in page.raw
    assert "Whom attention heard" in page.text
