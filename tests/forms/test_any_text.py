"""Whatever cards say, in any writing and with any markup, each form stays what it is."""

from __future__ import annotations

import copy
import datetime
from typing import Any

from extremes import examples
from hypothesis import given, note
from hypothesis import strategies as st
from made_cards import cards_of, tree
from read_forms import read_form

from photon.cards.questions import questions
from photon.forms.export import FORMS, documents

WHOLE = tree()
WHOLE["project"]["facts"] |= {"started_at": "2026-11-30T10:00:00Z", "photon_version": "0.1.0"}
WHOLE["data"]["north"]["facts"]["shards"] = {"train.bin": "ab" * 32}

_ODD = [
    "| a | b |\n|---|---|",
    "<script>alert(1)</script>",
    "</p>\n---\nlicense: mit\n---\n",
    "# x",
    "```\n**bold** [a](javascript:x) ![b](c)",
    "{{ x }}{% y %}",
    "'\"; key: [1, 2",
    "\u202eabc",
    "\x00\x1b[2J\r\n\t",
    "é\u0301ßﬁ𝔘👩‍👩‍👧",
    "\u2028\u2029\x85",
    "&lt;&amp;",
    "null",
    "- x\n1. y",
    "~~~",
    "MIT OR Apache-2.0",
    "http://a b/%zz",
    "../../etc",
    "<!-- ",
    "]]>",
    "\ufeff",
    "    code",
    " ",
]
TEXT = st.one_of(st.sampled_from(_ODD), st.text(min_size=1, max_size=40))
_TEXTS = {
    "text": TEXT,
    "list": st.lists(TEXT, min_size=1, max_size=3),
    "texts": st.dictionaries(TEXT, TEXT, max_size=2),
    "figures": st.dictionaries(TEXT, st.floats(0, 1e39), max_size=2),
    "counts": st.dictionaries(TEXT, st.integers(0, 2**63 - 1), max_size=2),
    "hashes": st.dictionaries(TEXT, st.just("cd" * 32), max_size=2),
    "scores": st.dictionaries(
        TEXT, st.dictionaries(TEXT, st.floats(0, 1e39), max_size=2), max_size=2
    ),
    "number": st.floats(0, 1e39),
}
#: Of Photon itself, and checked when cards are read.
_KEPT = {"started_at", "how", "what", "silos"}


@st.composite
def wholes(draw: st.DrawFn) -> dict[str, Any]:
    """Cards with text in every place that takes text, names of cards among them."""
    whole = copy.deepcopy(WHOLE)
    cards = [("project", whole["project"]), *(("entity", one) for one in whole["entity"])]
    cards += [(kind, one) for kind in ("data", "model") for one in whole[kind].values()]
    for kind, card in cards:
        for one in (*questions(kind), *questions(kind, facts=True)):
            if one.kind in _TEXTS and not one.choices and one.key not in _KEPT:
                card.setdefault(one.section, {})[one.key] = draw(_TEXTS[one.kind])
    for kind in ("data", "model"):
        cards_by_name = list(whole[kind].values())
        names = draw(st.lists(TEXT, min_size=len(cards_by_name), max_size=9, unique=True))
        whole[kind] = dict(zip(names, cards_by_name, strict=False))
    return whole


@given(whole=wholes())
@examples(8)
def test_any_text_keeps_the_forms(whole: dict[str, Any]) -> None:
    cards = cards_of(whole)
    for form in FORMS:
        for text in documents(cards, form, datetime.date(2026, 12, 15)).values():
            text.encode()
            note(f"as {form}")
            read_form(form, text)
