"""A site on two machines that share a folder: a gateway with key and network, a trainer with GPUs.

What the trainer can't do itself it writes down as a call, for the gateway to do at the desk or the
store, which writes an answer beside it:

    FOLDER/calls/NAME-ID.call      {"what": "presence", "task", "reply", "fetch" or "send", ...}
    FOLDER/calls/NAME-ID.answer    {"answer": ...} or {"error": ...} (photon.silo.socket)

FOLDER is the trainer's home: objects are fetched into its spool and sent from its finished tasks.
Each call may be done twice, and lies there until whoever made it has its answer: a gateway that
starts anew does it again, a trainer that starts anew removes its own. The gateway signs what
answers a question that the desk gave it just before, and nothing else. No torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.errors import NodeError, PhotonError, ProtocolError, UnreachableError
from photon.membership.desk_documents import MOST_PATIENCE_S, Delivery
from photon.membership.keys import NodeKey
from photon.membership.records import Presence, SignedReply
from photon.membership.signing import RECEIPT, sign_document
from photon.silo.desk_client import DeskClient
from photon.silo.socket import error_in, refusal_of
from photon.store.contract import Buffer, FolderStore
from photon.store.disk import write_whole
from photon.store.transfer import Transfer, Wanted

CALLS = "calls"

#: Between two looks into the folder.
_LOOK_S = 0.1
#: The desk may hold a poll for so long; all else is prompt.
_POLL_S, _PROMPT_S = MOST_PATIENCE_S + 30.0, 30.0
#: Between two looks whether a question waits for a trainer.
_HOLD_S = 2.0
#: A trainer that said nothing for so long is gone: it reports every 5 s.
_GONE_S = 20.0
_WAITS = "waits for a trainer: `photon join --trainer` where the GPUs are"
#: The desk hears of an idle trainer so often, at least.
_MOST_IDLE_S = 300.0
#: At a time; a trainer makes one for each thread that waits.
_MOST_CALLS = 64
#: No call is longer: what is wanted of a state of 10^11 parameters.
_MOST_BYTES = 16 << 20

_Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{32,64}\z")]
_TASK = r"^[0-9a-f]{32}/[a-z]{3,9}/[0-9]{1,9}/[A-Za-z0-9._-]{1,100}\z"


class _Call(BaseModel):
    """What a trainer calls for; which fields count is said by each of `Calls`' methods."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    what: Literal["presence", "task", "reply", "fetch", "send"]
    presence: Presence = Presence("idle")
    have: Annotated[list[_Hex], Field(max_length=64)] = []
    letter: _Hex = "0" * 32
    words: str | None = None
    text: str = ""
    task: Annotated[str, Field(pattern=_TASK)] = ""
    spool: _Hex = "0" * 64
    wanted: list[Wanted] = []
    keys: list[str] = []


