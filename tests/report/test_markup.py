"""Escaping, and figures as text."""

import math
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jexit.report.markup import Html, escape, interval, join, number, per_cent, points, tag


def read(page):
    """Text and attributes as a browser's parser sees them."""
    texts, attributes = [], []

    class Reader(HTMLParser):
        def handle_data(self, data):
            texts.append(data)

        def handle_starttag(self, name, found):
            attributes.append((name, dict(found)))

    Reader().feed(page)
    return "".join(texts), attributes


def shown_as(character):
    if unicodedata.category(character) == "Cc" and character not in "\t\n":
        return f"\\x{ord(character):02x}"
    lone_half = unicodedata.category(character) == "Cs"
    return "\ufffd" if lone_half or character in "\ufffe\uffff" else character


ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(ANY_TEXT)
def test_any_text_is_read_back_as_itself_but_for_what_html_cannot_hold(text):
    page = tag("p", text, title=text)
    page.encode("utf-8")  # no lone surrogates
    shown, ((name, attributes),) = read(page)
    assert name == "p" and len(attributes) == 1
    for found in (shown, attributes["title"]):
        assert found == "".join(map(shown_as, text))


def test_markup_passes_and_text_does_not():
    assert escape("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#39;"
    assert escape(Html("<b>")) == "<b>"
    assert tag("p", "<", tag("b", "&"), None) == "<p>&lt;<b>&amp;</b></p>"
    assert join("<", None, Html("<br>"), by=" ") == "&lt; <br>"


def test_attributes():
    assert tag("a", href='x"><script>', class_="c") == (
        '<a href="x&quot;&gt;&lt;script&gt;" class="c"></a>'
    )
    assert tag("details", open=True, hidden=False, title=None) == "<details open></details>"
    assert tag("br") == "<br>"
    assert tag("rect", x=1.0, stroke_width=0.126) == '<rect x="1" stroke-width="0.13"></rect>'


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf, -math.inf])
def test_figures_that_are_not_known_are_a_dash(unknown):
    assert number(unknown) == per_cent(unknown) == points(unknown) == "–"
    assert interval((0.1, unknown if unknown is not None else math.nan)) == interval(None) == ""


def test_figures():
    assert number(1234567.891, 1) == "1\u202f234\u202f567.9"
    assert number(-0.25) == "−0.25"
    assert per_cent(0.9734) == "97.3\u00a0%"
    assert interval((0.95, 1.0)) == "95.0 to 100.0\u00a0%"
    assert [points(v) for v in (0.054, -0.054, 0.0)] == ["+5.4", "−5.4", "0.0"]
