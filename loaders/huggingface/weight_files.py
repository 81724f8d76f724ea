"""Choosing the files of a Hugging Face folder that hold the weights, in the order of transformers.

1. The file that config.json names under ``transformers_weights``.
2. ``model.safetensors``, even if other files lie beside it.
3. The files that ``model.safetensors.index.json`` names.

transformers refuses a folder with none of these. Here it is read if there is no choice to make: it holds one complete
set ``model-0000i-of-0000n.safetensors``, or one safetensors file.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from .json_files import HuggingFaceError, read_json, refuse

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
OTHER_FORMATS = re.compile(r"consolidated(\.|-).*")
"""The same weights in Mistral's and Meta's own layout, published beside those for transformers."""
RULE = "a folder holds config.json and model.safetensors"


def weight_files(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files to read, all of which exist. Warns about other files that could be mistaken for the weights.

    Raises:
        HuggingFaceError: there are no weights, a file is missing, or the choice is ambiguous.
    """
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    named = config.get("transformers_weights")
    if named is not None:
        chosen = _named(folder, named)
    elif (folder / SINGLE).is_file():
        chosen = [SINGLE]
    elif (folder / INDEX).is_file():
        chosen = _indexed(folder / INDEX)
    else:
        chosen = _only_choice(folder, present)
    _warn_of_others(folder, chosen, present)
    return [folder / name for name in chosen]


def _named(folder: Path, named: object) -> list[str]:
    endings = (".safetensors", ".safetensors.index.json")
    if not isinstance(named, str) or Path(named).name != named or not named.endswith(endings):
        refuse(
            folder / "config.json",
            f"transformers_weights {named!r}",
            "it names a safetensors file or an index beside config.json",
            "Do not use this checkpoint",
        )
    if named.endswith(".json"):
        return _indexed(folder / named)
    if not (folder / named).is_file():
        refuse(folder, f"{named} is missing", "config.json names it as the weights", "Download it too")
    return [named]


def _indexed(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(index, "no weight_map", "an index names the file of each tensor")
    names = _beside(index, weight_map)
    for name in names:
        if not (index.parent / name).is_file():
            refuse(index, f"{name} is missing", "every file that the index names must exist", "Download it too")
    return names


def _beside(index: Path, weight_map: Mapping[str, Any]) -> list[str]:
    """The files that an index names, in transformers' order. Each must lie beside the index."""
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            refuse(index, f"file {name!r}", "the files lie beside the index", "Do not use this checkpoint")
    return names


def _only_choice(folder: Path, present: list[str]) -> list[str]:
    """The files to read if neither config.json nor an index names them."""
    names = [name for name in present if not name.startswith("adapter_")]
    counts = {match["count"] for name in names if (match := SHARD.fullmatch(name))}
    if counts:
        expected = [f"model-{i + 1:05d}-of-{max(counts)}.safetensors" for i in range(int(max(counts)))]
        if missing := [name for name in expected if name not in present]:
            refuse(folder, f"{_some(missing)} missing", "all files of a set must exist", "Download them too")
        return expected
    if len(names) > 1:
        refuse(
            folder,
            f"{_some(names)}, and no {INDEX}",
            f"the weights are {SINGLE}, or the files that the index names",
            "Keep the file with the weights, as model.safetensors",
        )
    if not names:
        refuse_without_weights(folder)
    return names


def _warn_of_others(folder: Path, chosen: list[str], present: list[str]) -> None:
    others = [name for name in present if name not in chosen and not OTHER_FORMATS.fullmatch(name)]
    if chosen == [SINGLE] and (folder / INDEX).is_file():
        _check_left_over(folder / INDEX)
        others.append(INDEX)
    if others:
        warnings.warn(
            f"{folder.name}: the weights are read from {_some(chosen)}; not read "
            f"{'is' if len(others) == 1 else 'are'} {_some(others)}",
            stacklevel=6,
        )


def _check_left_over(index: Path) -> None:
    """Check an unused index: it may be damaged, but must not name files outside its folder."""
    try:
        weight_map = read_json(index).get("weight_map")
    except HuggingFaceError:
        return
    if isinstance(weight_map, dict):
        _beside(index, weight_map)


def refuse_without_weights(folder: Path) -> NoReturn:
    """Raise HuggingFaceError for a folder without safetensors, naming what it holds instead."""
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        refuse(folder, "an empty folder", RULE, "Check the path, and that the download finished")
    if adapters := [name for name in names if name.startswith("adapter_") and name.endswith(".safetensors")]:
        refuse(
            folder,
            f"an adapter ({_some(adapters)}) without its model",
            RULE,
            "Merge it into its model first: peft's merge_and_unload, then save_pretrained",
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        refuse(folder, f"a folder of GGUF files ({_some(gguf)})", RULE, f"Name the file: {folder / gguf[0]}")
    if pickled := [name for name in names if name.endswith((".bin", ".pth", ".pt", ".ckpt"))]:
        refuse(
            folder,
            f"no safetensors file, but {_some(pickled)}",
            f"{RULE}; pickled weights can run any code and are not read",
            "Get the safetensors, or convert: transformers' save_pretrained writes them",
        )
    refuse(folder, "no safetensors file", RULE, "Download the weights too")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
