"""Options of a request: stop strings, random streams, lengths, penalties, log probabilities; and their types."""

import numpy as np
import pytest
import torch

import rooflama
from rooflama import ArgumentError, RooflamaError
from rooflama.loaders.text.vocabulary import TokenizerError
from rooflama.results import TextStream
from small_checkpoint import TOKENS, Parts, write_small

PROMPT = "ab ab"
HOT = {"temperature": 1.5, "max_new_tokens": 12}
NO_END = {0: -1000.0, 2: -1000.0}  # tokens that end a text
IM_START, IM_END = TOKENS.index("<|im_start|>"), TOKENS.index("<|im_end|>")


@pytest.fixture
def model(tmp_path, numpy_backend):
    with rooflama.load(write_small(tmp_path / "small.gguf"), device="cpu", progress=False) as model:
        yield model


def saying(path, token, context):
    """A checkpoint whose likeliest next token is always ``token``."""
    parts = Parts()
    parts.metadata["llama.context_length"] = context
    for name, values in parts.weights.items():
        if name.endswith(("attn_output.weight", "ffn_down.weight")):
            values[:] = 0
    embedding, output = (np.zeros((len(TOKENS), 64), np.float32) for _ in range(2))
    embedding[:, 0], output[token, 0] = 1, 5
    parts.weights |= {"token_embd.weight": embedding, "output.weight": output}
    parts.types |= {"token_embd.weight": "F32", "output.weight": "F32"}
    return parts.write(path)


# ---- stop strings


@pytest.mark.parametrize(
    ("stop", "shown", "fed"),
    [
        ("<|im_start|>", "ab", 2),
        ("b<|im_st", "a", 2),
        ("rt|>a", "ab", 3),
        ("ab<|im_start|>a", "", 3),
        ("ab<|im_start|>b", "aba", 4),
        ("a<|im_end|>", "ab", 4),
        ("never", "aba", 4),
    ],
)
def test_the_text_of_tokens_that_are_not_shown_counts(model, stop, shown, fed):
    """Token by token: ab, <|im_start|>, a, <|im_end|>; the last ends the text by itself."""
    ids = [TOKENS.index("ab"), IM_START, TOKENS.index("a"), IM_END]
    text = TextStream(model.tokenizer, [stop])
    pieces, count = "", 0
    while not text.finished:
        pieces += text.feed(ids[count])
        count += 1
    assert (pieces + text.flush(), count) == (shown, fed)


