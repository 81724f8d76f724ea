"""Checks of a checkpoint that need only its file: structure, numbers, tensors, weights, RoPE, tokenizer, template."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from torch.distributed import ProcessGroup

from rooflama.kernels import LAYOUTS, reference
from rooflama.loaders.checkpoint import Checkpoint
from rooflama.loaders.gguf.repack import repack
from rooflama.loaders.opening import Location, locate
from rooflama.loaders.text import Tokenizer, open_tokenizer
from rooflama.models import Adapter, CheckpointReader, ConfigError, ModelConfig, checkpoint_weights, rope_tables
from rooflama.models.memory.amounts import size
from rooflama.models.parallel import ranks_of
from rooflama.models.share import ALONE, Share

from ..loading import check_vocabulary, load
from ..model import Model
from ..planning import adapter_of

CONTEXT = 256  # tokens that the model is loaded for
LAYOUT_ROWS = 64  # rows of each tensor type that are repacked and compared

ROUND_TRIPS = (
    "Hello, world! It's 2026, isn't it?",
    "  indented\n\ttabs\n\n\nand blank lines  ",
    "größe, naïve, Ελλάδα, Привет, 漢字かな, العربية, 🙂👩‍🚀",
    "def f(x):\n    return x ** 2  # 3.14159e-10\n",
)


Status = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """The result of a check."""

    status: Status
    reason: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Subject:
    """The checkpoint under test. Each part is made once, by the first check that uses it."""

    source: str
    device: str
    limit: int | None
    stack: ExitStack
    tensor_parallel: bool | ProcessGroup = False

    @cached_property
    def share(self) -> Share:
        """Of this rank."""
        ranks = ranks_of(self.tensor_parallel)
        return ALONE if ranks is None else ranks.share

    @cached_property
    def location(self) -> Location:
        return locate(self.source)

    @property
    def name(self) -> str:
        """Its name, whether it was found or not."""
        found: Location | None = vars(self).get("location")
        return found.name if found else Path(self.source).name

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that were found."""
        opened: Checkpoint | None = vars(self).get("file")
        found: Location | None = vars(self).get("location")
        return opened.paths if opened else (found.path,) if found and found.path.is_file() else ()

    def without_path(self, text: str) -> str:
        """``text`` with the name instead of the path, and without the folder."""
        found: Location | None = vars(self).get("location")
        path = found.path if found else Path(self.source)
        text = text.replace(self.source, self.name).replace(str(path), self.name)
        return text if path.parent == Path() else text.replace(f"{path.parent}{os.sep}", "")

    @cached_property
    def file(self) -> Checkpoint:
        return self.stack.enter_context(self.location.open())

    @cached_property
    def reader(self) -> CheckpointReader:
        return CheckpointReader(self.file)

    @cached_property
    def adapter(self) -> Adapter:
        return adapter_of(self.file)

    @cached_property
    def config(self) -> ModelConfig:
        return self.adapter.read_config(self.reader)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.file)

    @cached_property
    def model(self) -> Model:
        """The model on the device, with a short context."""
        context = min(CONTEXT, self.config.context_length)
        path = self.location.path
        model = load(
            path,
            device=self.device,
            max_context=context,
            memory_limit=self.limit,
            tensor_parallel=self.tensor_parallel,
            progress=False,
        )
        return self.stack.enter_context(model)


def structure(subject: Subject) -> Finding:
    """Every count, length, offset and type in the headers of its files is valid."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        file = subject.file
    details = {"metadata": {name: _short(value) for name, value in file.metadata.items()}}
    number = f"{len(file.paths)} file{'s' * (len(file.paths) > 1)}"
    said = f"{len(file.metadata)} keys, {len(file.tensors)} tensors, {size(file.file_nbytes)} in {number}"
    if notes:
        return Finding("WARN", "; ".join(str(note.message) for note in notes), details)
    return Finding("PASS", f"{file.format}, {said}", details)


def _short(value: Any, characters: int = 200, items: int = 8) -> Any:
    """A value for the report; long arrays and texts are cut."""
    if isinstance(value, str):
        return value if len(value) <= characters else f"{value[:characters]}... ({len(value)} characters)"
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {name: _short(inner) for name, inner in value.items()}
    shown = [item.item() if isinstance(item, np.generic) else item for item in value[:items]]
    return shown if len(value) <= items else f"{shown} and {len(value) - items} more"


def config(subject: Subject) -> Finding:
    """The metadata describes a model that an adapter knows, and its numbers agree."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        c = subject.config
    details = {name: str(value) for name, value in vars(c).items() if name != "sliding_windows"}
    if said:
        return Finding("WARN", "; ".join(str(warning.message) for warning in said), {"config": details})
    return Finding(
        "PASS",
        f"architecture {c.architecture}: {c.num_layers} layers, hidden {c.hidden_size}, {c.attention_kind} with "
        f"{c.num_heads} query and {c.num_kv_heads} key/value heads of {c.head_dim}, context {c.context_length:,}, "
        f"vocabulary {c.vocab_size:,}",
        {"config": details},
    )


