"""The aggregator's way out: what nodes get at the start of a round, and how they read it.

With a lossy codec the global state is what nodes can know of it: the state they hold plus the
decoded outer update. All parties so hold the same bits, and what the codec left out waits for the
next round. A node that does not hold the state before, a newcomer for one, gets all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from photon.compression import build_codec
from photon.config import LinkConfig
from photon.errors import ChunkCorruptError
from photon.federation.tasks import WEIGHTS, GlobalState, StateRef, parcel_header
from photon.link import (
    Carrier,
    Entry,
    Expected,
    Parcel,
    Ref,
    entries_bytes,
    plain_bytes,
    plain_entries,
    tensors_sha256,
    write_parcel,
)
from photon.link.manifest import Kind

#: Stands for a sha256 where only its length matters.
_SOME_SHA256 = "0" * 64


class Broadcast:
    """Encodes outer updates, publishes them, and counts what nodes get.

    Parcels have their tensors in the order of names: a state read from a checkpoint has another
    order than a new one, and a manifest's size depends on it.

    Memory, with a lossy codec: a copy of the weights while the outer optimizer steps, what was left
    out, and the encoded outer update.

    Args:
        config: the run's.
        run: name of the run.
        left_out: what earlier rounds left out, by tensor name, from a checkpoint.
        update_bytes: of the newest outer update on the wire, from a checkpoint.
    """

    def __init__(
        self,
        config: LinkConfig,
        run: str,
        left_out: Mapping[str, Tensor] | None = None,
        update_bytes: int = 0,
    ) -> None:
        self._codec = build_codec(config.broadcast_codec)
        self._spec = config.broadcast_spec
        self._whole_spec = config.whole_state_spec
        self._chunk_bytes = config.chunk_bytes
        self._run = run
        self.left_out = dict(left_out or {})
        self.update_bytes = update_bytes
        self._update: list[Entry] = []
        self._whole_bytes: tuple[int, int] | None = None

    @property
    def lossy(self) -> bool:
        return not self._codec.lossless

    def keep(self, state: GlobalState) -> dict[str, Tensor]:
        """The weights that the outer optimizer is about to change, if `encode` will need them."""
        if not self.lossy:
            return {}
        return {name: state[name].clone() for name in sorted(state) if name.startswith(WEIGHTS)}

    @torch.no_grad()
    def encode(self, number: int, state: dict[str, Tensor], before: Mapping[str, Tensor]) -> None:
        """Make the outer update of round `number`, and of the state what nodes will make of it.

        Args:
            state: after the outer optimizer's step; its weights are changed in place.
            before: from `keep`.
        """
        if not self.lossy:
            return

        def changes() -> Iterator[tuple[str, Tensor]]:
            for name, old in before.items():
                left = self.left_out.get(name)
                yield name, (state[name] if left is None else state[name] + left) - old

        codec, left_out = self._codec.fitted(changes), {}
        self._update = []
        for name, change in changes():
            parts = codec.encode(change)
            self._update.append(Entry(name, change.shape, self._spec, parts))
            decoded = codec.decode(parts, change.shape)
            left_out[name] = change - decoded
            state[name].copy_(before[name] + decoded)
        self.left_out = left_out
        self._update += plain_entries(
            (name, state[name]) for name in sorted(state) if not name.startswith(WEIGHTS)
        )
        header = parcel_header("outer_update", self._run, number, state, base=_SOME_SHA256)
        self.update_bytes = entries_bytes(header, self._update, self._chunk_bytes)

    def bytes_down(self, number: int, state: GlobalState, *, holds_last: bool) -> int:
        """What a participant of round `number` gets, to the byte.

        Args:
            state: at the start of the round.
            holds_last: it took part in the round before.
        """
        if self.lossy and holds_last:
            return self.update_bytes
        if self._whole_bytes is None or self._whole_bytes[0] != number:
            header = parcel_header("state", self._run, number - 1, state)
            if self._whole_spec == "fp32":
                shapes = {name: state[name].shape for name in sorted(state)}
                size = plain_bytes(header, shapes, self._chunk_bytes)
            else:
                size = entries_bytes(header, self._whole(state), self._chunk_bytes)
            self._whole_bytes = (number, size)
        return self._whole_bytes[1]

    def publish(
        self,
        carrier: Carrier,
        folder: str,
        number: int,
        state: GlobalState,
        *,
        base: str | None,
    ) -> StateRef:
        """Put the state after round `number` into a store.

        Args:
            carrier: to the store.
            folder: in the store.
            base: sha256 of the state before; None: there is none, or nobody holds it.

        Raises:
            LinkError: the store can't be reached, refuses, or stalls.
        """
        sized = {"chunk_bytes": self._chunk_bytes}
        update = None
        if self._update and base is not None:
            header = parcel_header("outer_update", self._run, number, state, base=base)
            update = write_parcel(carrier, folder, header, self._update, **sized)
        header = parcel_header("state", self._run, number, state)
        whole = write_parcel(carrier, folder, header, self._whole(state), **sized)
        return StateRef(number, tensors_sha256(state), whole, update, base)

    def publish_once(self, carrier: Carrier, folder: str, once: Mapping[str, Tensor]) -> Ref:
        """Put what travels once into a store; raises as `publish`."""
        header = parcel_header("once", self._run, 0, once)
        entries = plain_entries(sorted(once.items()))
        return write_parcel(carrier, folder, header, entries, chunk_bytes=self._chunk_bytes)

    def once_bytes(self, once: Mapping[str, Tensor]) -> int:
        """What that takes on the wire, to the byte."""
        shapes = {name: once[name].shape for name in sorted(once)}
        return plain_bytes(parcel_header("once", self._run, 0, once), shapes, self._chunk_bytes)

    def _whole(self, state: GlobalState) -> Iterator[Entry]:
        codec = build_codec(self._whole_spec)
        for name in sorted(state):
            yield Entry(name, state[name].shape, self._whole_spec, codec.encode(state[name]))


class Inbox:
    """A node's copy of the global state, brought up to date from a store.

    Args:
        carrier: to the store.
        run: name of the run.
        shapes: of the state's tensors, from the node's own model.
        codecs: specs that the run's parcels may name.
    """

    def __init__(
        self,
        carrier: Carrier,
        run: str,
        shapes: Mapping[str, torch.Size],
        codecs: frozenset[str],
    ) -> None:
        self._carrier = carrier
        self._run = run
        self._shapes = dict(shapes)
        self._codecs = codecs
        self._held: dict[str, Tensor] = {}
        self._sha256: str | None = None

    def receive(self, ref: StateRef) -> GlobalState:
        """The state that `ref` is of: from what is held where that is its base, else whole.

        Raises:
            ChunkCorruptError: what came out is not the state that was promised; it is not used.
            ManifestError: a parcel is not what it must be.
            LinkError: the store can't be reached, or nothing there leads to this state.
        """
        if self._sha256 == ref.sha256:
            return self._held
        if ref.update is not None and ref.base is not None and ref.base == self._sha256:
            # Weights get the decoded change added; the rest is sent as it is.
            state = {
                name: self._held[name] + tensor if name.startswith(WEIGHTS) else tensor
                for name, tensor in self._open(ref, ref.update, "outer_update").tensors()
            }
        elif ref.whole is not None:
            state = dict(self._open(ref, ref.whole, "state").tensors())
        else:
            raise ChunkCorruptError(
                f"the state after round {ref.round} of {self._run} is offered as an update of "
                f"{ref.base}, this node holds {self._sha256 or 'none'}",
                hint="The aggregator must publish the whole state for this node.",
            )
        found = tensors_sha256(state)
        if found != ref.sha256:
            self._held, self._sha256 = {}, None
            raise ChunkCorruptError(
                f"the state after round {ref.round} of {self._run} came out with sha256 "
                f"{found[:12]}..., {ref.sha256[:12]}... was promised",
                hint="Ask for the whole state; this node trains from none that it can't verify.",
            )
        self._held, self._sha256 = state, found
        return state

    def receive_once(self, ref: Ref, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """What travels once, in this node's own shapes; raises ManifestError, LinkError."""
        header = parcel_header("once", self._run, 0, shapes)
        expected = Expected(header, shapes, frozenset({"fp32"}))
        return dict(Parcel(self._carrier, ref, expected).tensors())

    def _open(self, ref: StateRef, parcel: Ref, kind: Kind) -> Parcel:
        base = ref.base if kind == "outer_update" else None
        header = parcel_header(kind, self._run, ref.round, self._shapes, base=base)
        return Parcel(self._carrier, parcel, Expected(header, self._shapes, self._codecs))
