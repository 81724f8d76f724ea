"""``hf:`` references against a local Hub: what is downloaded, what comes from the cache, and every failure."""

import errno
import os
import re
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest

import rooflama
from hub_server import Repository, files_of, serving
from rooflama import warming
from rooflama.loaders.gguf.errors import GGUFError
from rooflama.loaders.gguf.parse import parse_header
from rooflama.loaders.huggingface.hub import HubError, HubUnreachableError, NotOnHubError, fetch
from rooflama.loaders.huggingface.json_files import HuggingFaceError
from rooflama.loaders.opening import open_checkpoint
from rooflama.loaders.text import open_tokenizer
from small_checkpoint import Parts
from whole_checkpoints import write_folder

EXTRAS = {
    "pytorch_model.bin": b"pickled",
    "consolidated.safetensors": b"another layout",
    "original/model.safetensors": b"another layout",
    "original/params.json": b"{}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools|length }}",
    "README.md": b"",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a folder, of one GGUF file, and of a split set."""
    folder = write_folder("llama3", tmp_path_factory.mktemp("hub") / "folder")
    small = Parts().write(folder.parent / "small.gguf").read_bytes()
    return files_of(folder) | EXTRAS, {"small.gguf": small, "q8/other.gguf": b"GGUF", "config.json": b"{}"}


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """The library reads environment variables when it is imported, which has already happened here."""
    with serving() as served:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between retries
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name, content in zip(("owner/folder", "owner/gguf"), files, strict=True):
            served.repositories[name] = Repository()
            served.repositories[name].commit(content, "v1")
        yield served


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_folder_comes_without_other_formats_and_opens_again_offline(hub, offline, files):
    with open_checkpoint("hf:owner/folder") as checkpoint:
        assert checkpoint.name == checkpoint.metadata["general.name"] == "folder"
        assert open_tokenizer(checkpoint).vocab_size == 403
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    wanted |= {"tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    assert hub.downloaded() == wanted
    (path, name) = fetch("hf:owner/folder")
    assert (name, set(files_of(path))) == ("folder", wanted)
    assert (path / "model.safetensors").read_bytes() == files[0]["model.safetensors"]
    offline()
    hub.requests.clear()
    assert fetch("hf:owner/folder") == (path, "folder")
    assert rooflama.inspect("hf:owner/folder").config.num_layers == 2
    assert not hub.requests


def test_an_answer_from_the_cache_is_not_downloaded_again(hub):
    fetch("hf:owner/folder")
    hub.requests.clear()
    fetch("hf:owner/folder")
    assert not hub.downloaded()


@pytest.mark.parametrize("reference", ["hf:owner/folder", "hf:owner/gguf@v1:small.gguf"])
def test_a_model_runs_and_runs_again_offline(reference, hub, offline, numpy_backend):
    said = []
    for _ in range(2):
        with rooflama.load(reference, device="cpu", progress=False) as model:
            said.append(model.generate("the roof", max_new_tokens=4).token_ids)
        offline()
        hub.requests.clear()
    assert said[0] == said[1]
    assert not hub.requests
    report = rooflama.check(reference, device="cpu")
    assert {result.status for result in report.results} <= {"PASS", "WARN"}
    assert "cache" not in report.to_markdown()


def test_the_checklist_reports_what_cannot_be_fetched(hub):
    report = rooflama.check("hf:owner/nothing", device="cpu")
    assert report.of("structure").status == "FAIL"
    assert "no repository 'owner/nothing'" in report.of("structure").reason


def test_one_gguf_file_comes_alone_and_opens_again_offline(hub, offline):
    open_checkpoint("hf:owner/gguf:small.gguf").close()
    assert hub.downloaded() == {"small.gguf"}
    said = dict(rooflama.inspect("hf:owner/gguf:small.gguf").rows())
    assert said["file"].startswith("small.gguf, ")
    offline()
    assert dict(rooflama.inspect("hf:owner/gguf:small.gguf").rows()) == said


def test_a_file_in_a_folder_of_the_repository(hub):
    path, name = fetch("hf:owner/gguf:q8/other.gguf")
    assert (path.read_bytes(), name) == (b"GGUF", "other.gguf")


def test_a_split_set_comes_whole(hub):
    names = [f"big-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    hub.repositories["owner/gguf"].commit({name: name.encode() for name in names})
    path, _ = fetch(f"hf:owner/gguf:{names[0]}")
    assert sorted(file.name for file in path.parent.iterdir()) == names


def test_a_tokenizer_comes_without_the_weights(hub, offline):
    assert rooflama.load_tokenizer("hf:owner/folder").vocab_size == 403
    assert "model.safetensors" not in hub.downloaded()
    offline()
    with pytest.raises(HubUnreachableError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        open_checkpoint("hf:owner/folder")


def test_a_pinned_revision_stays_what_it_is(hub, files, offline):
    repository = hub.repositories["owner/folder"]
    old = repository.names["v1"]
    changed = files[0] | {"generation_config.json": b'{"eos_token_id": 7}'}
    new = repository.commit(changed)
    assert rooflama.load_tokenizer("hf:owner/folder").eos_ids == {7, 401}
    assert rooflama.load_tokenizer("hf:owner/folder@v1").eos_ids == {401}
    hub.requests.clear()
    assert rooflama.load_tokenizer(f"hf:owner/folder@{old}").eos_ids == {401}
    assert not hub.requests  # for a commit hash in the cache, the Hub is not contacted
    path, _ = fetch(f"hf:owner/folder@{new}")
    assert path.name == new
    offline()
    assert rooflama.load_tokenizer("hf:owner/folder@v1").eos_ids == {401}
    assert fetch(f"hf:owner/folder@{new}")[0] == path


def test_a_private_repository_opens_with_a_token(hub, monkeypatch):
    hub.repositories["owner/folder"].token = "secret"
    with pytest.raises(NotOnHubError, match="for a private one set HF_TOKEN"):
        fetch("hf:owner/folder")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert fetch("hf:owner/folder")[1] == "folder"


@pytest.mark.parametrize(
    ("reference", "kind", "message"),
    [
        ("hf:owner/nothing", NotOnHubError, "no repository 'owner/nothing': the repository exists and is public"),
        ("hf:owner/nothing:small.gguf", NotOnHubError, "no repository 'owner/nothing'"),
        ("hf:owner/folder@v9", NotOnHubError, "no revision 'v9': a revision is a branch, a tag or a commit"),
        ("hf:owner/gguf@v9:small.gguf", NotOnHubError, "no revision 'v9'"),
        (f"hf:owner/folder@{'0' * 40}", NotOnHubError, "no revision '000"),
        ("hf:owner/gguf:big.gguf", NotOnHubError, "no file 'big.gguf': the file is in the repository at"),
        ("hf:owner/gguf:big.gguf", NotOnHubError, "Its .gguf files are small.gguf, q8/other.gguf."),
        ("hf:owner/folder:big.gguf", NotOnHubError, "Its .gguf files are none."),
        ("hf:owner/gguf", NotOnHubError, "q8/other.gguf: name one, as in hf:owner/gguf:FILE"),
        ("hf:owner", HubError, "not a reference: a reference is hf:owner/repo, hf:owner/repo@revision or"),
        ("hf:", HubError, "not a reference"),
        ("hf:a/b/c", HubError, "not a reference"),
        ("hf:owner/gguf:config.json", HubError, "Name a .gguf file, or none for the safetensors"),
        ("hf:owner/gguf:../x.gguf", HubError, "file '../x.gguf'"),
        ("hf:owner--x/gguf..", HubError, "Check the name"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused(hub, reference, kind, message):
    with pytest.raises(HubError, match=re.escape(message)) as caught:
        fetch(reference)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(reference)
    assert "\n" not in str(caught.value)


def test_a_restricted_repository_is_refused(hub):
    hub.repositories["owner/folder"].gated = True
    with pytest.raises(NotOnHubError, match=r"access to the repository is restricted: .* Request it at https://"):
        fetch("hf:owner/folder")


def test_a_repository_of_other_formats_is_refused(hub):
    hub.repositories["owner/folder"].commit({"config.json": b"{}", "pytorch_model.bin": b""})
    with pytest.raises(NotOnHubError, match=r"no safetensors in the repository: .* files are none\.$"):
        fetch("hf:owner/folder")
    hub.repositories["owner/folder"].commit({"README.md": b""})
    with pytest.raises(NotOnHubError, match=r"no safetensors in the repository"):
        fetch("hf:owner/folder")


@pytest.mark.parametrize("reference", ["hf:owner/folder", "hf:owner/gguf:small.gguf", f"hf:owner/folder@{'0' * 40}"])
@pytest.mark.parametrize("way", ["offline", "no network", "server error"])
def test_what_cannot_be_had_is_refused(way, reference, hub, offline, monkeypatch):
    if way == "offline":
        offline()
    elif way == "server error":
        hub.broken = True
    else:
        nowhere = "http://127.0.0.1:1"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
        template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    said = {
        "offline": "HF_HUB_OFFLINE is set",
        "no network": "available from http://127.0.0.1:1",
        "server error": "not available from",
    }
    with pytest.raises(HubUnreachableError, match=said[way]) as caught:
        fetch(reference)
    assert "\n" not in str(caught.value)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=re.escape("Run: pip install 'rooflama[hub]'")):
        rooflama.inspect("hf:owner/repo")


# Headers alone


@pytest.fixture
def small_requests(monkeypatch):
    """The headers are longer than the first request."""
    monkeypatch.setattr("rooflama.loaders.huggingface.hub_headers.FIRST_BYTES", 1024)


def header_nbytes(content):
    return 8 + int.from_bytes(content[:8], "little")


def said_of(source):
    plan = rooflama.plan_memory(source, device="cpu", context=64)
    return rooflama.inspect(source), plan.total_bytes


def test_inspect_and_plan_fetch_the_header_of_a_folder(hub, files, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(files[0][name])
    assert said_of("hf:owner/folder") == said_of(tmp_path / "folder")
    assert hub.downloaded() == {"config.json", "model.safetensors"}
    assert hub.served["model.safetensors"] == 2 * header_nbytes(files[0]["model.safetensors"])
    assert not list(tmp_path.rglob("cache/**/model.safetensors"))


def test_of_shards_each_header_is_fetched(hub, tmp_path):
    folder = write_folder("llama3", tmp_path / "sharded", max_shard_size="60KB")
    content = files_of(folder)
    shards = [name for name in content if name.endswith(".safetensors")]
    assert len(shards) > 2
    hub.repositories["owner/sharded"] = Repository()
    hub.repositories["owner/sharded"].commit(content | {"consolidated.safetensors": b"another layout"})
    assert said_of("hf:owner/sharded") == said_of(folder)
    assert {name: hub.served[name] for name in shards} == {name: 2 * header_nbytes(content[name]) for name in shards}
    assert not hub.served["consolidated.safetensors"] + hub.served["tokenizer.json"]


@pytest.mark.usefixtures("small_requests")
def test_inspect_and_plan_fetch_the_header_and_the_rotary_factors_of_a_gguf_file(hub, tmp_path):
    parts = Parts()
    parts.weights["rope_freqs.weight"] = np.linspace(1, 8, 8, dtype=np.float32)  # after the weights
    path = parts.write(tmp_path / "divisors.gguf")
    content = path.read_bytes()
    hub.repositories["owner/gguf"].commit({"q8/divisors.gguf": content})
    local = said_of(path)
    assert local[0].config.rope.frequency_divisors == tuple(np.linspace(1, 8, 8, dtype=np.float32).tolist())
    assert said_of("hf:owner/gguf:q8/divisors.gguf") == local
    data_start = min(info.offset for info in parse_header(memoryview(content), "divisors").tensors.values())
    assert data_start > 4096
    assert hub.served["divisors.gguf"] < 2 * (2 * data_start + 32 + 1)
    assert not list(tmp_path.rglob("cache/**/*.gguf"))


def test_headers_of_a_split_set(hub, tmp_path):
    names = [f"big-{i:05d}-of-00002.gguf" for i in (1, 2)]
    Parts().write(tmp_path / "big.gguf", split_max_tensors=12)
    hub.repositories["owner/gguf"].commit({name: (tmp_path / name).read_bytes() for name in names})
    assert said_of(f"hf:owner/gguf:{names[0]}") == said_of(tmp_path / names[0])
    assert hub.downloaded() == set(names)


def test_what_the_cache_has_whole_is_inspected_there(hub, offline):
    open_checkpoint("hf:owner/folder").close()
    hub.requests.clear()
    said = said_of("hf:owner/folder")
    assert not hub.downloaded()
    offline()
    assert said_of("hf:owner/folder") == said


@pytest.mark.parametrize("content", [b"GGUF" + bytes(5000), b"other" * 1000, b"x"])
@pytest.mark.usefixtures("small_requests")
def test_a_damaged_header_is_refused_as_on_this_machine(content, hub, files, tmp_path, monkeypatch):
    monkeypatch.setattr("rooflama.loaders.huggingface.hub_headers.MOST_BYTES", 2048)
    (tmp_path / "damaged.gguf").write_bytes(content)
    hub.repositories["owner/gguf"].commit({"damaged.gguf": content})
    hub.repositories["owner/folder"].commit({**files[0], "model.safetensors": content})
    with pytest.raises(GGUFError) as local:
        rooflama.inspect(tmp_path / "damaged.gguf")
    with pytest.raises(GGUFError, match=re.escape(local.value.rule)):
        rooflama.inspect("hf:owner/gguf:damaged.gguf")
    with pytest.raises(HuggingFaceError, match=r"model\.safetensors: "):
        rooflama.inspect("hf:owner/folder")
    assert hub.served["damaged.gguf"] <= 2048


def test_a_server_that_sends_files_whole_is_refused(hub):
    hub.ranges = False
    for reference, name in (("hf:owner/folder", "model.safetensors"), ("hf:owner/gguf:small.gguf", "small.gguf")):
        with pytest.raises(HubError, match=f"{name} is sent whole in answer to a request for its header"):
            rooflama.inspect(reference)


def test_a_file_without_room_is_refused(hub, monkeypatch):
    def full(*_):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr("rooflama.loaders.huggingface.hub_headers.lay_out", full)
    with pytest.raises(HubError, match=r"no room for small\.gguf, of \d+ bytes, in .* \(File too large\)"):
        rooflama.inspect("hf:owner/gguf:small.gguf")


def test_the_environment_counts_as_the_library_has_it(hub, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, in a fresh process."""

    def inspect(**variables):
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "COLUMNS": "200"}
        command = [sys.executable, "-m", "rooflama", "inspect", "hf:owner/gguf:small.gguf"]
        for inherited in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            environment.pop(inherited, None)
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=120)

    refused = inspect(HF_HUB_OFFLINE="1")
    assert refused.returncode == 2
    assert "HF_HUB_OFFLINE is set" in refused.stderr
    assert not hub.requests
    assert "GQA: 4 query heads" in inspect().stdout
    assert (tmp_path / "home/hub/models--owner--gguf/snapshots").is_dir()
    rooflama.load_tokenizer("hf:owner/gguf:small.gguf")
    hub.requests.clear()
    assert "GQA: 4 query heads" in inspect(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "cache")).stdout
    assert not hub.requests


@pytest.mark.parametrize("reference", ["hf:owner/folder", "hf:owner/gguf:small.gguf"])
def test_warm_reads_headers_and_the_tokenizer(hub, monkeypatch, tmp_path, reference):
    """Nothing is compiled here, since this process may interpret its kernels."""
    monkeypatch.setattr(warming, "INTERPRETED", False)
    monkeypatch.setattr(warming, "compile_launches", lambda launches, device, progress: len(launches))
    assert rooflama.warm(reference, target="sm_90", dtype="float16").kernels > 10
    assert not list(tmp_path.rglob("cache/**/*.safetensors")) + list(tmp_path.rglob("cache/**/*.gguf"))