def test_a_stop_string_that_never_comes_changes_no_text(model):
    """Whatever is fed: halves of characters, tokens that are not shown, tokens that end the text."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids, texts = rng.integers(0, len(TOKENS), rng.integers(1, 90)).tolist(), []
        for stops in ([], ["<|im_start|><|im_start|>ab"]):
            text = TextStream(model.tokenizer, stops, after=ids[0])
            pieces = "".join(text.feed(token) for token in ids[1:])
            texts.append((pieces + text.flush(), text.finished))
        assert texts[0] == texts[1]


def test_a_control_token_ends_a_generation_that_names_it(tmp_path, numpy_backend):
    with rooflama.load(saying(tmp_path / "m.gguf", IM_START, 64), device="cpu", progress=False) as model:
        ended = model.generate(PROMPT, max_new_tokens=6, stop=["never", "<|im_start|>"])
        assert (ended.token_ids, ended.text, ended.finish_reason) == ([IM_START], "", "stop")
        assert model.generate(PROMPT, max_new_tokens=6, stop="<|im_end|>").finish_reason == "length"


# ---- random streams


def test_rows_draw_from_streams_of_their_own(model):
    rows = model.generate([PROMPT] * 6, **HOT)
    assert len({tuple(row.token_ids) for row in rows}) == 6
    again = [model.generate(PROMPT, seed=row.seed, **HOT).token_ids for row in rows]
    assert again == [row.token_ids for row in rows]


def test_a_row_draws_with_its_number_added_to_the_seed(model):
    rows = model.generate([PROMPT, "b"], n=2, seed=7, **HOT)
    assert [row.seed for row in rows] == [7, 8, 9, 10]
    assert len({tuple(row.token_ids) for row in rows}) == 4
    for row, prompt in zip(rows, [PROMPT, PROMPT, "b", "b"], strict=True):
        assert row.token_ids == model.generate(prompt, seed=row.seed, **HOT).token_ids
    assert "".join(model.stream("b", seed=10, **HOT)) == rows[3].text


def test_the_last_seed_is_followed_by_the_first(model):
    rows = model.generate(PROMPT, n=2, seed=2**63 - 1, **HOT)
    assert [row.seed for row in rows] == [2**63 - 1, 0]


# ---- lengths


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": None}])
def test_a_text_goes_on_until_the_context_is_full(tmp_path, numpy_backend, options):
    with rooflama.load(saying(tmp_path / "m.gguf", 70, 48), device="cpu", progress=False) as model:
        prompt = model.tokenizer.encode(PROMPT)
        result = model.generate(PROMPT, **options)
        assert (len(prompt) + len(result.token_ids), result.finish_reason) == (48, "length")
        with pytest.raises(ArgumentError, match="48 prompt tokens: at least one more token must fit"):
            model.generate([70] * 48, **options)
        with pytest.raises(ArgumentError, match="together they must fit into the context of 48"):
            model.generate(PROMPT, max_new_tokens=48)


def test_rows_without_a_length_share_the_pages_and_go_on_when_they_run_out(tmp_path, numpy_backend):
    """Two pages, one for each row: both rows want a second at once, so one leaves and reads its text again."""
    with rooflama.load(write_small(tmp_path / "m.gguf"), device="cpu", max_context=96, progress=False) as model:
        assert model.plan.num_pages == 2
        options = {"temperature": 1.0, "logit_bias": NO_END}
        whole = [model.generate(prompt, seed=seed, **options) for prompt, seed in ((PROMPT, 3), ("b", 4))]
        assert model.tokens.scheduler.preemptions == 0
        rows = model.generate([PROMPT, "b"], seed=3, **options)
        assert [row.token_ids for row in rows] == [row.token_ids for row in whole]
        assert [row.finish_reason for row in rows] == ["length"] * 2
        assert model.tokens.scheduler.preemptions == 1
        assert model.runner.cache.pool.num_free == 2


# ---- penalties, biases, log probabilities


def greedy_by_hand(model, prompt, steps, adjust):
    """Greedy decoding through ``logits``, each row of which ``adjust(logits, drawn)`` changes."""
    drawn = []
    for _ in range(steps):
        logits = model.logits(prompt + drawn)[-1].double().numpy()
        drawn.append(int(np.argmax(adjust(logits, drawn))))
    return drawn


def test_penalties_count_what_was_said(model):
    prompt = model.tokenizer.encode(PROMPT)
    options = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3}

    def adjust(logits, drawn):
        seen = np.isin(np.arange(logits.size), prompt + drawn)
        logits = np.where(seen, np.where(logits < 0, logits * 1.3, logits / 1.3), logits)
        counts = np.bincount(np.array(drawn, int), minlength=logits.size)
        logits[list(NO_END)] = -1000
        return logits - 0.4 * counts - 0.3 * (counts > 0)

    options["logit_bias"] = NO_END
    want = greedy_by_hand(model, prompt, 30, adjust)
    assert model.generate(prompt, max_new_tokens=30, **options).token_ids == want
    assert model.generate(prompt, max_new_tokens=30, logit_bias=NO_END).token_ids != want
    beside = model.generate([prompt, "b"], max_new_tokens=30, **options)
    assert beside[0].token_ids == want


@pytest.mark.parametrize(
    ("option", "changes"),
    [("frequency_penalty", True), ("presence_penalty", True), ("repetition_penalty", False)],
)
def test_each_penalty_on_a_token_that_leads(tmp_path, numpy_backend, option, changes):
    """The others' logits are 0, which dividing does not reach and subtracting passes."""
    with rooflama.load(saying(tmp_path / "m.gguf", 70, 64), device="cpu", progress=False) as model:
        ids = model.generate([5], max_new_tokens=4, logit_bias=NO_END, **{option: 1000.0}).token_ids
        assert (ids[0], ids[1:] != [70] * 3) == (70, changes)