def tensors(subject: Subject) -> Finding:
    """The file has every tensor that the model needs, with its shape and a supported type, and no other."""
    checkpoint_weights(subject.reader, subject.config, subject.adapter, "triton", subject.share)
    counts, nbytes = Counter[str](), Counter[str]()
    for info in subject.file.tensors.values():
        counts[info.ggml_type] += 1
        nbytes[info.ggml_type] += info.nbytes
    kinds = ", ".join(f"{counts[kind]} {kind} ({size(nbytes[kind])})" for kind in counts)
    return Finding("PASS", f"{counts.total()} tensors, each in its place: {kinds}", {"bytes": dict(nbytes)})


def layout(subject: Subject) -> Finding:
    """Rows of every type, repacked and then dequantised, equal the gguf package's dequantisation in every bit."""
    checked: Counter[str] = Counter()
    for name, info in subject.file.tensors.items():
        if checked[info.ggml_type] >= LAYOUT_ROWS:
            continue
        rows = subject.file.data(name)[:LAYOUT_ROWS]
        ours = reference.dequantize(repack(rows, info.ggml_type, info.shape[-1]).numpy())
        theirs = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[info.ggml_type])
        if not np.array_equal(ours, theirs.reshape(ours.shape), equal_nan=True):
            return Finding("FAIL", f"tensor {name} ({info.ggml_type}) does not survive repacking: please report it")
        checked[info.ggml_type] += len(rows)
    plain = checked.keys() <= {"F32", "F16", "BF16"}
    said = "no tensor is quantised; " if plain else ""
    rows_of_types = ", ".join(f"{n} rows {kind}" for kind, n in checked.items())
    return Finding("PASS", f"{said}bit-equal to gguf's dequantisation: {rows_of_types}")


def weights(subject: Subject) -> Finding:
    """No scale and no unquantised weight is NaN or infinite, and no tensor is all zeros."""
    bad: dict[str, str] = {}
    empty: list[str] = []
    for name, info in subject.file.tensors.items():
        if info.ggml_type not in LAYOUTS:
            continue
        finite, zero = _scan(subject.file.data(name), info.ggml_type, info.shape[-1])
        if not finite.all():
            row = int(np.argmin(finite))
            bad[name] = f"tensor {name} ({info.ggml_type}) holds NaN or infinity, first in row {row}"
        elif zero:
            empty.append(name)
    details = {"not finite": list(bad), "zero": empty}
    if bad:
        more = f", and {len(bad) - 1} tensors more" if len(bad) > 1 else ""
        return Finding(
            "FAIL", f"{next(iter(bad.values()))}{more}: the file is damaged or was quantised wrongly", details
        )
    if empty:
        return Finding("WARN", f"every weight of tensor {empty[0]} is 0: it may not have been written", details)
    return Finding("PASS", f"{len(subject.file.tensors)} tensors finite, none zero throughout", details)


def _scan(raw: np.ndarray, ggml_type: str, columns: int) -> tuple[np.ndarray, bool]:
    """(whether each row is finite, bool [rows]; whether all is 0), of uint8 [rows, bytes per row].

    Of a quantised row only the float16 scales and minima can be infinite or NaN.
    """
    finite, zero = np.ones(len(raw), bool), True
    for start in range(0, len(raw), 4096):
        rows = slice(start, start + 4096)
        for plane in repack(raw[rows], ggml_type, columns).planes:
            if plane.is_floating_point():
                finite[rows] &= plane.isfinite().all(1).numpy()
                zero &= not plane.any()
    return finite, zero


