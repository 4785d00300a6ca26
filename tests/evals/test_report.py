"""The page of a replay: its figures, and what texts of attackers can do in it (nothing)."""

import base64
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from kv_retract.evals import report
from kv_retract.evals.excerpts import visible
from kv_retract.evals.replay import replay
from kv_retract.evals.report import number, report_html

VOID = {"meta", "img", "br", "hr", "link", "input"}
OWN_TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "a", "div", "table", "caption", "tr", "th", "td",
    "details", "summary", "dl", "dt", "dd", "img", "b", "span", "pre", "mark",
}  # fmt: skip


class Page(HTMLParser):
    """Elements with their attributes, texts by element, and the cells of every table under its caption."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.stack, self.texts, self.tables = [], [], [], {}
        self._table, self._caption = None, ""
        self.feed(text)
        self.close()
        assert not self.stack, f"elements left open: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        match tag:
            case "table":
                self._table, self._caption = [], ""
            case "tr":
                self._table.append([])
            case "td" | "th":
                self._table[-1].append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag
        if tag == "table":
            self.tables[self._caption] = self._table

    def handle_data(self, data):
        inside = self.stack[-1] if self.stack else ""
        self.texts.append((inside, data))
        if inside in ("td", "th"):
            self._table[-1][-1] += data
        elif inside == "caption":
            self._caption += data

    def text(self, tag=None):
        return "".join(data for inside, data in self.texts if tag in (None, inside))

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def check_harmless(page):
    """No script, no handler, no element that the template does not have, no reference to anything outside."""
    assert {tag for tag, _ in page.elements} <= OWN_TAGS
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("srcset", "action", "data")]
        for name in ("href", "src"):
            if name in attributes:
                assert re.match(r"#\w+$|data:image/svg\+xml;base64,[\w+/=]+$", attributes[name]), (tag, attributes)
    assert not re.search(r"url\(|@import|//", page.text("style"))
    assert page.count("style") == 1 and page.count("meta") == 3
    for tag, attributes in page.elements:
        if tag == "img":
            check_picture(base64.b64decode(attributes["src"].partition(",")[2]))


def check_picture(svg):
    for element in ET.fromstring(svg).iter():
        assert element.tag.rpartition("}")[2] not in ("script", "foreignObject", "image", "a")
        for name, value in element.attrib.items():
            assert not name.startswith("on") and (not name.endswith("href") or value.startswith("#"))


@pytest.fixture(scope="module")
def page(sample_run):
    return Page((sample_run[0] / "report.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(page, sample_run):
    check_harmless(page)
    assert page.count("img") == 2
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy
    assert "http" not in "".join(v for _, a in page.elements for k, v in a.items() if v and k != "http-equiv")


def test_figures_are_those_of_the_metrics(page, sample_run):
    metrics = json.loads((sample_run[0] / "metrics.json").read_text())
    captions = {"all": "All policies", "tool_error": "Policy tool_error", "superseded": "Policy superseded"}
    for policy, caption in captions.items():
        header, *cells = page.tables[caption]
        rows = [row for row in metrics["rows"] if row["policy"] == policy]
        assert [line[0] for line in cells] == [row["arm"] for row in rows] == ["none", "mask", "shift", "recompute"]
        for line, row in zip(cells, rows, strict=True):
            for column, shown in zip(header[1:], line[1:], strict=True):
                if row[column] is None:
                    assert shown == "–"
                else:
                    assert float(shown) == pytest.approx(row[column], rel=0.006, abs=0.5 if row[column] > 999 else 0)
        assert {"n", "kl_mean", "kl_se", "top1", "edit_ms_median", "cached_tokens"} <= set(header)


def test_every_span_is_shown_with_its_reason(page, sample_run):
    result = sample_run[1]
    assert page.count("mark") == len(result.retracted) == 5
    for span in result.retracted:
        assert span.reason in page.text() and span.excerpt.text in page.text("mark")
        assert f"{span.tokens} tokens of message {span.excerpt.message}" in page.text("summary")


def test_the_note_on_random_weights(page, sample_run):
    result = sample_run[1]
    assert "Seeded random weights: quality figures mean nothing" in page.text("p")
    trained = replace(result, config={**result.config, "quality_note": ""})
    other = Page(report_html(trained))
    assert "weights" not in other.text("p") and "warn" not in [a.get("class") for _, a in other.elements]


def test_long_lists_are_cut_with_a_count(sample_run, monkeypatch):
    monkeypatch.setattr(report, "MAX_SPANS", 2)
    monkeypatch.setattr(report, "MAX_PROBLEMS", 3)
    result = replace(sample_run[1], problems=[{"source": f"s{i}", "message": f"m{i}"} for i in range(8)])
    page = Page(report_html(result))
    assert page.count("mark") == 2 and "The first 2; 3 more are left out here." in page.text("p")
    assert [line[0] for line in page.tables[""][1:]] == ["s0", "s1", "s2"]
    assert "The first 3; 5 more are left out here." in page.text("p") and page.text("a") == "8 problems"


def test_nothing_is_cut_or_told_where_lists_are_short(page):
    assert "left out here" not in page.text() and "Problems" not in page.text("h2")


HOSTILE = (
    '<script>alert(1)</script></pre></mark><img src=x onerror=alert(2)>"\'><a href="http://x.example">&amp;{{7*7}}'
)
HIDDEN = "\u202eabc\u2066\x00\x1b[31m\u200b\ufeff"


@pytest.fixture(scope="module")
def hostile_page(make_settings, tmp_path_factory):
    """A real replay of a thread in which everything that its author chose is hostile."""
    text = HOSTILE + HIDDEN
    function = {"name": "f" + text, "arguments": json.dumps({"q": text})}

    def call(id):
        return {"role": "assistant", "content": text, "tool_calls": [{"id": id + text, "function": function}]}

    messages = [
        {"role": "user", "content": text},
        call("a"),
        {"role": "tool", "tool_call_id": "a" + text, "content": "Error: " + text},
        call("b"),
        {"role": "tool", "tool_call_id": "b" + text, "content": text},
        {"role": "assistant", "content": text},
    ]
    folder = tmp_path_factory.mktemp("hostile")
    path = folder / "<img src=x onerror=alert(3)>\u202e.jsonl"
    values = [{"id": "id" + text, "messages": messages}, {text: 1}, {"messages": [{"role": text, "content": ""}]}]
    path.write_text("\n".join(map(json.dumps, values)))
    result = replay(
        make_settings(path, out=folder / "out", policies=('tool_error:include_call=true,exclude=["</td><script>"]',))
    )
    return result, (folder / "out" / "report.html").read_bytes()


def test_hostile_texts_stay_texts(hostile_page):
    result, data = hostile_page
    page = Page(data.decode("utf-8"))
    check_harmless(page)
    assert len(result.retracted) == 2 and page.count("mark") == 2 and len(result.problems) == 2
    shown = visible(HOSTILE + HIDDEN)
    assert HOSTILE in shown
    assert f"id{shown}" in page.text("b")
    assert f"Error: {shown}" in page.text("mark") and f"f{shown} {{" in page.text("mark"), "the result and its call"
    assert f"f{shown} failed; the call answered in message 4 succeeded" in page.text("span")
    where = [line[0] for line in page.tables[""][1:]] if "" in page.tables else []
    assert where and all("<img src=x onerror=alert(3)>⌈U+202E⌋.jsonl" in place for place in where)
    assert "</td><script>" in page.text("td")


def test_nothing_invisible_is_in_the_page(hostile_page):
    text = hostile_page[1].decode("utf-8")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b-\u200f\ufeff\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    for name in ("U+202E", "U+2066", "U+0000", "U+001B", "U+200B", "U+FEFF"):
        assert f"⌈{name}⌋" in text


def test_names_that_are_no_text_can_be_written(sample_run):
    result = sample_run[1]
    config = {**result.config, "paths": ["\udcff<b>.jsonl"], "model": "<i>\u202e"}
    page = Page(report_html(replace(result, config=config)))
    assert "⌈U+DCFF⌋<b>.jsonl" in page.text("td") and "<i>⌈U+202E⌋" in page.text("title")
    check_harmless(page)


def test_names_of_third_parties_are_escaped_too(sample_run):
    result = sample_run[1]
    evil = "<script>1</script>\u202e"
    span = result.retracted[0]
    rows = [{**row, "arm": evil, "policy": evil} for row in result.rows if row["policy"] == "all"]
    samples = [replace(s, arm=evil) for s in result.samples]
    config = {**result.config, "arms": {evil: evil}, "policies": [{"name": evil, "parameters": {evil: evil}}]}
    spans = [replace(span, policy=evil, reason=evil, trace_id=evil)]
    page = Page(report_html(replace(result, rows=rows, samples=samples, config=config, retracted=spans)))
    check_harmless(page)
    assert "<script>1</script>" in page.text("caption")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (3, "3"), (0.0, "0"), (0.012345, "0.0123"), (12.3456, "12.3"), (4321.9, "4322"), ("mask", "mask"),
     (float("inf"), "inf")],
)  # fmt: skip
def test_figures_for_people(value, shown):
    assert number(value) == shown