class Gateway:
    """The desk (photon.silo.desk_client.DeskClient) and the store, as a trainer without a key has
    them. Safe to share between threads.

    Args:
        folder: shared with the gateway.
        name: of this process among those of the trainer's machine; calls that are left of an
            earlier one are removed.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._calls, self._name = folder / CALLS, name
        for old in self._calls.glob(f"{name}-*"):
            old.unlink(missing_ok=True)

    def presence(self, presence: Presence) -> dict[str, Any]:
        return self.call("presence", _PROMPT_S, presence=asdict(presence))

    def task(self, boot: str, have: Collection[str]) -> Delivery | None:
        found = self.call("task", _POLL_S, have=sorted(have))
        return found and Delivery.model_validate(found)

    def reply(self, boot: str, letter: str, answer: SignedReply | str) -> None:
        words = answer if isinstance(answer, str) else None
        text = answer.text.decode() if isinstance(answer, SignedReply) else ""
        self.call("reply", _PROMPT_S, letter=letter, words=words, text=text)

    def carrier(self, task_id: str) -> _Carrier:
        """The way to the store, for one task."""
        return _Carrier(self, task_id)

    def call(self, what: str, within_s: float = math.inf, **fields: Any) -> Any:
        """What the gateway answers.

        Raises:
            UnreachableError: nothing, in this time.
            PhotonError: what it met.
        """
        call = self._calls / f"{self._name}-{secrets.token_hex(8)}.call"
        until_s = time.monotonic() + within_s
        try:
            write_whole(call, json.dumps({"what": what, **fields}), "a call to the gateway")
            while (found := _read(call.with_suffix(".answer"))) is None:
                if time.monotonic() > until_s:
                    raise UnreachableError(
                        f"the gateway did not answer in {self._calls} within {within_s:g} s",
                        hint="Does `photon join --gateway` run, with the same [gateway] folder?",
                    )
                time.sleep(_LOOK_S)
        finally:
            for path in (call, call.with_suffix(".answer")):
                path.unlink(missing_ok=True)
        answer = json.loads(found)  # the gateway's, and whole: it was renamed into place
        if (error := error_in(answer)) is not None:
            raise error
        return answer["answer"]


class _Carrier:
    """photon.link.Carrier, by the gateway."""

    def __init__(self, gateway: Gateway, task_id: str) -> None:
        self._gateway = gateway
        self._task_id = task_id

    def send(self, objects: Iterable[tuple[str, Buffer]]) -> None:
        # They lie in the folder; reading them here has checked them.
        self._gateway.call("send", task=self._task_id, keys=[key for key, _ in objects])

    def fetch(self, wanted: Iterable[Wanted], *, spool: Path | None = None) -> Iterator[Buffer]:
        assert spool is not None
        wanted = list(wanted)
        told = {"spool": spool.name, "wanted": [asdict(one) for one in wanted]}
        self._gateway.call("fetch", task=self._task_id, **told)
        return Transfer(FolderStore(spool), streams=1).fetch(wanted, spool=spool)


class Calls:
    """Does what the trainer calls for, in threads; holds its place while there is no trainer.

    Args:
        folder: shared with the trainer.
        boot: of this node: Presence.
        wait_s: a question is kept open for a trainer that is gone for so long.
        tell: told, in words, whether there is a trainer; from several threads.
    """

    def __init__(
        self,
        folder: Path,
        desk: DeskClient,
        carriers: Callable[[str], Transfer],
        key: NodeKey,
        boot: str,
        wait_s: float,
        tell: Callable[[str], None],
    ) -> None:
        self._folder, self._desk, self._carriers = folder, desk, carriers
        self._key, self._boot, self._wait_s, self._tell = key, boot, wait_s, tell
        self._going: set[Path] = set()
        #: sha256 of the Ask in each letter that was given to the trainer.
        self._asked: dict[str, str] = {}
        self._ended = threading.Event()
        self._heard_s, self._gone_s = -math.inf, time.monotonic()
        #: What the desk was told last, what it said, and until when that holds.
        self._said, self._answer, self._again_s = Presence("idle"), dict[str, Any](), -math.inf

    def start(self) -> None:
        for work in (self._take, self._hold):
            threading.Thread(target=work, name="photon-gateway", daemon=True).start()

    def stop(self) -> None:
        """Begin nothing new."""
        self._ended.set()

    def _take(self) -> None:
        while not self._ended.wait(_LOOK_S):
            with suppress(OSError):  # the folder may be away for a while
                for call in (self._folder / CALLS).glob("*.call"):
                    answered = call.with_suffix(".answer").exists()
                    if not answered and call not in self._going and len(self._going) < _MOST_CALLS:
                        self._going.add(call)
                        threading.Thread(target=self._do, args=(call,), daemon=True).start()

    def _do(self, path: Path) -> None:
        try:
            if (raw := _read(path)) is None:
                return
            try:
                call = _Call.model_validate_json(raw)
                answer = {"answer": getattr(self, f"_{call.what}")(call, path)}
            except ValidationError as error:
                where = error.errors()[0]["loc"]
                answer = refusal_of(ProtocolError(f"a call that no trainer makes: {where}"))
            except PhotonError as error:
                answer = refusal_of(error)
            except Exception as error:
                answer = refusal_of(NodeError(f"the gateway: {type(error).__name__}: {error}"))
            if path.exists():
                write_whole(path.with_suffix(".answer"), json.dumps(answer), "a gateway's answer")
        except (OSError, PhotonError) as error:
            self._tell(f"an answer to the trainer can't be written: {error}")
        finally:
            self._going.discard(path)

    # --- calls --------------------------------------------------------------------------------

    def _presence(self, call: _Call, _: Path) -> dict[str, Any]:
        now, here_s, was_here = call.presence, time.monotonic(), self._here()
        if now.state == "stopping":
            self._heard_s = -math.inf
        else:
            if not was_here:
                self._tell("a trainer is here")
            self._heard_s = self._gone_s = here_s
        # A trainer reports every 5 s, for us; the desk may want to hear of an idle one less often.
        if now.state != "idle" or now != self._said or not was_here or here_s > self._again_s:
            self._answer = self._desk.presence(replace(now, boot=self._boot))
            self._said, pause_s = now, float(self._answer.pop("next_s", 0))
            self._again_s = here_s + min(pause_s, _MOST_IDLE_S)
        return self._answer

    def _task(self, call: _Call, _: Path) -> dict[str, Any] | None:
        found = self._desk.task(self._boot, call.have)
        if found is None:
            return None
        self._asked[found.id] = hashlib.sha256(_text_of(found.message)).hexdigest()
        while len(self._asked) > 1000:
            del self._asked[next(iter(self._asked))]
        return found.model_dump(mode="json")

    def _reply(self, call: _Call, _: Path) -> None:
        answer: SignedReply | str = call.words or ""
        if call.words is None:
            with suppress(ValueError, LookupError, TypeError, RecursionError):
                if json.loads(call.text)["ask"] == self._asked[call.letter]:
                    text = call.text.encode()
                    signature = sign_document(self._key, RECEIPT, text)
                    answer = SignedReply("", text, signature, self._key.fingerprint)
            if not answer:
                raise ProtocolError(
                    f"the gateway signs no answer to letter {call.letter}: it gave out another",
                    hint="After a restart of the gateway the question comes again by itself.",
                )
        self._desk.reply(self._boot, call.letter, answer)

    def _fetch(self, call: _Call, path: Path) -> None:
        spool = self._folder / "incoming" / call.spool
        for _ in self._carriers(call.task).fetch(call.wanted, spool=spool):
            if not path.exists():
                return  # who asked for it is gone

    def _send(self, call: _Call, _: Path) -> None:
        run, kind, number, _silo = call.task.split("/")
        parcel = FolderStore(self._folder / f"answers/{run}/{kind}-{int(number):06d}/parcel")
        self._carriers(call.task).send(
            (key, parcel.get(key, max_bytes=parcel.size(key) or 0)) for key in call.keys
        )

    # --- without a trainer ----------------------------------------------------------------------

    def _hold(self) -> None:
        """While there is no trainer, look what waits for one, and say so to both sides."""
        told = ""
        while not self._ended.wait(_HOLD_S):
            if self._here():
                told = ""
                continue
            if not told:
                self._tell(told := _WAITS)
            words = _WAITS
            try:
                found = self._desk.task(self._boot, ())
                if self._here():
                    continue
                if found is not None:
                    left_s = min(found.left_s, self._gone_s + self._wait_s - time.monotonic())
                    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left_s))
                    words += f"; until {until} the aggregator's question is kept open for it"
                    if left_s > 0:
                        self._desk.presence(self._waiting(found.message, words))
                    else:
                        words = "no trainer came in time: the aggregator goes on without this site"
            except Exception as error:  # whatever it is, it may be mended
                words += f"; {error}"
            if words != told and not self._ended.is_set():
                self._tell(words)
                told = words

    def _here(self) -> bool:
        return time.monotonic() - self._heard_s < _GONE_S

    def _waiting(self, message: bytes, words: str) -> Presence:
        """As one that works on a question, so that the aggregator waits."""
        task = ""
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            ask = json.loads(_text_of(message))
            number = (ask.get(ask["kind"]) or ask["secure"])["round"]
            task = f"{ask['run']['id']}/{ask['kind']}/{number}/{ask['silo']}"
        return Presence("loading", task=task, detail=words, boot=self._boot)


def _text_of(message: bytes) -> bytes:
    """An Ask as it was signed (photon.federation.envelopes.text_of); nothing of what is none."""
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return json.loads(message)["ask"].encode("utf-8", "surrogatepass")
    return b""


def _read(path: Path) -> bytes | None:
    """What lies in a file; None where there is none, or it is too long for us."""
    with suppress(OSError):
        if path.stat().st_size <= _MOST_BYTES:
            return path.read_bytes()
    return None