def rope(subject: Subject) -> Finding:
    """The rotary tables are finite and of one magnitude, and the base and divisors are in the usual range."""
    config = subject.config
    spec = config.rope
    rows = min(config.context_length, 4096)
    for factor_set in ("short", "long") if spec.kind == "longrope" else (None,):
        cos, sin = (table.astype(np.float64) for table in rope_tables(spec, rows, factor_set=factor_set))
        magnitude = np.sqrt(cos**2 + sin**2)
        if not np.allclose(magnitude, magnitude[0, 0], rtol=1e-5) or not 0.5 < magnitude[0, 0] < 4:
            return Finding("FAIL", f"rotary tables of {spec.describe()} do not rotate: magnitude {magnitude.min():.3g}")
    details = {"rope": spec.describe()}
    divisors = spec.frequency_divisors
    if spec.base < 1000:
        return Finding("WARN", f"rope.freq_base is {spec.base:g}; models are trained with 10,000 and more", details)
    if divisors is not None and (min(divisors) < 0.5 or max(divisors) > 128):
        return Finding(
            "WARN", f"rope_freqs.weight spans {min(divisors):g} to {max(divisors):g}, 1 to 32 is usual", details
        )
    return Finding("PASS", spec.describe(), details)


def tokenizer(subject: Subject) -> Finding:
    """The vocabulary is valid, has a row for each token, and texts survive encoding and decoding."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokens = subject.tokenizer
        info = subject.file.tensors.get("token_embd.weight")
        rows = info.shape[0] if info is not None else tokens.vocab_size
        try:
            check_vocabulary(tokens, rows)
        except ConfigError as error:
            return Finding("FAIL", str(error))
    for text in ROUND_TRIPS:
        ids = tokens.encode(text, add_special=False)
        back = tokens.decode(ids)
        if back.removeprefix(" ") != text.removeprefix(" "):
            lost = tokens.unk_id is not None and tokens.unk_id in ids
            return Finding(
                "WARN" if lost else "FAIL",
                f"{text!r} comes back as {back!r}" + (": its vocabulary cannot spell all of it" if lost else ""),
                {"ids": ids},
            )
    details = {
        "bos": tokens.bos_id,
        "eos": sorted(tokens.eos_ids),
        "add_bos": tokens.add_bos,
        "add_eos": tokens.add_eos,
    }
    if not tokens.eos_ids:
        return Finding("WARN", "no token ends a generation: the files name no EOS", details)
    if said:
        return Finding("WARN", "; ".join(str(warning.message) for warning in said), details)
    padding = f", {rows - tokens.vocab_size} rows of padding" if rows > tokens.vocab_size else ""
    ends = ", ".join(repr(tokens.tokens[i]) for i in sorted(tokens.eos_ids)[:4])
    return Finding("PASS", f"{tokens!r}{padding}, {len(ROUND_TRIPS)} texts come back, ends with {ends}", details)


def chat_template(subject: Subject) -> Finding:
    """A rendered conversation holds the user's text, begins the answer, and has at most one BOS."""
    tokens = subject.tokenizer
    if tokens.chat_template is None:
        return Finding(
            "WARN", "tokenizer.chat_template is missing: the model continues text, and `chat` needs a template"
        )
    said = "What is 6 times 7?"
    messages = [{"role": "user", "content": said}]
    text = tokens.apply_chat_template(messages)
    ids = tokens.encode_chat(messages)
    bos = ids.count(tokens.bos_id) if tokens.bos_id is not None and tokens.add_bos else 0
    details = {"rendered": _short(text, characters=2000), "ids": _short(ids, items=500)}
    if said not in text:
        return Finding("FAIL", "tokenizer.chat_template drops what the user said", details)
    if bos > 1:
        return Finding(
            "FAIL", f"a conversation begins with {bos} BOS tokens: the template and the tokenizer both add it", details
        )
    if text == tokens.apply_chat_template(messages, add_generation_prompt=False):
        return Finding("WARN", "tokenizer.chat_template ignores add_generation_prompt, so no answer is opened", details)
    return Finding(
        "PASS", f"renders {len(messages)} message as {len(ids)} tokens, answer opened by {text[-24:]!r}", details
    )
