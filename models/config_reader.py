"""The part of a config that all families read alike; a family's page adds its own part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from rooflama.loaders.checkpoint import MOST_LAYERS
from rooflama.loaders.gguf.metadata import place

from .config import ModelConfig
from .errors import ConfigError
from .hyperparameters import LARGEST_INTEGER, Hyperparameters
from .rope.metadata import read_local_rope, read_rope
from .rope.spec import Yarn
from .weights import CheckpointReader

HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
FACTOR_TENSORS = {
    "divisors": "rope_freqs.weight",
    "short_factors": "rope_factors_short.weight",
    "long_factors": "rope_factors_long.weight",
}


def read_decoder_config(
    reader: CheckpointReader,
    keys: Hyperparameters,
    *,
    softmax_scale: float | None = None,
    qkv_bias: bool | None = None,
    slides: Callable[[int], bool] = lambda layer: True,
    rotates: Callable[[int], bool] = lambda layer: True,
    local_rope_base: float | None = None,
    activation: str = "silu",
    harmless: Collection[str] = (),
    **declared: Any,
) -> ModelConfig:
    """The numbers of a decoder, from metadata and tensor shapes.

    Args:
        reader: the checkpoint.
        keys: its hyperparameters, of which the family has read its own.
        softmax_scale: None for 1 / sqrt(head_dim).
        qkv_bias: True if the family always has these biases; None to look for their tensors.
        slides: whether a layer has the sliding window; asked if the file names a window but not its layers.
        rotates: whether a layer rotates; asked if the file does not say.
        local_rope_base: base of an unscaled rotation for layers with a sliding window; used if the file names none.
            None for the rotation of the other layers.
        activation: of the feed-forward's gate, if the file names none; GGUF files name none.
        harmless: keys that the family knows and that change no result.
        declared: further attributes of ``ModelConfig``, by name.

    Raises:
        ConfigError: a key is missing, out of range, contradicts another or the tensors, or is unknown.
        RopeError: the rotary parameters describe no rotation.
    """
    hidden_size = keys.integer("embedding_length")
    num_heads = keys.integer("attention.head_count")
    head_dim = _head_dim(keys, hidden_size, num_heads)
    context_length = keys.integer("context_length")
    rope = read_rope(keys, head_dim=head_dim, context_length=context_length, **_factors(reader, keys, head_dim))
    local_rope = read_local_rope(keys, rope, context_length=context_length, base=local_rope_base)
    if isinstance(rope.scaling, Yarn):  # some files state the context before YaRN, others the one it reaches
        context_length = max(context_length, min(int(rope.scaling.reach(context_length)), LARGEST_INTEGER))
    config = ModelConfig(
        architecture=keys.architecture,
        name=_printable(str(reader.checkpoint.metadata.get("general.name", "unnamed"))),
        num_layers=(num_layers := keys.integer("block_count", maximum=MOST_LAYERS)),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=_vocab_size(reader, keys),
        context_length=context_length,
        rms_norm_eps=keys.real("attention.layer_norm_rms_epsilon"),
        softmax_scale=softmax_scale or head_dim**-0.5,
        rope=rope,
        sliding_windows=_sliding_windows(keys, num_layers, slides),
        tied_embeddings=not reader.has("output.weight"),
        qkv_bias=_any(reader, "attn_q.bias", "attn_qkv.bias") if qkv_bias is None else qkv_bias,
        output_bias=_any(reader, "attn_output.bias"),
        ffn_bias=_any(reader, "ffn_down.bias"),
        local_rope=local_rope,
        unrotated_layers=_unrotated_layers(keys, num_layers, rotates),
        activation=_activation(keys, activation),
        **declared,
    )
    keys.refuse_unread(("rope.scaling.finetuned", *harmless))
    return config


def _printable(text: str) -> str:
    """``text`` with control codes escaped, so that it can be shown in a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _any(reader: CheckpointReader, *names: str) -> bool:
    """Whether the first layer has one of these tensors; loading checks that all layers are alike."""
    return any(reader.has(f"blk.0.{name}") for name in names)


def _vocab_size(reader: CheckpointReader, keys: Hyperparameters) -> int:
    """Rows of the token embedding. Raises ConfigError unless the metadata's number and the vocabulary agree with it."""
    info = reader.checkpoint.tensors.get("token_embd.weight")
    rows = info.shape[0] if info is not None else keys.integer("vocab_size")
    tokens = keys.metadata.get(key := "tokenizer.ggml.tokens", ())
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise ConfigError(
            f"{place(keys.metadata, key)}{key} is {tokens!r}",
            rule="it must be an array of strings, one for each token",
            remedy="The file is damaged or was converted wrongly; convert it again",
        )
    if keys.integer("vocab_size", rows) != rows or len(tokens) > rows:
        keys.refuse(
            "vocab_size",
            f"vocab_size {keys.integer('vocab_size', rows)} and {len(tokens)} tokens, with {rows} embedding rows",
            "the embedding has vocab_size rows, one for each token and further ones as padding",
            "The file's metadata and tensors disagree; convert it again",
        )
    return rows


def _head_dim(keys: Hyperparameters, hidden_size: int, num_heads: int) -> int:
    if not keys.has("attention.key_length") and hidden_size % num_heads:
        keys.refuse(
            "attention.head_count",
            f"embedding_length {hidden_size} with {num_heads} heads and no attention.key_length",
            "without key_length, a head has embedding_length / head_count dimensions",
            "Convert the checkpoint again with a current converter",
        )
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    value_dim = keys.integer("attention.value_length", head_dim)
    if value_dim != head_dim:
        keys.refuse(
            "attention.value_length",
            f"attention.key_length {head_dim} and attention.value_length {value_dim}",
            "keys and values have one head_dim",
            "Use a model where they agree",
        )
    return head_dim


def _activation(keys: Hyperparameters, default: str) -> str:
    """``ModelConfig.activation``, from transformers' name of it."""
    name = keys.text("feed_forward.activation", None)
    if name is None:
        return default
    if name not in HF_ACTIVATIONS:
        keys.refuse(
            "feed_forward.activation",
            f"activation {name!r}",
            f"the feed-forward's gate is one of {', '.join(HF_ACTIVATIONS)}",
            "Use another model, or add the activation to kernels/mlp.py",
        )
    return HF_ACTIVATIONS[name]


def _factors(reader: CheckpointReader, keys: Hyperparameters, head_dim: int) -> dict[str, tuple[float, ...] | None]:
    """The rotary factor tensors of the file, each with one number per pair."""
    num_pairs = keys.integer("rope.dimension_count", head_dim) // 2
    return {
        argument: tuple(reader.host_vector(name, num_pairs).tolist()) if reader.has(name) else None
        for argument, name in FACTOR_TENSORS.items()
    }


def _unrotated_layers(keys: Hyperparameters, num_layers: int, rotates: Callable[[int], bool]) -> frozenset[int]:
    """Layers without rotation, from ``rope.layers``, or from ``rotates`` if the file lacks that key."""
    default = tuple(rotates(layer) for layer in range(num_layers))
    rotated = keys.booleans("rope.layers", default, length=num_layers)
    return frozenset(layer for layer, rotating in enumerate(rotated) if not rotating)


def _sliding_windows(keys: Hyperparameters, num_layers: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """One window per layer, by ``sliding_window_pattern``, or by ``slides`` if the file lacks that key."""
    window = keys.integer("attention.sliding_window", 0, minimum=0)
    default = tuple(slides(layer) for layer in range(num_layers))
    pattern = keys.booleans("attention.sliding_window_pattern", default, length=num_layers)
    return tuple(window if sliding else 0 for sliding in pattern)
