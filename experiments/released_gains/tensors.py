"""Finds and reads the tensors of the connections in a folder of safetensors, and nothing else of it.

Names are those of `transformers` (`model.layers.3.attn_hc.fn`) or of the released files
(`layers.3.hc_attn_fn`). One sublayer is in memory at a time: what is kept of it are `base`, `scale` and the
column norms of `fn`. Tensors of multi-token prediction (`mtp.`) belong to no layer of the network and are
left alone.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from mhc_jax import interop

INDEX = "model.safetensors.index.json"
_PREFIX = r"^(?:(?:model|language_model)\.)*"
_LAYER = re.compile(_PREFIX + r"layers\.(\d+)\.(?:hc_(attn|ffn)_|(attn|ffn)_hc\.)(fn|base|scale)$")
_HEAD = re.compile(_PREFIX + r"hc_head(?:_|\.hc_)(fn|base|scale)$")
_WANTED = "layers.N.attn_hc.{fn,base,scale} or layers.N.hc_attn_{fn,base,scale}"
_PARTS = ("fn", "base", "scale")


class Sublayer(NamedTuple):
    """Holds what is kept of a connection, or of the head.

    Attributes:
      name: "layers.3.attn", "layers.3.ffn" or "head".
      C: width of a stream.
      bias: `[n*n+2n]` in our order; of the head `[n]`.
      alpha: `[3]`; of the head `[1]`.
      dynamic_std: as `bias`, the standard deviation of the dynamic part of each logit if the normed streams
        had independent entries of size 1: |alpha| times the norm of its column of phi.
    """

    name: str
    C: int
    bias: np.ndarray
    alpha: np.ndarray
    dynamic_std: np.ndarray


class Checkpoint(NamedTuple):
    """Holds connections in the order of execution, the head or None, and config.json, empty without one."""

    sublayers: list[Sublayer]
    head: Sublayer | None
    config: dict[str, Any]


def read(folder: pathlib.Path, progress: Callable[[list], Iterable] = iter) -> Checkpoint:
    """Reads the connections of a checkpoint.

    Args:
      folder: with *.safetensors, and `INDEX` if there are several.
      progress: wraps the list of sublayers, as tqdm does.

    Raises:
      ValueError: in one line, with the name of the file: no safetensors, none of these tensors, a damaged
        file, missing layers, shapes that do not fit, numbers that are not finite.
    """
    places = _places(folder)
    found = _by_sublayer(places, folder)
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    _check_complete(found, config, folder)
    read_ones = [_read(name, found[name]) for name in progress(sorted(found, key=_order))]
    sublayers = [one for one in read_ones if one.name != "head"]
    sizes: dict[tuple[int, int], str] = {}
    for one in sublayers:
        sizes.setdefault((_num_streams(one), one.C), one.name)
    if len(sizes) > 1:
        (a, first), (b, second), *_ = sizes.items()
        raise ValueError(
            f"{folder}: {first} has n, C = {a[0]}, {a[1]} and {second} has {b[0]}, {b[1]}: sublayers of one "
            "network have the same"
        )
    head = next((one for one in read_ones if one.name == "head"), None)
    return Checkpoint(sublayers, head, config)


def _order(name: str) -> tuple[bool, int, bool]:
    if name == "head":
        return True, 0, False
    _, layer, kind = name.split(".")
    return False, int(layer), kind == "ffn"


def _num_streams(one: Sublayer) -> int:
    return round((len(one.bias) + 1) ** 0.5) - 1


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _open(path: pathlib.Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        what = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged, not whole or no safetensors: {what}") from None


def _places(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns tensor -> file of the whole checkpoint; no tensor is read."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the one with the *.safetensors files")
    if (folder / INDEX).is_file():
        content = _json(folder / INDEX).get("weight_map")
        if not isinstance(content, dict):
            raise ValueError(f"{folder / INDEX} has no weight_map, which says where tensors lie")
        return {name: folder / str(file) for name, file in content.items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors and no {INDEX}")
    places = {}
    for path in files:
        with _open(path) as file:
            places |= dict.fromkeys(file.keys(), path)
    return places


def _by_sublayer(places: dict[str, pathlib.Path], folder: pathlib.Path) -> dict[str, dict]:
    """Returns sublayer -> {part: (tensor, file)}."""
    found: dict[str, dict] = {}
    for tensor, path in places.items():
        if match := _LAYER.match(tensor):
            layer, old, new, part = match.groups()
            name = f"layers.{int(layer)}.{old or new}"
        elif match := _HEAD.match(tensor):
            name, part = "head", match[1]
        else:
            continue
        found.setdefault(name, {})[part] = tensor, path
    if not set(found) - {"head"}:
        files = sorted({path.name for path in places.values()})
        where = folder / (INDEX if (folder / INDEX).is_file() else files[0] if files else "")
        example = f" such as {min(places)}" if places else ""
        raise ValueError(
            f"{where}: none of the {len(places)} tensors{example} is a connection's, {_WANTED}"
        )
    return found


def _check_complete(found: dict[str, dict], config: dict, folder: pathlib.Path) -> None:
    """Raises ValueError for layers, halves of layers or tensors that are not there."""
    where = folder / INDEX if (folder / INDEX).is_file() else folder
    layers = {_order(name)[1] for name in found if name != "head"}
    count = max(max(layers) + 1, int(config.get("num_hidden_layers") or 0))
    missing = sorted(set(range(count)) - layers)
    if missing:
        listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise ValueError(
            f"{where}: connections of {len(missing)} of {count} layers are missing: {listed}"
        )
    for layer in range(count):
        for kind in ("attn", "ffn"):
            if f"layers.{layer}.{kind}" not in found:
                raise ValueError(f"{where}: layer {layer} has no {kind}_hc")
    for name, parts in found.items():
        for part in _PARTS:
            if part not in parts:
                raise ValueError(f"{where}: {name} has no {part}")


def _read(name: str, parts: dict[str, tuple[str, pathlib.Path]]) -> Sublayer:
    arrays = []
    for part in _PARTS:
        tensor, path = parts[part]
        if not path.is_file():
            raise ValueError(f"{path} is not there, and {tensor} should be in it: {INDEX} says so")
        with _open(path) as file:
            try:
                arrays.append(file.get_tensor(tensor))
            except (SafetensorError, TypeError) as error:
                what = str(error).splitlines()[0]
                raise ValueError(f"{path}: {tensor} cannot be read: {what}") from None
    tensor, path = parts["fn"]
    try:
        ours = interop.from_deepseek_v4(*arrays)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {tensor.removesuffix('fn')}*: {error}") from None
    phi, bias, alpha = ours["phi"], ours["bias"], ours["alpha"]
    if len(alpha) != (1 if name == "head" else 3):
        raise ValueError(f"{path}: {tensor.removesuffix('fn')}scale has shape {alpha.shape}")
    for part, array in zip(_PARTS, (phi, bias, alpha)):
        if not np.isfinite(array).all():
            raise ValueError(
                f"{parts[part][1]}: {parts[part][0]} holds numbers that are not finite"
            )
    n = len(bias) if name == "head" else round((len(bias) + 1) ** 0.5) - 1
    gates = alpha if name == "head" else np.repeat(alpha, (n, n, n * n))
    dynamic_std = np.abs(gates) * np.linalg.norm(phi, axis=0)
    return Sublayer(name, len(phi) // n, bias, alpha, dynamic_std)
