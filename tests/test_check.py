"""``rooflama check``: a good file passes; for a broken file the right line names what is broken."""

import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from gguf_files import STRING, U16, gguf_bytes, number, text
from gguf_files import key as key_bytes
from rooflama import cli, demo_checkpoint
from rooflama.checks import file_checks
from rooflama.checks.checklist import CHECKS, check
from rooflama.loaders.opening import UnknownCheckpointError
from rooflama.model import Model
from rooflama.models.weights import Projection
from small_checkpoint import HEAD_DIM, HIDDEN, KV_HEADS, VOCABULARY, WIDTH, Parts, write_small

LLAMA_31 = {"llama.rope.freq_base": 500_000.0, "llama.context_length": 131_072}


def metadata(**changes) -> Callable[[Parts], None]:
    """Set keys; ``__`` stands for a dot, None removes."""

    def change(parts: Parts) -> None:
        for name, value in changes.items():
            key = name.replace("__", ".")
            parts.metadata.pop(key, None)
            if value is not None:
                parts.metadata[key] = value

    return change


def drop_tensor(name: str) -> Callable[[Parts], None]:
    return lambda parts: parts.weights.pop(name)


def tensor(name: str, values: np.ndarray, kind: str = "F32") -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.weights[name], parts.types[name] = values, kind

    return change


