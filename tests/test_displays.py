"""What shows itself does so in terminals and in notebooks, escaped, and without colours that a theme would hide."""

import io
import re
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

import rooflama
from rooflama.kernels import Weight, attention_decode, rms_norm, write_kv
from rooflama.kernels.facts import Html, element, fact_html, tint
from rooflama.loaders.device import open_device
from rooflama.models import PagedKVCache, PageTable, Timings, TokenLogprob
from rooflama.results import Generation
from whole_checkpoints import write_file

pytestmark = pytest.mark.usefixtures("numpy_backend")

EVIL = "<script>alert('\"&')</script>"
VOID = {"br", "rect", "line", "img"}


class Checked(HTMLParser):
    """Collects text and attributes; asserts that each tag that opens is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.attributes = [], "", []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(html):
    checked = Checked()
    checked.feed(html)
    checked.close()
    assert checked.open == []
    return checked


def html_of(thing):
    html = thing._repr_html_()
    assert "<script" not in html
    # A theme decides on the colour of text, and on what is behind it: whatever we colour must let that through.
    assert not re.search(r"(?<![-\w])color\s*:", html)
    assert all("rgba(" in style for style in re.findall(r"background[^;'\"]*", html))
    return parsed(html)


def terminal_of(thing):
    console = Console(width=200, file=io.StringIO())
    console.print(thing)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with rooflama.load(
        write_file("llama3", tmp_path_factory.mktemp("m") / "m.gguf"), device="cpu", progress=False
    ) as m:
        yield m


def shown(thing, *parts):
    html, terminal = html_of(thing).text, terminal_of(thing)
    for part in parts:
        assert part in html
        assert part in terminal


def test_text_is_escaped_in_children_and_attributes():
    html = element("td", EVIL, Html("<b>kept</b>"), title=EVIL)
    assert "<script" not in html
    assert parsed(html).text == EVIL + "kept"
    assert parsed(html).attributes == [("title", EVIL)]
    assert parsed(fact_html([(EVIL, EVIL)])).text == EVIL * 2


@pytest.mark.parametrize(("share", "alpha"), [(-1, "0.00"), (0.5, "0.25"), (1, "0.50"), (7, "0.50")])
def test_a_tint_never_covers_what_is_behind_it(share, alpha):
    assert tint("#0072b2", share) == f"background:rgba(0,114,178,{alpha})"


def test_config_plan_and_trace(model):
    shown(model.config, "GQA", "head_dim")
    shown(model.plan, "weights", "keys and values")
    assert len(repr(model.plan)) < 200
    trace = rooflama.trace(model, [5, 6, 7], ["hidden", "scores.0"])
    shown(trace, "3 tokens", "hidden", f"{list(trace['scores.0'].shape)} float32")


def test_a_kernel_shows_its_signature_and_its_definition():
    shown(attention_decode, "attention_decode(q: ", "def attention_decode(")
    assert "writes" not in dict(rms_norm.rows())
    assert dict(write_kv.rows())["writes"].startswith("k_pages, v_pages")


def test_a_weight_shows_its_planes_and_not_its_numbers():
    weight = Weight.make("F16", [torch.zeros(3, 64, dtype=torch.float16)], (3, 64))
    shown(weight, "F16 [3, 64] on cpu", "384, 16 bits per weight", "[3, 64] float16")


def generation(tokenizer, logprobs):
    token_ids = [one.token_id for one in logprobs or []]
    return Generation(EVIL, token_ids, "stop", Timings(prompt_tokens=3), 0, logprobs, tokenizer)


def test_a_generation_without_probabilities_is_its_text(model):
    shown(generation(model.tokenizer, None), EVIL, "3 prompt tokens", "ended by stop")


def test_tokens_are_tinted_by_probability_and_show_alternatives(model):
    first, second = 70, 71
    texts = [model.tokenizer.piece(token).data.decode() for token in (first, second)]
    logprobs = [TokenLogprob(first, 0.0, [(first, 0.0)]), TokenLogprob(second, -2.0, [(first, -0.2), (second, -2.0)])]
    page = html_of(generation(model.tokenizer, logprobs))
    tints = [value for name, value in page.attributes if name == "style" and "rgba" in value]
    titles = [value for name, value in page.attributes if name == "title"]
    assert tints == [tint("#0072b2", 1), tint("#0072b2", 0.1353)]
    assert "81.9%" in titles[1]
    assert repr(texts[0]) in titles[1]
    shown(generation(model.tokenizer, logprobs), "".join(texts))


def test_a_model_hands_its_tokenizer_to_the_display(model):
    result = model.generate([5, 6, 7], max_new_tokens=3, logprobs=2)
    assert len([value for name, value in html_of(result).attributes if name == "title"]) == 3


def test_pages_show_who_holds_them(model):
    with open_device("cpu") as device:
        cache = PagedKVCache(model.config, num_pages=6, page_size=16, max_append=64, dtype=torch.float32, device=device)
        first = cache.add()
        cache.append(first, 40)
        second = cache.fork(first)
        cache.append(second, 1)
        table = PageTable.of(cache, {"first": first, EVIL: second})
        assert table.owners.count(["first", EVIL]) == 2  # the third page was copied
        assert table.describe("first") == "40 tokens in 3 pages, 2 of them shared, 8 slots unused"
        shown(table, "6 pages of 16 tokens, 2 free", EVIL, table.describe(EVIL))
        assert table._repr_html_().count("border-style:double") == 2
