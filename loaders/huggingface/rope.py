"""Gathering the rotary parameters of a config.json from the places where transformers looks for them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from .json_files import HuggingFaceError


def rope_arguments(config: Mapping[str, Any], *, partial_rotary: bool) -> dict[str, Any]:
    """The arguments for ``rope_from_hf`` that the config contains.

    Args:
        config: the parsed config.json.
        partial_rotary: whether this model type can rotate part of a head.

    Raises:
        HuggingFaceError: there are two sets of parameters and the one that counts lacks the base, or the config asks
            for a partial rotation with which transformers fails.
    """
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and old != new:
        both = isinstance(old, Mapping) and isinstance(new, Mapping)
        if both and "rope_theta" in new and "rope_theta" not in {*old, *config}:
            raise HuggingFaceError(
                "config.json: rope_scaling and rope_parameters that differ, and rope_theta only in rope_parameters",
                rule="transformers takes rope_scaling alone, and with it the default rope_theta",
                remedy="Move the intended values into rope_parameters and remove rope_scaling",
            )
        _warn("rope_scaling and rope_parameters differ: rope_scaling counts, as in transformers")
    parameters = old or new
    part = config.get("partial_rotary_factor")
    if isinstance(parameters, Mapping) and config["model_type"] == "phi3":
        renamed = {key: "longrope" for key in ("rope_type", "type") if parameters.get(key) == "yarn"}
        parameters = {**parameters, **renamed}  # the first Phi-3 configs say yarn and mean LongRoPE
    if not partial_rotary:
        parameters, part = _whole_heads(parameters, part), None
    return {
        "rope_parameters": parameters,
        "theta": config.get("rope_theta"),
        "partial_rotary_factor": part,
        "original_max_position_embeddings": config.get("original_max_position_embeddings"),
    }


def _whole_heads(parameters: Any, outer: Any) -> Any:
    """The parameters without ``partial_rotary_factor``, for a model type that does not define it.

    Without scaling, transformers rotates whole heads of such a model; with scaling, it fails.
    """
    given = parameters if isinstance(parameters, Mapping) else {}
    part = outer if given.get("partial_rotary_factor") is None else given["partial_rotary_factor"]
    if part in (None, 1):
        return parameters
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind != "default":
        raise HuggingFaceError(
            f"config.json: partial_rotary_factor {part!r} with rope_type {kind!r}",
            rule="models of this type rotate whole heads",
            remedy="Remove partial_rotary_factor, or use a model of another type",
        )
    _warn(f"partial_rotary_factor is {part!r}, but models of this type rotate whole heads: it changes nothing")
    return {key: value for key, value in given.items() if key != "partial_rotary_factor"}


def _warn(message: str) -> None:
    warnings.warn(f"config.json: {message}", stacklevel=6)
