"""Parcels: what goes in comes out, in chunks that are shared, and nothing wrong is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore

from photon.compression import build_codec
from photon.config.codecs import parse_codec
from photon.errors import ChunkCorruptError, ManifestError, ObjectMissingError
from photon.link import (
    Entry,
    Expected,
    Header,
    Parcel,
    entries_bytes,
    plain_bytes,
    plain_entries,
    write_parcel,
)
from photon.link.manifest import LARGEST_CHUNK, SMALLEST_CHUNK, Cutter, shapes_fingerprint
from photon.store.contract import FolderStore
from photon.store.memory import ReusedMemory
from photon.store.transfer import Transfer

MIB = 1 << 20
SHAPES = {"wide": (1000, 3000), "tall": (5000, 700), "vector": (700,), "one": (), "none": (0, 3)}


def tensors(shapes=SHAPES, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) * 0.01 for name, shape in shapes.items()}


def header(shapes=SHAPES, **changes):
    whose = {"kind": "update", "run": "a", "round": 3, "silo": "red"}
    return Header(**(whose | {"model": shapes_fingerprint(shapes)} | changes))


def encoded(named, spec):
    codec = build_codec(spec)
    text = str(parse_codec(spec))
    return [Entry(name, tensor.shape, text, codec.encode(tensor)) for name, tensor in named.items()]


def expected(shapes=SHAPES, *specs, **changes):
    texts = frozenset(str(parse_codec(spec)) for spec in (*specs, "fp32"))
    return Expected(header(shapes, **changes), shapes, texts)


def moved(store, entries, **options):
    """Written to a store and read again."""
    carrier = Transfer(store, streams=2)
    ref = write_parcel(carrier, "x", header(), entries, **options)
    return ref, Parcel(carrier, ref, expected(SHAPES, "int8", "topk(density=0.1)+int8+zstd"))


@pytest.mark.parametrize("kind", ["memory", "folder"])
@pytest.mark.parametrize("spec", ["fp32", "int8", "topk(density=0.1)+int8+zstd"])
def test_what_goes_in_comes_out(spec, kind, tmp_path):
    named = tensors()
    store = MemoryStore() if kind == "memory" else FolderStore(tmp_path)
    entries = encoded(named, spec)
    ref, parcel = moved(store, entries, chunk_bytes=4 * MIB)
    found = dict(parcel.tensors())
    assert list(found) == list(named)
    for entry in entries:
        assert torch.equal(found[entry.name], entry.decoded())
        assert found[entry.name].shape == named[entry.name].shape
    if spec == "fp32":
        assert all(torch.equal(found[name], named[name]) for name in named)
    stored = dict(store.keys())
    assert sum(stored.values()) == ref.wire_bytes == entries_bytes(header(), entries, 4 * MIB)
    codecs = [parcel.manifest.codecs[row.codec] for row in parcel.manifest.tensors]
    assert codecs == [str(parse_codec(spec))] * len(named)


@pytest.mark.parametrize("spec", ["fp32", "int8"])
def test_parcels_that_share_memory_do_not_share_tensors(spec, tmp_path):
    """Kept, read twice and let go, in any order; and what is held stays what it is."""
    memory = ReusedMemory(8)
    store = FolderStore(tmp_path / "store", memory=memory)
    carrier = Transfer(store, streams=2)
    named = [tensors(seed=seed) for seed in range(4)]
    parcels, sent = [], [encoded(one, spec) for one in named]
    for seed, entries in enumerate(sent):
        ref = write_parcel(carrier, "x", header(round=seed + 1), entries, chunk_bytes=4 * MIB)
        parcel = Parcel(carrier, ref, expected(SHAPES, spec, round=seed + 1), memory)
        if seed % 2:
            parcel.keep(tmp_path / str(seed))
        parcels.append(parcel)
    held = [dict(parcel.tensors()) for parcel in parcels]
    for parcel in parcels:
        for _ in parcel.tensors():  # each let go before the next
            pass
    for entries, found in zip(sent, held, strict=True):
        assert all(torch.equal(found[entry.name], entry.decoded()) for entry in entries)


def test_parcels_that_are_kept_do_not_each_hold_memory(tmp_path):
    memory = ReusedMemory(3)
    carrier = Transfer(FolderStore(tmp_path / "store"), streams=2)
    named = tensors()
    ref = write_parcel(carrier, "x", header(), plain_entries(named.items()), chunk_bytes=4 * MIB)
    parcels = []
    tracemalloc.start()
    try:
        for number in range(6):
            parcels.append(Parcel(carrier, ref, expected(), memory))
            parcels[-1].keep(tmp_path / str(number))
            for name, tensor in parcels[-1].tensors():
                assert torch.equal(tensor, named[name])
                del tensor
        idle_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest = max(4 * tensor.numel() for tensor in named.values())
    assert idle_bytes < 3 * max(largest, 4 * MIB) + MIB


def test_plain_tensors_are_counted_without_a_look_at_them():
    store = MemoryStore()
    ref, _ = moved(store, plain_entries(tensors().items()))
    assert plain_bytes(header(), SHAPES, 16 * MIB) == ref.wire_bytes
    assert ref.payload_bytes == 4 * sum(tensor.numel() for tensor in tensors().values())


def test_a_tensor_that_did_not_change_is_not_sent_twice():
    store, first = MemoryStore(), tensors()
    carrier = Transfer(store, streams=2)
    write_parcel(carrier, "x", header(), plain_entries(first.items()))
    chunks = {key for key, _ in store.keys("x/chunks")}
    changed = first | {"tall": first["tall"] + 1}
    ref = write_parcel(carrier, "x", header(round=4), plain_entries(changed.items()))
    new = {key: size for key, size in store.keys("x/chunks") if key not in chunks}
    assert 0 < sum(new.values()) < ref.payload_bytes * 0.6
    found = dict(Parcel(carrier, ref, expected(round=4)).tensors())
    assert torch.equal(found["wide"], first["wide"])
    assert torch.equal(found["tall"], first["tall"] + 1)


@given(
    st.lists(st.integers(0, 30 * MIB), max_size=30),
    st.integers(SMALLEST_CHUNK, LARGEST_CHUNK),
)
@settings(max_examples=60)
def test_chunks_cover_all_bytes_and_keep_to_their_bounds(sizes, chunk_bytes):
    cutter = Cutter(chunk_bytes)
    chunks = [chunk for size in sizes for chunk in cutter.add(size)]
    assert all(SMALLEST_CHUNK <= chunk <= chunk_bytes for chunk in chunks)
    rest = cutter.rest()
    assert 0 <= rest < SMALLEST_CHUNK
    assert sum(chunks) + rest == sum(sizes)


def test_a_chunk_that_changed_in_the_store_is_never_handed_over(tmp_path):
    ref, parcel = moved(FolderStore(tmp_path), encoded(tensors(), "int8"), chunk_bytes=4 * MIB)
    path = sorted((tmp_path / "x/chunks").iterdir())[0]
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChunkCorruptError, match=path.name[:12]):
        list(parcel.tensors())
    path.write_bytes(data[:-1])
    with pytest.raises(ChunkCorruptError):
        list(parcel.tensors())
    path.unlink()
    with pytest.raises(ObjectMissingError):
        list(parcel.tensors())
    assert ref.key


def rewritten(store, change):
    """A parcel whose manifest was changed, with a receipt that fits the change."""
    ref, _ = moved(store, encoded(tensors(), "int8"))
    record = json.loads(bytes(store.get(ref.key, max_bytes=10**6)))
    change(record)
    data = json.dumps(record).encode()
    store.put("x/update/forged.json", data)
    digest = hashlib.sha256(data).hexdigest()
    return dataclasses.replace(ref, key="x/update/forged.json", bytes=len(data), sha256=digest)


def larger(record):
    record["chunks"].append({"sha256": "0" * 64, "bytes": LARGEST_CHUNK})


def bomb(record):
    row = record["tensors"][0]
    row["parts"][0]["bytes"] += 2**40
    for later in record["tensors"][1:]:
        later["offset"] += 2**40


REFUSED = {
    "version 2": (
        lambda record: record.update(version=2),
        "version 2; this Photon reads version 1",
    ),
    "no version": (lambda record: record.pop("version"), "version None"),
    "another format": (lambda record: record.update(format="zip"), "format: "),
    "an unknown key": (lambda record: record.update(extra=1), "extra: "),
    "an old round": (lambda record: record["header"].update(round=2), "round is 2, expected 3"),
    "another run": (lambda record: record["header"].update(run="b"), "run is 'b', expected 'a'"),
    "another silo": (lambda record: record["header"].update(silo="blue"), "silo is 'blue'"),
    "another model": (lambda record: record["header"].update(model="0" * 64), "model is '000"),
    "a state": (lambda record: record["header"].update(kind="state"), "kind is 'state'"),
    "another base": (lambda record: record["header"].update(base="0" * 64), "base is '000"),
    "another codec": (lambda record: record.update(codecs=["sign(block=128)"]), "codec 'sign"),
    "a codec too many": (lambda record: record["tensors"][1].update(codec=7), "codec 7 of 1"),
    "a tensor twice": (lambda record: record["tensors"].append(record["tensors"][0]), "twice"),
    "a tensor less": (lambda record: record["tensors"].pop(), "missing or unknown"),
    "another shape": (lambda record: record["tensors"][0].update(shape=[1]), r"shape \[1\]"),
    "another offset": (lambda record: record["tensors"][1].update(offset=5), "offset 5, expected"),
    "more bytes than the model's": (bomb, "at most 24004096 are plausible"),
    "chunks beyond the tensors": (larger, "its chunks hold"),
    "a chunk beyond 64 MiB": (
        lambda record: record["chunks"][0].update(bytes=LARGEST_CHUNK + 1),
        "chunks.0.bytes: ",
    ),
    "a hash that is none": (
        lambda record: record["chunks"][0].update(sha256="../../etc"),
        "chunks.0.sha256: ",
    ),
    "a dtype that is none": (
        lambda record: record["tensors"][0]["parts"][0].update(dtype="object"),
        "dtype: ",
    ),
    "half a number": (
        lambda record: record["tensors"][0]["parts"][1].update(dtype="float32", bytes=2),
        "2 bytes of float32",
    ),
    "a size below nothing": (
        lambda record: record["tensors"][0]["parts"][0].update(bytes=-1),
        "bytes: ",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_manifest_that_is_not_the_expected_one_is_refused(what):
    change, words = REFUSED[what]
    store = MemoryStore()
    ref = rewritten(store, change)
    with pytest.raises(ManifestError, match=words) as refused:
        Parcel(Transfer(store), ref, expected(SHAPES, "int8"))
    assert "forged.json" in refused.value.message


def test_a_manifest_other_than_the_receipts_is_refused():
    store = MemoryStore()
    ref, _ = moved(store, encoded(tensors(), "int8"))
    with pytest.raises(ChunkCorruptError):
        Parcel(Transfer(store), dataclasses.replace(ref, sha256="0" * 64), expected())
    less = dataclasses.replace(ref, payload_bytes=5)
    with pytest.raises(ManifestError, match="the receipt says"):
        Parcel(Transfer(store), less, expected(SHAPES, "int8"))
    with pytest.raises(ManifestError, match="has at most"):
        Parcel(Transfer(store), dataclasses.replace(ref, bytes=10**9), expected())


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b"1" * 5000])
def test_what_is_no_manifest_is_refused(data):
    store = MemoryStore()
    ref, _ = moved(store, encoded(tensors(), "int8"))
    if len(data) > 50_000:
        data = data[:20_000]
    store.put("x/update/junk.json", data)
    digest = hashlib.sha256(data).hexdigest()
    junk = dataclasses.replace(ref, key="x/update/junk.json", bytes=len(data), sha256=digest)
    with pytest.raises(ManifestError, match="junk"):
        Parcel(Transfer(store), junk, expected(SHAPES, "int8"))


def test_parts_that_a_codec_can_not_read_are_refused_by_name():
    def shrink(record):
        wide = record["tensors"][0]["parts"]
        wide[0]["bytes"] -= 2
        wide[1]["bytes"] += 2

    store = MemoryStore()
    ref = rewritten(store, shrink)
    parcel = Parcel(Transfer(store), ref, expected(SHAPES, "int8"))
    with pytest.raises(ManifestError, match="tensor 'wide' can't be decoded by int8"):
        list(parcel.tensors())


def test_neither_way_holds_the_payload_in_memory(tmp_path):
    """Peak memory of a fresh process that moves 640 MB: a window of chunks, and a tensor."""
    program = Path(__file__).parent / "programs" / "parcel_memory.py"
    told = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert told.returncode == 0, told.stderr
    sizes = json.loads(told.stdout)
    assert sizes["payload_mb"] > 600
    assert sizes["write_mb"] < 360, sizes
    assert sizes["read_mb"] < 360, sizes