def in_file(pattern: bytes, replacement: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert pattern in data
        return data.replace(pattern, replacement, 1)

    return change


def damaged_values(name: str, value: float) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.weights[name] = parts.weights[name].copy()
        parts.weights[name].flat[7] = value

    return change


def architecture(parts: Parts) -> None:
    parts.architecture = "mamba"


ones = np.ones(HIDDEN, np.float32)
norm, up, key, value = "blk.1.ffn_norm.weight", "blk.1.ffn_up.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"

# name: (what breaks the parts or the bytes, the line that must say so, its status, what it must name)
BROKEN = {
    "magic": (in_file(b"GGUF", b"GGML"), "structure", "FAIL", "byte 0.*starts with b'GGML'"),
    "version": (in_file(b"GGUF\x03", b"GGUF\x63"), "structure", "FAIL", "version"),
    "cut in the header": (lambda data: data[:900], "structure", "FAIL", "byte"),
    "cut in a tensor": (lambda data: data[:-4096], "structure", "FAIL", "tensor"),
    "git-lfs pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "structure", "FAIL", "git-lfs"),
    "tensor twice": (in_file(b"blk.1.ffn_up", b"blk.1.attn_q"), "structure", "FAIL", "blk.1.attn_q.weight"),
    "unknown architecture": (architecture, "config", "FAIL", "mamba"),
    "no layer count": (metadata(llama__block_count=None), "config", "FAIL", "llama.block_count"),
    "NaN epsilon": (
        metadata(llama__attention__layer_norm_rms_epsilon=float("nan")), "config", "FAIL",
        r"^broken.gguf, byte \d+: llama.attention.layer_norm_rms_epsilon = nan",
    ),
    "heads that do not divide": (metadata(llama__attention__head_count_kv=3), "config", "FAIL", "3 key/value heads"),
    "a key nobody knows": (metadata(llama__attention__sinks=4), "config", "FAIL", "llama.attention.sinks"),
    "vocabulary of another size": (metadata(llama__vocab_size=VOCABULARY - 1), "config", "FAIL", "vocab_size"),
    "no context": (metadata(llama__context_length=0), "config", "FAIL", "context_length"),
    "scaling of no known type": (metadata(llama__rope__scaling__type="warp"), "config", "FAIL", "warp"),
    "base of no rotation": (metadata(llama__rope__freq_base=1.0), "config", "FAIL", "base"),
    "tensor missing": (drop_tensor(up), "tensors", "FAIL", f"tensor {up} is missing"),
    "tensor too many": (tensor("blk.1.attn_sinks.weight", ones), "tensors", "FAIL", "blk.1.attn_sinks.weight"),
    "tensor misshapen": (
        tensor(key, np.ones((KV_HEADS * HEAD_DIM + 1, HIDDEN), np.float32)), "tensors", "FAIL", f"{key} has shape"
    ),
    "norm that is quantised": (
        tensor(norm, np.ones((1, HIDDEN), np.float32)[0], "Q8_0"), "tensors", "FAIL", f"tensor {norm} is Q8_0"
    ),
    "NaN in a norm": (damaged_values(norm, np.nan), "weights", "FAIL", rf"tensor {norm} \(F32\) holds NaN"),
    "infinite scale": (damaged_values(value, 1e9), "weights", "FAIL", rf"{value} \(Q5_0\).*row 0"),
    "matrix of zeros": (
        tensor(up, np.zeros((WIDTH, HIDDEN), np.float32), "Q4_1"), "weights", "WARN", f"every weight of tensor {up}"
    ),
    "Llama 3.1 without its factors": (lambda parts: parts.metadata.update(LLAMA_31), "config", "WARN", "rope_freqs"),
    "tiny base": (metadata(llama__rope__freq_base=100.0), "rope", "WARN", "freq_base is 100"),
    "no tokenizer": (metadata(tokenizer__ggml__model=None), "tokenizer", "FAIL", "tokenizer.ggml.model is missing"),
    "pre-tokeniser of no known kind": (metadata(tokenizer__ggml__pre="klingon"), "tokenizer", "FAIL", "klingon"),
    "token types too few": (metadata(tokenizer__ggml__token_type=[1, 2]), "tokenizer", "FAIL", "token_type has 2"),
    "end token out of range": (metadata(tokenizer__ggml__eos_token_id=9999), "tokenizer", "FAIL", "eos_token_id"),
    "template that does not parse": (
        metadata(tokenizer__chat_template="{% for m in messages %}"), "chat template", "FAIL", "line 1"
    ),
    "template that writes a book": (
        metadata(tokenizer__chat_template="{{ 'a b' * 1000000 }}{{ messages[0].content }}"),
        "chat template", "FAIL", "its text has 3,000,018 characters"
    ),
    "template that drops the words": (metadata(tokenizer__chat_template="hello"), "chat template", "FAIL", "drops"),
    "no template": (metadata(tokenizer__chat_template=None), "chat template", "WARN", "chat_template is missing"),
}  # fmt: skip
OF_BYTES = {"magic", "version", "cut in the header", "cut in a tensor", "git-lfs pointer", "tensor twice"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return Parts().write(tmp_path_factory.mktemp("check") / "small.gguf")


def test_a_sound_file_fails_nowhere(sound, numpy_backend):
    """The one finding is that random weights predict English no better than chance."""
    report = check(sound, device="cpu")
    assert [result.name for result in report.results] == [item.name for item in CHECKS]
    assert {result.status for result in report.results if result.name != "forward"} == {"PASS"}
    assert report.of("forward").status == "WARN"
    assert "near chance" in report.of("forward").reason
    assert len(report.of("forward").details["layer errors"]) == 2
    assert report.exit_status == 1


@pytest.mark.parametrize("name", BROKEN)
def test_the_broken_thing_is_named(name, sound, tmp_path, numpy_backend):
    change, line, status, words = BROKEN[name]
    path = tmp_path / "broken.gguf"
    if name in OF_BYTES:
        path.write_bytes(change(sound.read_bytes()))
    else:
        parts = Parts()
        change(parts)
        parts.write(path)
    report = check(path, device="cpu")
    found = report.of(line)
    assert found.status == status, report.to_markdown()
    assert re.search(words, found.reason), found.reason
    before = report.results[: report.results.index(found)]
    assert "FAIL" not in {result.status for result in before}, "an earlier line claims it"
    assert not any(result.reason.startswith("unexpected") for result in report.results)
    assert str(tmp_path) not in report.to_markdown()
    assert report.exit_status == (2 if status == "FAIL" else 1)


def test_a_memory_limit_is_held_against_the_plan(sound, numpy_backend):
    report = check(sound, device="cpu", limit=200_000)
    assert report.of("memory").status == "FAIL"
    assert "KiB is" not in report.of("memory").reason
    assert "limit 195.31 KiB" in report.of("memory").reason
    assert report.of("forward").status == "SKIP"
    assert report.exit_status == 2


@pytest.mark.parametrize(
    ("context", "forward", "generation"), [(1, "PASS", "WARN"), (2, "PASS", "PASS"), (3, "WARN", "PASS")]
)
def test_contexts_of_a_few_tokens(context, forward, generation, tmp_path, numpy_backend):
    """Too few to measure English or to continue a prompt: the line says so, and that is no error."""
    report = check(write_small(tmp_path / "small.gguf", {"llama.context_length": context}), device="cpu")
    said = report.of("forward").reason
    assert ("too short" in said, "nats per token" in said) == (context < 3, context >= 3), said
    assert (report.of("forward").status, report.of("generation").status) == (forward, generation), report.to_markdown()


def test_logits_that_are_no_numbers_later_in_the_text_are_named(sound, monkeypatch, numpy_backend):
    """The first tokens, which are compared with the definition, are right."""
    original = Model.logits

    def logits(self, ids, **options):
        made = original(self, ids, **options)
        made[20:] = float("nan")
        return made

    monkeypatch.setattr(Model, "logits", logits)
    found = check(sound, device="cpu").of("forward")
    assert found.status == "FAIL"
    assert "logits further on in the text are not finite" in found.reason


def off_by(factor: float, layer: int):
    """``Projection.__call__``, but with silu(gate) * up of one of two layers multiplied by ``factor``."""
    original, calls = Projection.__call__, itertools.count()

    def call(self, x, **options):
        y = original(self, x, **options)
        if sum(part.shape[0] for part in self.parts) == 2 * WIDTH and next(calls) % 2 == layer:
            return y * factor
        return y

    return call


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_that_errs_is_named(sound, layer, monkeypatch, numpy_backend):
    """One product in one layer is off by 0.1%, which is more than float32 explains."""
    monkeypatch.setattr(Projection, "__call__", off_by(1.001, layer))
    found = check(sound, device="cpu").of("forward")
    assert found.status == "FAIL"
    assert found.reason.startswith(f"layer {layer} is off by ")


def test_an_error_counts_for_its_own_layer_only(sound, monkeypatch, numpy_backend):
    monkeypatch.setattr(Projection, "__call__", off_by(1.0000015, 0))
    first, second = check(sound, device="cpu").of("forward").details["layer errors"]
    assert second < first / 3


def test_logits_that_err_are_named(sound, monkeypatch, numpy_backend):
    from rooflama.models import Decoder

    original = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, hidden: original(self, hidden) + 0.01)
    found = check(sound, device="cpu").of("forward")
    assert found.status == "FAIL"
    assert "the layers agree, the logits are off" in found.reason


def test_decoding_that_errs_is_named(sound, monkeypatch, numpy_backend):
    """Decode rotates by one position too many. Every layer of a prefill pass is right, generation is not."""
    from rooflama.models.serving import runner

    original = runner.Step

    def shifted(**parts):
        if parts.get("query_start_loc") is None:
            parts["rope_rows"] = parts["rope_rows"] // 2
        return original(**parts)

    monkeypatch.setattr(runner, "Step", shifted)
    report = check(sound, device="cpu")
    assert report.of("forward").status == "WARN"
    assert report.of("generation").status == "FAIL"
    assert "one pass over the same text prefers" in report.of("generation").reason


def test_report_has_what_a_bug_report_needs_and_no_path(sound, tmp_path, numpy_backend):
    target = tmp_path / "report.md"
    run = CliRunner().invoke(cli.app, ["check", str(sound), "--device", "cpu", "--report", str(target)])
    assert run.exit_code == 1, run.output
    text = target.read_text()
    for needed in ("torch", "backend", "sha256", "llama.block_count", "layer errors", "kv_bytes_per_token", "forward"):
        assert needed in text
    assert str(sound.parent) not in text


def test_a_run_that_is_killed_leaves_the_report_of_what_came_before(sound, tmp_path, monkeypatch, numpy_backend):
    target, on_disk = tmp_path / "report.md", []

    def reading_the_report(original):
        def call(*arguments):
            on_disk.append(target.read_text())
            return original(*arguments)

        return call

    for module, name in ((file_checks, "locate"), (gguf.quants, "dequantize")):  # first used in lines 1 and 4
        monkeypatch.setattr(module, name, reading_the_report(getattr(module, name)))
    run = CliRunner().invoke(cli.app, ["check", str(sound), "--device", "cpu", "--report", str(target)])
    assert run.exit_code == 1, run.output
    first, fourth, *_ = on_disk
    assert "| structure | | | begun; the run ended before it did |" in first
    assert "torch" in first
    assert re.search(r"\| tensors \| PASS \|.*\n\| layout \| \| \| begun", fourth)
    assert "sha256" in fourth
    assert "begun" not in target.read_text()


@pytest.mark.parametrize("target", ["none/report.md", ".", "small.gguf", "x" * 300, "/proc/report.md"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(target, tmp_path, monkeypatch):
    """A missing folder, a folder, the checkpoint itself (which stays unchanged), too long a name, and /proc."""
    path = Parts().write(tmp_path / "small.gguf")
    before = path.read_bytes()
    monkeypatch.setattr(sys.modules["rooflama.checks.checklist"], "check", lambda *_, **__: pytest.fail("the list ran"))
    run = CliRunner().invoke(cli.app, ["check", str(path), "--report", str(tmp_path / target)])
    assert run.exit_code == 2
    assert run.output.startswith("error: --report"), run.output
    assert path.read_bytes() == before


def test_a_report_is_written_after_the_last_check_only(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("in the middle of the list")

    monkeypatch.setattr(sys.modules["rooflama.checks.checklist"], "check", fail)
    (tmp_path / "older.md").write_text("older")
    for name in ("older.md", "new.md"):
        run = CliRunner().invoke(cli.app, ["check", "small.gguf", "--report", str(tmp_path / name)])
        assert isinstance(run.exception, RuntimeError), run.output
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("older.md", "older")]


def test_a_later_file_of_a_split_set_is_reported_without_its_folder(tmp_path, numpy_backend):
    split = [("split.no", U16, number(U16, 0)), ("split.count", U16, number(U16, 2))]
    keys = [key_bytes("general.architecture", STRING, text("llama")), *(key_bytes(*part) for part in split)]
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(gguf_bytes(keys, []))
    report = check(tmp_path / "m-00001-of-00002.gguf", device="cpu")
    assert report.of("structure").reason.startswith("m-00002-of-00002.gguf: no such file")
    assert str(tmp_path) not in report.to_markdown()


def test_a_report_shows_the_beginning_of_a_long_rendering(tmp_path, numpy_backend):
    template = "{{ messages[0].content }}{{ 'a b' * 20000 }}{% if add_generation_prompt %}!{% endif %}"
    report = check(write_small(tmp_path / "small.gguf", {"tokenizer.chat_template": template}), device="cpu")
    found = report.of("chat template")
    assert found.status == "PASS", found.reason
    assert found.details["rendered"].startswith("What is 6 times 7?a ba b")
    assert len(report.to_markdown()) < 30_000


def test_an_unexpected_error_is_reported_without_paths(sound, monkeypatch, numpy_backend):
    def fail(*_):
        raise ValueError(f"{sound} and {Path.home()}/notes")

    monkeypatch.setattr(gguf.quants, "dequantize", fail)
    report = check(sound, device="cpu")
    found = report.of("layout")
    assert found.reason == "unexpected ValueError: small.gguf and ~/notes; please report it"
    assert any(line.startswith("file_checks.py:") for line in found.details["traceback"])
    for folder in (sound.parent, Path(cli.__file__).parents[1], Path(gguf.__file__).parent):
        assert str(folder) not in report.to_markdown()


def test_a_panic_in_a_library_is_the_line_s_failure_and_an_interrupt_is_not(sound, monkeypatch, numpy_backend):
    raised: list[BaseException] = []

    def fail(*_):
        raise raised[-1]

    monkeypatch.setattr(gguf.quants, "dequantize", fail)
    raised.append(type("PanicException", (BaseException,), {})("retry limit"))  # as pyo3 makes them
    report = check(sound, device="cpu")
    assert report.of("layout").reason == "unexpected PanicException: retry limit; please report it"
    assert report.of("rope").status == "PASS"
    for interrupt in (KeyboardInterrupt(), SystemExit(1)):
        raised.append(interrupt)
        with pytest.raises(type(interrupt)):
            check(sound, device="cpu")


def test_commands_print_json(sound, numpy_backend):
    run = CliRunner().invoke(cli.app, ["check", str(sound), "--device", "cpu", "--json"])
    assert json.loads(run.stdout)["exit_status"] == run.exit_code == 1
    run = CliRunner().invoke(cli.app, ["plan", str(sound), "--context", "100", "--limit", "64MiB", "--json"])
    shown = json.loads(run.stdout)
    assert shown["context_tokens"] == 100
    assert shown["fits"]
    assert run.exit_code == 0
    run = CliRunner().invoke(cli.app, ["plan", str(sound), "--context", "100", "--limit", "50KiB"])
    assert run.exit_code == 1
    assert "no context fits" in run.stdout


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def test_numbers_that_json_has_not_are_texts(tmp_path, monkeypatch, numpy_backend):
    """In the metadata, and as the error of a layer that computes NaN."""
    monkeypatch.setattr(Projection, "__call__", off_by(float("nan"), 0))
    odd = {"general.weight": float("nan"), "general.bound": float("-inf")}
    path, target = write_small(tmp_path / "small.gguf", odd), tmp_path / "report.md"
    run = CliRunner().invoke(cli.app, ["check", str(path), "--device", "cpu", "--json", "--report", str(target)])
    shown = json.loads(run.stdout, parse_constant=refuse_constant)
    lines = {line["name"]: line for line in shown["checks"]}
    assert lines["structure"]["metadata"]["general.weight"] == "nan"
    assert lines["structure"]["metadata"]["general.bound"] == "-inf"
    assert lines["forward"]["layer errors"] == ["nan"]
    for block in re.findall(r"```json\n(.*?)```", target.read_text(), re.DOTALL):
        json.loads(block, parse_constant=refuse_constant)


@pytest.mark.demo_checkpoint
def test_the_demo_checkpoint_passes_everything(numpy_backend):
    try:
        path = demo_checkpoint()
    except UnknownCheckpointError as error:
        pytest.skip(str(error))
    report = check(path, device="cpu")
    assert {result.status for result in report.results} == {"PASS"}, report.to_markdown()