def test_a_bias_is_added_before_the_penalties(model):
    assert model.generate(PROMPT, max_new_tokens=4, logit_bias={9: 1000.0}).token_ids == [9] * 4
    banned = model.generate(PROMPT, max_new_tokens=20).token_ids[3]
    assert banned not in model.generate(PROMPT, max_new_tokens=20, logit_bias={banned: -1000.0}).token_ids
    prompt = model.tokenizer.encode(PROMPT)

    def adjust(logits, drawn):
        logits[[9, 11]] += 20
        counts = np.bincount(np.array(drawn, int), minlength=logits.size)
        return logits - 1.5 * counts

    want = greedy_by_hand(model, prompt, 20, adjust)
    assert (
        model.generate(PROMPT, max_new_tokens=20, logit_bias={9: 20, 11: 20}, frequency_penalty=1.5).token_ids == want
    )


def test_log_probabilities_are_those_of_the_model_itself(model):
    """Whatever is biased, penalised, heated or filtered; and of each row what it asked for."""
    options = {"temperature": 1.7, "top_k": 5, "logit_bias": {9: 3.0}, "presence_penalty": 0.5, "seed": 1}
    prompt = model.tokenizer.encode(PROMPT)
    result = model.generate(PROMPT, max_new_tokens=8, logprobs=3, **options)
    assert result.token_ids == model.generate(PROMPT, max_new_tokens=8, **options).token_ids
    want = model.logits(prompt + result.token_ids[:-1])[len(prompt) - 1 :].double().log_softmax(-1)
    assert len(result.token_ids) > 4
    for row, token, entry in zip(want, result.token_ids, result.logprobs, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3)
        assert [id_ for id_, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_log_probabilities_are_there_if_asked_for(model):
    assert model.generate(PROMPT, max_new_tokens=2).logprobs is None
    assert [entry.top for entry in model.generate(PROMPT, max_new_tokens=2, logprobs=0).logprobs] == [[], []]
    stream = model.stream(PROMPT, max_new_tokens=5, logprobs=1, seed=1, temperature=1.0)
    assert "".join(stream) == model.generate(PROMPT, max_new_tokens=5, seed=1, temperature=1.0).text
    assert len(stream.logprobs) == 5


# ---- types


@pytest.mark.parametrize(
    "ids",
    [
        np.array([5, 6]), np.array([5, 6], np.uint8), torch.tensor([5, 6]), (5, 6), range(5, 7),
        [np.int64(5), torch.tensor(6)],
    ],
    ids=lambda ids: type(ids).__name__,
)  # fmt: skip
def test_any_row_of_integers_is_a_prompt(model, ids):
    want = model.generate([5, 6], max_new_tokens=3)
    assert model.generate(ids, max_new_tokens=3).token_ids == want.token_ids
    assert "".join(model.stream(ids, max_new_tokens=3)) == want.text
    assert torch.equal(model.logits(ids), model.logits([5, 6]))
    assert model.generate([ids, "ab"], max_new_tokens=3)[0].token_ids == want.token_ids


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.array([[5, 6]]), r"shape \[1, 2\] and dtype int64: the ids of a prompt are one row of integers"),
        (torch.tensor([5.0]), "dtype torch.float32"),
        (np.array([True]), "dtype bool"),
        ([5.0], r"token id 5.0 \(float\)"),
        ([True], r"token id True \(bool\)"),
        ([5, "ab"], r"prompt 5 \(int\)"),
        (None, r"prompt None \(NoneType\)"),
        (b"ab", "bytes"),
        ([2**70], "token id 1180591620717411303424"),
    ],
)
def test_what_is_no_prompt_is_named(model, prompt, message):
    for ask in (model.generate, model.stream):
        with pytest.raises(ArgumentError, match=message):
            ask(prompt, max_new_tokens=2)


