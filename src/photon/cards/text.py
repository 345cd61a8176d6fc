"""A card as TOML: every question with its article, the answers, and what Photon knows."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import tomli_w

from photon.cards.questions import Kind, Question, sections

_HEAD = {
    "project": "The project card: what is made together, for what, and by which legal entities.",
    "data": "A silo's data card. It is the site's: only the site answers, and signs it.",
    "model": "A model card.",
}
_HOW = (
    "To answer, take the # from a line and put true, false, a text or a list after the =. What is "
    "not answered is unknown. Articles are those of Regulation (EU) 2024/1689, the AI Act; the "
    "wording is a paraphrase. [facts] is filled in by Photon. A prediction from this is not legal "
    "advice."
)
_EMPTY = {"yes": "", "text": '""', "date": "2026-12-31", "number": "0", "list": "[]"}
#: Lists with more choices than this are written out in the project card only.
_MOST_CHOICES = 12


def card_text(kind: Kind, answers: Mapping[str, Any], was: Mapping[str, Any] | None = None) -> str:
    """A card as TOML that reads back to the same.

    Args:
        answers: by section and key, "facts" and, of a project, "entities" among them.
        was: answers of an older version, shown but not given.
    """
    lines = [*_comment(_HEAD[kind]), *_comment(_HOW), ""]
    lines += _asked(kind, answers, was or {}, prefix="")
    for number, entity in enumerate(answers.get("entities", ())):
        lines += ["", "# --- A legal entity of the project. " + "-" * 40 if number == 0 else ""]
        lines += ["[[entities]]", *_asked("entity", entity, {}, "entities.", brief=number > 0)]
    facts = {key: value for key, value in answers.get("facts", {}).items() if value is not None}
    return "\n".join(lines) + "\n\n" + tomli_w.dumps({"facts": facts})


def _asked(
    kind: Kind,
    answers: Mapping[str, Any],
    was: Mapping[str, Any],
    prefix: str,
    *,
    brief: bool = False,
) -> Iterator[str]:
    for section, asked in sections(kind):
        yield from ("", f"[{prefix}{section}]")
        for one in asked:
            if not brief:
                yield from _comment(f"{one.ask}{f' ({one.article})' if one.article else ''}")
                yield from _choices(kind, one)
            value = answers.get(section, {}).get(one.key)
            old = was.get(section, {}).get(one.key)
            if value is not None:
                yield tomli_w.dumps({one.key: value}).rstrip()
            elif old is not None:
                yield from _comment(tomli_w.dumps({one.key: old}).rstrip(), width=10_000)
            else:
                yield f"# {one.key} = {_EMPTY[one.kind]}".rstrip()


def _choices(kind: Kind, one: Question) -> Iterator[str]:
    if one.choices and (len(one.choices) <= _MOST_CHOICES or kind == "project"):
        width = max(map(len, one.choices))
        yield from (f"#     {name:<{width}}  {meaning}" for name, meaning in one.choices.items())
    elif one.choices:
        yield "# Names as in the project card."


def _comment(text: str, width: int = 98) -> Iterator[str]:
    for line in text.splitlines():
        yield from (f"# {part}" for part in textwrap.wrap(line, width) or [""])
