"""A served run as another process writes it: its events, and what it waits for."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from photon.errors import PhotonError
from photon.membership.bulletin import whom_and_what_for
from photon.membership.records import utc

if TYPE_CHECKING:
    from photon.telemetry import Listener

#: Between two looks at events.jsonl.
_FOLLOW_S = 0.3
#: Looks at events.jsonl to one at what the run waits for.
_STATUS_EVERY = 5


@contextlib.contextmanager
def following(
    folder: Path,
    listener: Listener | None,
    status: Callable[[], dict[str, Any]],
    say_dropped: Callable[[str], None],
) -> Iterator[None]:
    """Tell a listener the run's events as another process writes them, and how it stands.

    Whose update was dropped is said besides, with the whole reason: a view has no room for it.
    """
    from photon.dashboard import PlainView
    from photon.telemetry.events import Standing, UpdateDropped

    over, path = threading.Event(), folder / "events.jsonl"

    def tell(event: Any) -> None:
        said_already = isinstance(listener, PlainView) and isinstance(
            event, Standing | UpdateDropped
        )
        if listener is not None and not said_already:
            listener.on_event(event)

    thread = threading.Thread(
        target=_follow, args=(path, tell, status, say_dropped, over), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5.0)
        if listener is not None:
            listener.close()


def _follow(
    path: Path,
    tell: Callable[[Any], None],
    status: Callable[[], dict[str, Any]],
    say_dropped: Callable[[str], None],
    over: threading.Event,
) -> None:
    from photon.telemetry.events import Standing, UpdateDropped, parse_event

    at, torn = 0, b""
    for looks in itertools.count():
        last = over.wait(_FOLLOW_S)
        try:
            with path.open("rb") as file:
                file.seek(at)
                data = file.read()
        except OSError:
            data = b""
        at += len(data)
        *lines, torn = (torn + data).split(b"\n")
        for line in lines:
            try:
                event = parse_event(json.loads(line))
            except ValueError:
                continue
            if event is not None:
                tell(event)
            if isinstance(event, UpdateDropped) and looks:  # not of an earlier process
                say_dropped(f"round {event.round}: dropped {event.silo}: {event.reason}")
        if last:
            return
        if looks == 0 and lines:  # of earlier processes: what they ended with is over
            tell(Standing(waits_for="for the federation's loop to start", away=[]))
        elif looks % _STATUS_EVERY == 0:
            with contextlib.suppress(PhotonError, OSError):  # nobody can say
                found = status()
                away = [one["name"] for one in found["members"] if not one["here"]]
                tell(Standing(waits_for=waits_for(found.get("run", {})), away=away))


def waits_for(run: dict[str, Any]) -> str | None:
    """What a served run waits for, and until when; None if it does not."""
    waiting, lost = run.get("waiting"), run.get("lost")
    if lost:
        return f"until {utc(lost['until'])}: {lost['why']}"
    if not waiting:
        return None
    refusing = [f"{silo} ({why})" for silo, why in waiting.get("refusing", {}).items()]
    out = f"; not asked until it starts anew: {', '.join(refusing)}" if refusing else ""
    refused = [f"{silo} ({why})" for silo, why in waiting.get("refused", {}).items()]
    out += f"; not asked until its cards say more: {', '.join(refused)}" if refused else ""
    return (
        f"for {whom_and_what_for(waiting)}, here: {', '.join(waiting['here']) or 'none'}; "
        f"until {utc(waiting['until'])}{out}"
    )
