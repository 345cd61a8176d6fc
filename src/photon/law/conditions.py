"""Conditions of a law file over cards, in three-valued logic: true, false, unknown.

A condition is data, never code:

    "project.scope.military_only"       that answer is true
    "@in_scope"                         a condition of that name in the same file
    [A, B]  {all = [A, B]}              all of them;  {any = [A, B]}: one;  {not = A}
    {some = "entity", where = A}        A holds for one of the project's entities (data, models)
    {path = P, OPERATOR = VALUE}        see _OPERATORS; with unanswered = CONDITION or true or false
    {answered = P}                      somebody answered

What nobody answered is unknown, and so is what depends on it. The logic is Kleene's: a result that
is true or false stays so whatever the missing answers are.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from photon.cards.bundle import NAMES, Cards, in_words
from photon.cards.questions import Kind, questions
from photon.errors import some

Condition = str | list[Any] | dict[str, Any]

#: Operator -> (kinds of the answer, types of its value in the file, what it asks of answer, value,
#: and share or law date).
_OPERATORS: dict[str, tuple[set[str], tuple[type, ...], Callable[[Any, Any, Any], bool | None]]] = {
    "is": ({"yes", "text"}, (bool, str), lambda found, wanted, _: found == wanted),
    "claimed": ({"yes"}, (bool,), lambda found, *_: found or None),  # true or unknown, never false
    "above": ({"number"}, (int, float), lambda found, wanted, _: found > wanted),
    "above_share_of": ({"number"}, (str,), lambda found, of, share: found > of * share),
    "before": ({"date"}, (datetime.date,), lambda found, wanted, _: found < wanted),
    "passed": ({"date"}, (bool,), lambda found, _, on: found <= on),
    "any_of": ({"list"}, (list,), lambda found, wanted, _: bool(set(found) & set(wanted))),
    "includes": ({"list"}, (list,), lambda found, wanted, _: set(found) >= set(wanted)),
    "within": ({"list", "text"}, (str, list), lambda found, of, _: _set(found) <= set(of)),
    "exactly": ({"list"}, (int,), lambda found, wanted, _: len(found) == wanted),
}
_BESIDE = {"path", "unanswered", "share"}
#: Of a data card: what its Standing says, not what people do.
_STANDING = "standing"


@dataclass(frozen=True)
class Finding:
    """What a condition comes to (None: missing answers decide), and the answers that decide it."""

    truth: bool | None
    because: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a condition is asked.

    Attributes:
        here: the card at hand by kind, with its name among its kind and its name for findings.
        on: the law date.
        named: the file's conditions; known: what they came to, by name and cards at hand; None: it
            is being found.
        trial: all parts are looked at, whichever decides.
    """

    cards: Cards
    here: Mapping[str, tuple[str, str, Any]]
    on: datetime.date
    named: Mapping[str, Condition]
    known: dict[tuple[str, ...], Finding | None]
    trial: bool = False


def evaluate(condition: Condition, place: Place) -> Finding:
    """What a condition comes to.

    Raises:
        ValueError: it is none, in words; never where a trial on blank cards went well.
    """
    match condition:
        case str() if condition.startswith("@"):
            return _by_name(condition, place)
        case str():
            return _compared({"path": condition, "is": True}, place, {"yes"})
        case list():
            return _joined((evaluate(one, place) for one in condition), place, decisive=False)
        case {"all": list() as parts, **rest} if not rest:
            return evaluate(parts, place)
        case {"any": list() as parts, **rest} if not rest:
            return _joined((evaluate(one, place) for one in parts), place, decisive=True)
        case {"not": part, **rest} if not rest:
            found = evaluate(part, place)
            return Finding(None if found.truth is None else not found.truth, found.because)
        case {"some": ("entity" | "data" | "model") as kind, "where": part, **rest} if not rest:
            at = [
                replace(place, here={**place.here, kind: one}) for one in place.cards.subjects(kind)
            ]
            if not at:
                return Finding(None, (f"there is no {kind} card",))
            return _joined((evaluate(part, one) for one in at), place, decisive=True)
        case {"answered": str() as path, **rest} if not rest:
            value, told = _read(path, place)
            return Finding(True if value or value in (False, 0) else None, (told,))
        case {"path": str()}:
            return _compared(condition, place)
    raise ValueError(f"{condition!r:.200} is no condition")


