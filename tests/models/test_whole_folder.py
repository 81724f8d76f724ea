"""Hugging Face folders through the public functions: each family against transformers, and against its GGUF file."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import rooflama
from rooflama import cli
from running_models import assert_parity
from tiny_checkpoints import reference_logits
from whole_checkpoints import FAMILIES, module, tokenizer, write_file, write_folder

pytestmark = pytest.mark.usefixtures("numpy_backend")
PROMPT = "The llama walks over the roof, isn't it? 1234 größe"
MESSAGES = [{"role": "user", "content": "The llama walks"}]
# Facts that differ by what files can say; rotary factors are tensors in GGUF.
APART = {"file", "model", "tokenizer", "RoPE", "parameters", "tensors"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> its folder, in shards for some."""
    root = tmp_path_factory.mktemp("folders")
    sizes = {"llama3": "60KB", "phi4-mini": "60KB"}

    def folder(name):
        path = root / name
        return path if path.exists() else write_folder(name, path, max_shard_size=sizes.get(name, "5GB"))

    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_runs_as_in_transformers(name, folders):
    theirs = tokenizer(name)
    with rooflama.load(folders(name), device="cpu", progress=False) as model:
        assert model.name == name
        ids = model.tokenizer.encode(PROMPT)
        assert ids == theirs.encode(PROMPT)
        assert_parity(model.logits(ids), reference_logits(module(name), ids), name)
        greedy = model.generate(PROMPT, max_new_tokens=8)
        expected = (
            module(name)
            .generate(
                torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=theirs.eos_token_id, pad_token_id=0
            )[0, len(ids) :]
            .tolist()
        )
        assert greedy.token_ids == expected
        chat_ids = model.tokenizer.encode_chat(MESSAGES)
        told = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        assert chat_ids == [model.tokenizer.bos_id] * model.tokenizer.add_bos + told
        assert model.chat(MESSAGES, max_new_tokens=4).token_ids == model.generate(chat_ids, max_new_tokens=4).token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_says_what_its_gguf_file_says(name, folders, tmp_path):
    file = write_file(name, tmp_path / "same.gguf")
    of_folder, of_file = (dict(rooflama.inspect(path).rows()) for path in (folders(name), file))
    assert of_folder["file"].split(",")[0] == name
    assert of_folder["vocabulary"] == f"{len(tokenizer(name))} tokens"
    assert of_folder["tokenizer"] == "tokenizer.json"
    if module(name).config.rope_parameters["rope_type"] == "default":
        for fact in ("RoPE", "parameters"):
            assert of_folder[fact] == of_file[fact]
    assert {k: v for k, v in of_folder.items() if k not in APART} == {
        k: v for k, v in of_file.items() if k not in APART
    }
    plans = [rooflama.plan_memory(path, device="cpu", context=64) for path in (folders(name), file)]
    assert plans[0].total_bytes == pytest.approx(plans[1].total_bytes, abs=4096)
    text = "<|end|> roof"
    ours, theirs = rooflama.load_tokenizer(folders(name)), rooflama.load_tokenizer(file)
    for parse in (False, True):
        assert ours.encode(PROMPT + text, parse_special=parse) == theirs.encode(PROMPT + text, parse_special=parse)
    assert (ours.eos_ids, ours.add_bos, ours.bos_id) == (theirs.eos_ids, theirs.add_bos, theirs.bos_id)


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen2-window", "qwen3", "phi3-128k"])
def test_the_checklist_passes(name, folders):
    """Random weights know no English, and that is all it finds."""
    report = rooflama.check(folders(name), device="cpu")
    status = {result.name: result.status for result in report.results}
    assert status.pop("forward") == "WARN", report.to_markdown()
    assert "near chance" in report.of("forward").reason
    assert set(status.values()) == {"PASS"}, report.to_markdown()
    assert report.of("structure").reason.startswith("Hugging Face safetensors, ")
    assert report.of("layout").reason.startswith("no tensor is quantised; ")
    text = report.to_markdown()
    assert str(folders(name).parent) not in text
    assert f"- name: {name}" in text


