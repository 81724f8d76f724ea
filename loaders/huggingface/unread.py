"""Keys of a config.json that nothing reads: ignored if they cannot change the logits, refused if they might.

transformers ignores a key that its class for a model type does not define, but a model's own code or the next release
may read it. So such a key is ignored only if it is listed below, or holds a value that asks for nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from rooflama.kernels.errors import shorten

from .json_files import HuggingFaceError

TRAINING = {
    "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout", "dropout", "embd_pdrop",
    "ffn_dropout", "fp16", "bf16", "fp32", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob",
    "initializer_cutoff_factor", "initializer_range", "layerdrop", "loss_type", "neftune_noise_alpha",
    "output_router_logits", "pretraining_tp", "resid_pdrop", "router_aux_loss_coef", "train_seq_len", "world_size",
}  # fmt: skip
BOOKKEEPING = {
    "architectures", "auto_map", "base_model", "base_model_name_or_path", "dtype", "finetuned_from", "finetuning_task",
    "id2label", "is_llama_config", "label2id", "language", "license", "model_name", "name_or_path", "num_labels",
    "problem_type", "task_specific_params", "torch_dtype", "transformers.js_config", "transformers_version",
    "unsloth_fixed", "unsloth_version", "version",
}  # fmt: skip
EXECUTION = {
    "attn_implementation", "chunk_size_feed_forward", "experts_implementation", "flash_attn", "is_decoder",
    "is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate",
    "tf_legacy_loss", "torchscript", "use_bfloat16", "use_cache", "use_flash_attention", "use_flash_attention_2",
    "use_flash_attn", "use_return_dict",
}  # fmt: skip
TOKENS = {
    "bos_token", "bos_token_id", "chat_template", "cls_token_id", "decoder_start_token_id", "eos_token",
    "eos_token_id", "ignore_index", "mask_token_id", "pad_token", "pad_token_id", "sep_token_id", "tokenizer_class",
    "tokenizer_model_max_length", "tokenizer_padding_side", "unk_token", "unk_token_id",
}  # fmt: skip
LENGTHS = {
    "max_seq_len", "max_seq_length", "max_sequence_length", "model_max_length", "seq_len", "seq_length",
}  # fmt: skip
"""Lengths other than max_position_embeddings, which no class of transformers reads."""
GENERATION = {
    "bad_words_ids", "begin_suppress_tokens", "cache_implementation", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length", "min_p",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix",
    "remove_invalid_values", "repetition_penalty", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
"""Settings of generate() that older releases of transformers wrote into config.json."""

NO_EFFECT = TRAINING | BOOKKEEPING | EXECUTION | TOKENS | LENGTHS | GENERATION
"""Reviewed keys: none of them changes the logits, whatever its value."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "activation": ("silu", "swish", "swiglu"),
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "bias": (False,),
    "causal": (True,),
    "embedding_multiplier": (1,),
    "full_attn_mod": (1,),
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "interpolate_factor": (1,),
    "is_causal": (True,),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "position_embedding_type": ("rope", "rotary"),
    "pruned_heads": ({}, []),
    "qk_norm": (False,),
    "qkv_bias": (False,),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rope_pct": (1,),
    "rotary_pct": (1,),
    "scale_attn_weights": (True,),
    "scale_emb": (1,),
    "tie_encoder_decoder": (False,),
    "use_bias": (False,),
    "use_bidirectional_attention": (False,),
    "use_dynamic_ntk": (False,),
    "use_logn_attn": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_rms_norm": (True,),
    "use_rope": (True,),
}
"""Keys that change the logits -> the values that ask for the default computation."""

NEUTRAL_LAYERS: dict[str, object] = {"layer_types": "full_attention", "no_rope_layers": 1}
"""Keys that hold one entry per layer -> the entry that asks for the default computation."""

CHANGES_RESULT = {
    *NEUTRAL, *NEUTRAL_LAYERS, "attention_multiplier", "attn_logit_softcapping", "clip_qkv", "final_logit_softcapping",
    "query_pre_attn_scalar",
}  # fmt: skip

WINDOW_KEYS = {"max_window_layers", "sliding_window", "use_sliding_window"}
"""Keys that are ignored if a model type does not define them: fine-tunes of Mistral as ``llama`` still carry them."""


def check_unread(config: Mapping[str, Any], read: Collection[str], *, windowed: bool) -> None:
    """Ignore keys that change nothing, with a warning for names that are not listed above; refuse the others.

    Args:
        config: the parsed config.json.
        read: keys that are read elsewhere.
        windowed: whether keys among ``read`` gave layers a sliding window.

    Raises:
        HuggingFaceError: a key changes the logits, or may change them.
    """
    left = {key: value for key, value in config.items() if value is not None and key not in read}
    left = {key: value for key, value in left.items() if key not in NO_EFFECT and not key.startswith("_")}
    refused = {key: value for key, value in left.items() if not _is_neutral(key, value, windowed)}
    model_type = config.get("model_type")
    if refused:
        raise HuggingFaceError(
            f"config.json: {', '.join(f'{key} {value!r}' for key, value in refused.items())}",
            rule=f"model_type {model_type!r} does not read it, and it "
            + ("changes the result" if CHANGES_RESULT.issuperset(refused) else "may change the result"),
            remedy="Use another model, or add the key to its family (docs/ADAPTER_PATTERN_GUIDE.md); if the key "
            "does not describe the model, remove it",
        )
    if unread := sorted(key for key in left if key not in CHANGES_RESULT):
        warnings.warn(
            f"config.json has keys that model_type {model_type} does not define, and that are not read: "
            f"{shorten(', '.join(unread))}",
            stacklevel=6,
        )


def _is_neutral(key: str, value: object, windowed: bool) -> bool:
    """Whether the value asks for the default computation."""
    if key in WINDOW_KEYS:
        return True
    if key in NEUTRAL_LAYERS and isinstance(value, list):
        return all(entry == NEUTRAL_LAYERS[key] for entry in value) and not (key == "layer_types" and windowed)
    if key in CHANGES_RESULT:
        return value in NEUTRAL.get(key, ())
    return value is False or value in ("", [], {})