def _by_name(condition: str, place: Place) -> Finding:
    name, key = condition[1:], (condition, *(label for label, _, _ in place.here.values()))
    if name not in place.named:
        raise ValueError(f"condition {name!r} is not there")
    if key not in place.known:
        place.known[key] = None
        place.known[key] = evaluate(place.named[name], place)
    if (found := place.known[key]) is None:
        raise ValueError(f"condition {name!r} asks for itself")
    return found


def _joined(parts: Iterable[Finding], place: Place, *, decisive: bool) -> Finding:
    """Or (decisive is true) and and (false): the first that decides, else what is missing."""
    found: list[Finding] = []
    for one in list(parts) if place.trial else parts:
        if one.truth is decisive:
            return one
        found.append(one)
    missing = [one for one in found if one.truth is None]
    because = dict.fromkeys(told for one in missing or found for told in one.because)
    return Finding(None if missing else not decisive, tuple(because))


def _compared(
    condition: Mapping[str, Any], place: Place, fits: Collection[str] | None = None
) -> Finding:
    """A comparison; fits: kinds of answer that it may be of, in place of the operator's."""
    path, operators = condition["path"], set(condition) - _BESIDE
    if len(operators) != 1 or (operator := operators.pop()) not in _OPERATORS:
        raise ValueError(f"{condition!r:.200} must have one of {', '.join(_OPERATORS)}")
    kinds, types, holds = _OPERATORS[operator]
    wanted, shared = condition[operator], operator == "above_share_of"
    if not isinstance(wanted, types) or shared is not isinstance(condition.get("share"), float):
        told = f"{path}: {operator} = {wanted!r:.80}"
        raise ValueError(f"{told} is of the wrong type, or has the wrong share")
    value, told = _read(path, place, fits or kinds)
    choices = _paths()[path][1]
    if choices and isinstance(wanted, list) and not set(wanted) <= set(choices):
        raise ValueError(f"{path} can't hold {some(map(repr, set(wanted) - set(choices)))}")
    if isinstance(wanted, str) and (shared or operator == "within"):
        wanted, other = _read(wanted, place, {"number"} if shared else {"list"})
        told = f"{told}; {other}"
    if value is None or wanted is None:
        otherwise = condition.get("unanswered")
        if otherwise is None or isinstance(otherwise, bool):
            return Finding(otherwise, (told,))
        return evaluate(otherwise, place)
    return Finding(holds(value, wanted, condition.get("share", place.on)), (told,))


def _set(answer: str | list[str]) -> set[str]:
    return {answer} if isinstance(answer, str) else set(answer)


def _read(path: str, place: Place, fits: Collection[str] = ()) -> tuple[Any, str]:
    """(answer or None, what to say of it) of a path that leads to one of these kinds, if any."""
    if path not in _paths():
        raise ValueError(f"no card has {path!r}")
    (kind, section, *key), (sort, _) = path.split("."), _paths()[path]
    if fits and sort not in fits:
        raise ValueError(f"{path!r} is a {sort}, not a {' or '.join(sorted(fits))}")
    if kind == "names":
        value = NAMES[section](place.cards)
        return value, f"{section}: {some(value, 6) or 'none'}"
    if kind not in place.here:
        raise ValueError(f"{path!r} is asked where no {kind} card is at hand")
    label, name, card = place.here[kind]
    at = f"{label}: {'.'.join([section, *key])}"
    if kind == "data":
        standing = place.cards.standing(name)
        if section == _STANDING:
            value = getattr(standing, key[0])
            return value, f"{label}: {standing.why or f'{key[0]} = {value}'}"
        if section != "facts" and not standing.counts:
            return None, f"{at} is not relied on: {standing.why or 'the card is not fresh'}"
    value = getattr(getattr(card, section), key[0])
    if value is None or value == "":
        return None, f"{at} is not answered"
    return value, f"{at} = {in_words(value)}"


@functools.cache
def _paths() -> dict[str, tuple[str, Collection[str]]]:
    """Every path: what sort of answer it leads to, and its choices."""
    found: dict[str, tuple[str, Collection[str]]] = {f"names.{one}": ("list", ()) for one in NAMES}
    found |= {f"data.{_STANDING}.fresh": ("yes", ()), f"data.{_STANDING}.signature": ("text", ())}
    for kind in get_args(Kind):
        for one in (*questions(kind), *questions(kind, facts=True)):
            sort = "number" if one.kind == "count" else one.kind
            found[f"{kind}.{one.section}.{one.key}"] = (sort, one.choices or ())
    return found
