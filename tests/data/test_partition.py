"""Who gets which document."""

import sys
from collections import Counter

import pytest

from photon.data import DocumentInfo, PrepareOptions, prepare
from photon.data.ingest import Origin
from photon.data.partition import folder_names
from photon.errors import DataError, EmptySiloError, PluginError


def infos(count, **fields):
    return [
        DocumentInfo(
            n,
            {k: v(n) for k, v in fields.items()},
            100 + n,
            Origin(f"file-{n % 4}", file=f"f{n}.txt"),
        )
        for n in range(count)
    ]


def assign(documents, seed=0, **options):
    return PrepareOptions(input="x", out="y", **options).build_partitioner().assign(documents, seed)


def test_iid_deals_evenly_and_by_seed():
    names = assign(infos(100), iid=8)
    assert set(Counter(names).values()) == {12, 13}
    assert names == assign(infos(100), iid=8)
    assert names != assign(infos(100), seed=1, iid=8)
    assert names != sorted(names)


def test_contiguous_slices_are_runs_of_like_bytes():
    documents = infos(100)
    names = assign(documents, contiguous=4)
    assert names == sorted(names)
    sizes = Counter()
    for document, name in zip(documents, names, strict=True):
        sizes[name] += document.bytes
    assert max(sizes.values()) < 1.1 * min(sizes.values())


def test_dirichlet_skews_labels_by_alpha_and_leaves_no_silo_empty():
    documents = infos(400, topic=lambda n: f"topic-{n % 5}")

    def largest_share(alpha, **more):
        names = assign(documents, dirichlet=(5, alpha), **more)
        assert min(Counter(names).values()) >= 2
        assert len(set(names)) == 5
        per_silo = {name: Counter() for name in names}
        for document, name in zip(documents, names, strict=True):
            per_silo[name][document.fields["topic"]] += 1
        return sum(max(c.values()) / c.total() for c in per_silo.values()) / 5

    assert largest_share(0.1, label_field="topic") > 0.5
    assert largest_share(1000.0, label_field="topic") < 0.3
    assert assign(documents, dirichlet=(5, 0.5)) == assign(documents, dirichlet=(5, 0.5))


def test_dirichlet_that_can_not_fill_its_silos_says_so():
    with pytest.raises(EmptySiloError, match=r"dirichlet 20:0\.001.*in each of 100 draws"):
        assign(infos(40), dirichlet=(20, 0.001))
    with pytest.raises(EmptySiloError, match="3 documents can't fill 2 silos"):
        assign(infos(3), iid=2)
    with pytest.raises(EmptySiloError, match="1 document can't fill 1 silo:"):
        assign(infos(1), iid=1)
    with pytest.raises(DataError, match="alpha must be a number above 0"):
        assign(infos(40), dirichlet=(2, float("nan")))


def test_a_missing_field_names_the_file_and_its_fields():
    documents = infos(4, topic=lambda n: "a", year=str)
    with pytest.raises(DataError, match=r"silo_field party: f0\.txt has no such field.*topic, yea"):
        assign(documents, silo_field="party")


def test_folder_names():
    assert folder_names(["Côte d'Ivoire", "../x", "a/b"]) == ["côte-d-ivoire", "x", "a-b"]
    with pytest.raises(DataError, match="'A b' and 'a-b' would share the folder 'a-b'"):
        folder_names(["A b", "a-b"])
    with pytest.raises(DataError, match="too long"):
        folder_names(["x" * 300])


def text_folder(root, silos):
    for name, count in silos.items():
        (root / name).mkdir(parents=True)
        for n in range(count):
            (root / name / f"{n}.txt").write_text(f"{name} document {n} " * 20)
    return root


def test_folders_become_silos_and_small_ones_are_folded(tmp_path):
    text = text_folder(tmp_path / "text", {"North": 12, "South": 9, "east": 3, "west": 2})
    data = prepare(
        PrepareOptions(
            input=text, out=tmp_path / "data", vocab_size=300, silo_folders=True, min_documents=5
        )
    )
    assert list(data.silos) == ["north", "other", "south"]
    assert any("2 silos with fewer than 5 documents" in remark for remark in data.remarks)
    (text / "stray.txt").write_text("nobody's")
    with pytest.raises(DataError, match=r"stray\.txt lies in no folder"):
        prepare(PrepareOptions(input=text, out=tmp_path / "more", silo_folders=True))


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package that registers partitioners, installed as pip would leave it."""
    site = tmp_path / "site"
    info = site / "by_size-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: by-size\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[photon.partitioners]\nby-size = by_size:BySize\nshort = by_size:Short\n"
    )
    (site / "by_size.py").write_text(
        "from photon.data import Partitioner\n"
        "class BySize(Partitioner):\n"
        "    def __init__(self, limit):\n"
        "        self.limit = int(limit)\n"
        "    def assign(self, documents, seed):\n"
        "        return ['long' if d.bytes > self.limit else 'short' for d in documents]\n"
        "class Short(Partitioner):\n"
        "    def assign(self, documents, seed):\n"
        "        return ['one']\n"
    )
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("by_size", None)


def test_a_plugin_partitions_through_its_entry_point(plugin, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for n in range(20):
        (text / f"{n}.txt").write_text(f"word{n} " * (5 if n % 2 else 50))
    more = {"input": text, "vocab_size": 300}
    options = {"limit": "100"}
    data = prepare(
        PrepareOptions(
            out=tmp_path / "data", partitioner="by-size", partitioner_options=options, **more
        )
    )
    assert list(data.silos) == ["long", "short"]
    assert data.silos["long"].bytes > 3 * data.silos["short"].bytes
    with pytest.raises(PluginError, match="does not take the options"):
        prepare(PrepareOptions(out=tmp_path / "b", partitioner="by-size", **more))
    with pytest.raises(DataError, match="Short named 1 silos for 20 documents"):
        prepare(PrepareOptions(out=tmp_path / "c", partitioner="short", **more))
    with pytest.raises(PluginError, match="no plugin named 'gone'"):
        prepare(PrepareOptions(out=tmp_path / "d", partitioner="gone", **more))


def test_dirichlet_favours_no_silo_when_labels_are_small():
    """One document a label: rounding in a fixed order would leave the outer silos empty."""
    documents = infos(400, topic=str)
    counts = Counter(assign(documents, dirichlet=(5, 50.0), label_field="topic"))
    assert len(counts) == 5
    assert min(counts.values()) > 50


def test_dirichlet_skew_grows_as_alpha_falls():
    documents = infos(600, topic=lambda n: f"topic-{n % 6}")

    def skew(alpha):
        """Mean over seeds and silos of the largest label's share."""
        shares = []
        for seed in range(5):
            names = assign(documents, seed=seed, dirichlet=(4, alpha), label_field="topic")
            for silo in sorted(set(names)):
                own = [n % 6 for n, name in enumerate(names) if name == silo]
                shares.append(max(Counter(own).values()) / len(own))
        return sum(shares) / len(shares)

    steps = [skew(alpha) for alpha in (0.05, 0.5, 5.0, 500.0)]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < 0.2 < 0.4 < steps[0]


def test_a_silo_of_one_text_is_named(tmp_path):
    text = text_folder(tmp_path / "text", {"north": 30, "south": 1})
    with pytest.raises(EmptySiloError, match="silo 'south' has 1 documents"):
        prepare(
            PrepareOptions(input=text, out=tmp_path / "data", vocab_size=300, silo_folders=True)
        )
    assert not (tmp_path / "data").exists()