@pytest.mark.parametrize(
    ("damage", "line", "found"),
    [
        (
            lambda f: (f / "model.safetensors").write_bytes(b""),
            "structure",
            "llama2/model.safetensors: a header of 0 bytes",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer", "no tokenizer.json and no tokenizer.model"),
        (lambda f: (f / "chat_template.jinja").unlink(), "chat template", "chat_template is missing"),
    ],
)
def test_the_checklist_names_the_broken_file(damage, line, found, tmp_path):
    folder = write_folder("llama2", tmp_path / "llama2")
    damage(folder)
    report = rooflama.check(folder, device="cpu")
    assert report.of(line).status in ("FAIL", "WARN")
    assert found in report.of(line).reason
    assert str(tmp_path) not in report.to_markdown()


def test_the_checklist_says_what_the_tokenizer_warns_of(tmp_path):
    folder = write_folder("llama3", tmp_path / "llama3")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False}))
    found = rooflama.check(folder, device="cpu").of("tokenizer")
    assert found.status == "WARN"
    assert found.reason.startswith("llama3/tokenizer.json: its post_processor adds BOS")


def test_the_checklist_says_what_was_odd_about_the_files(tmp_path):
    folder = write_folder("llama3", tmp_path / "llama3")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"of_my_own": False}))
    found = rooflama.check(folder, device="cpu").of("structure")
    assert found.status == "WARN"
    assert found.reason.startswith("llama3: the weights are read from model.safetensors; not read is adapter_model.saf")
    assert found.reason.endswith("not read: of_my_own")


def test_half_precision_weights_run(tmp_path):
    made = module("qwen2")
    half = AutoModelForCausalLM.from_config(made.config, dtype=torch.bfloat16)
    half.load_state_dict(made.state_dict())
    half.save_pretrained(tmp_path)
    tokenizer("qwen2").save_pretrained(tmp_path)
    with rooflama.load(tmp_path, device="cpu", dtype="float32", progress=False) as model:
        ids = model.tokenizer.encode(PROMPT)
        assert_parity(model.logits(ids), reference_logits(half.float(), ids), "bfloat16 weights")


def with_added_tokens(folder, count):
    path = write_folder("llama3", folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    flags = content["added_tokens"][0]
    content["added_tokens"] += [{**flags, "content": f"<{i}>", "id": 403 + i} for i in range(count)]
    path.write_text(json.dumps(content))
    return folder


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with_added_tokens(tmp_path, 17)
    with pytest.raises(rooflama.ConfigError, match="420 tokens, with 403 embedding rows"):
        rooflama.load(tmp_path, device="cpu", progress=False)
    found = rooflama.check(tmp_path, device="cpu").of("tokenizer")
    assert (found.status, found.reason[:37]) == ("FAIL", "420 tokens, with 403 embedding rows: ")


@pytest.mark.parametrize("count", [1, 16])
def test_a_few_tokens_without_a_row_are_never_fed(count, tmp_path):
    """A fine-tune's [PAD]: transformers runs such a model as long as nobody feeds the token."""
    with_added_tokens(tmp_path, count)
    with pytest.warns(UserWarning, match=r"403 rows for 4\d\d tokens: '<0>' \(403\).* cannot be fed or generated"):
        model = rooflama.load(tmp_path, device="cpu", progress=False)
    with model:
        ids = model.tokenizer.encode(PROMPT)
        assert_parity(model.logits(ids), reference_logits(module("llama3"), ids), "with tokens beyond the rows")
        drawn = model.generate(ids, max_new_tokens=40, temperature=1e6, seed=1).token_ids
        assert drawn
        assert max(drawn) < 403
        for ask in (model.generate, lambda text: model.logits(model.tokenizer.encode(text, parse_special=True))):
            with pytest.raises(rooflama.ArgumentError, match="token id 403: the embedding has rows for ids 0 to 402"):
                ask("walks <0>")
    assert rooflama.check(tmp_path, device="cpu").of("tokenizer").status == "WARN"


def test_commands_take_a_folder(folders):
    folder = str(folders("llama3"))
    for command in (["inspect"], ["plan"], ["run", "--max-new-tokens", "2"]):
        arguments = [command[0], folder, *(["the"] if command[0] == "run" else []), *command[1:]]
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0, done.output