@pytest.mark.parametrize("text", [None, b"ab", 5, ["ab"], np.array([5])])
def test_what_a_tokenizer_cannot_encode_is_named(model, text):
    with pytest.raises(TokenizerError, match=f"text of type {type(text).__name__}"):
        model.tokenizer.encode(text)


@pytest.mark.parametrize("ids", [None, "ab", 5, [5.0], torch.tensor([[5]]), [10**9], []])
def test_what_logits_cannot_score_is_refused(model, ids):
    with pytest.raises(ArgumentError):
        model.logits(ids)


def test_logits_of_a_text_names_the_tokenizer(model):
    with pytest.raises(ArgumentError, match=r"text 'Hello': .*Pass model\.tokenizer\.encode\(text\)"):
        model.logits("Hello")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [2.5, 2.0, True, "2"]),
        ("n", [0, 1.0, True, None, 2**16 + 1, 10**30]),
        ("temperature", [None, "1", True, 1j, float("nan"), 10**400, 1e39]),
        ("top_k", [None, 1.5, True, -1]),
        ("top_p", [None, "0.9", 0, 1.1]),
        ("min_p", [None, -0.1, True]),
        ("repetition_penalty", [None, 0.0, -1.0, float("inf"), 1e-50]),
        ("frequency_penalty", [None, "1", float("nan")]),
        ("presence_penalty", [True, float("inf")]),
        ("seed", ["1", 1.5, -1, 2**63]),
        ("stop", [5, [5], np.array(5), torch.tensor(5), "", [""], b"a", {"a": 1}]),
        ("logit_bias", [[1], {"5": 1.0}, {5: "1"}, {5: float("nan")}, {-1: 1.0}, {10**9: 1.0}]),
        ("logprobs", [True, 1.0, -1, 10**6]),
    ],
)
def test_an_option_of_another_kind_is_named(model, name, values):
    for value in values:
        with pytest.raises(
            ArgumentError, match=name.replace("stop", "stop( string)?").replace("logit_bias", "logit_bias")
        ):
            model.generate(PROMPT, **{"max_new_tokens": 2, "temperature": 1.0, name: value})


def test_numbers_of_numpy_and_torch_and_a_top_k_of_any_size(model):
    want = model.generate(PROMPT, max_new_tokens=4, temperature=0.5, seed=3)
    got = model.generate(
        PROMPT, max_new_tokens=np.int64(4), temperature=np.float32(0.5), seed=torch.tensor(3), top_k=10**20, stop=None
    )
    assert got.token_ids == want.token_ids


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_context", "5"), ("max_context", True), ("max_context", 5.0), ("max_context", 0),
        ("memory_limit", -1), ("memory_limit", True), ("memory_limit", 1e9), ("memory_limit", "much"),
        ("max_sequences", 0), ("max_sequences", "2"), ("prefix_cache", "no"),
        ("device", None), ("dtype", ["float32"]), ("kv_dtype", {}), ("longrope", None), ("batch_invariant", "no"),
    ],
)  # fmt: skip
def test_an_option_of_load_of_another_kind_is_refused(tmp_path, numpy_backend, name, value):
    with pytest.raises(RooflamaError):
        rooflama.load(write_small(tmp_path / "small.gguf"), progress=False, **{name: value})


def test_pages_for_several_sequences_are_planned(tmp_path, numpy_backend):
    path = write_small(tmp_path / "small.gguf")
    with rooflama.load(path, max_context=96, max_sequences=3, device="cpu", progress=False) as model:
        assert (model.plan.sequences, model.plan.num_pages) == (3, 6)
        assert len(model.runner.cache.pool.references) == 6


def test_what_is_no_path_is_refused():
    for path in (None, 5, ["a.gguf"]):
        with pytest.raises(RooflamaError, match=r"source .* of type"):
            rooflama.load(path)
