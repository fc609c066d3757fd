"""An adapter's folder as PEFT writes it, adapter_config.json and adapter_model.safetensors, held against a network.

Says which of its tensors change which rows of which of our matrices. Needs no torch: the API process validates with
it what a worker will load (``lora_tensors``). An adapter is known by the digest of its files, so that it is the same
wherever it is loaded, or is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import FAMILIES
from tokenrelay.model.weights.lora_config import CONFIG_FILE, LoRAConfig, LoRAError, read_lora_config

TENSORS_FILE = "adapter_model.safetensors"
HEADER_BYTES = 8 << 20  # more than names and shapes of any network take
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_TYPES = {"F32", "F16", "BF16"}


class Matrix(NamedTuple):
    """One pair of tensors; they change ``out_features`` columns, from ``first`` on, of ``target``'s output."""

    a: str  # the tensors' names
    b: str
    target: str  # our module
    first: int
    layout: str  # of the rows of b
    in_features: int
    out_features: int
    rank: int
    scale: float


class LoRA(NamedTuple):
    """A valid adapter of one network."""

    digest: str
    matrices: Sequence[Matrix]


def read_lora(folder: Path, network: ModelConfig, max_rank: int) -> LoRA:
    """Raises LoRAError, which names the file and the tensor."""
    config = read_lora_config(folder, max_rank)
    path = folder / TENSORS_FILE
    limit = _most_bytes(network, max_rank)
    try:
        if (size := path.stat().st_size) > limit:
            raise LoRAError(f"{path}: has {size} bytes; with max_lora_rank {max_rank} at most {limit} are read")
        matrices = _matrices(path, _shapes(path), config, network)
        return LoRA(digest_of(folder), matrices)
    except (SafetensorError, OSError) as error:
        raise LoRAError(f"{path}: {error}") from error


def digest_of(folder: Path) -> str:
    """Of both files' bytes. Raises OSError."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, TENSORS_FILE):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in _TYPES:
                raise LoRAError(f"{path}: tensor {name!r} is of type {tensor.get_dtype()}, not one of {sorted(_TYPES)}")
            shapes[name] = tuple(tensor.get_shape())
    return shapes


def _matrices(
    path: Path, shapes: Mapping[str, tuple[int, ...]], config: LoRAConfig, network: ModelConfig
) -> list[Matrix]:
    halves: dict[str, dict[str, str]] = defaultdict(dict)  # by module
    for name in shapes:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise LoRAError(f"{path}: tensor {name[:200]!r} is not one half of a LoRA of a linear layer")
        halves[match["module"]][match["half"]] = name
    _require_complete(path, halves, config, network.num_layers)
    return [_matrix(path, module, found, shapes, config, network) for module, found in sorted(halves.items())]


def _require_complete(path: Path, halves: Mapping[str, Mapping[str, str]], config: LoRAConfig, num_layers: int) -> None:
    """Every module that the configuration names has both of its tensors."""
    expected = set(halves) | set(_expected(halves, config, num_layers))
    missing = [
        f"{module}.lora_{half}" for module in sorted(expected) for half in "AB" if half not in halves.get(module, {})
    ]
    idle = [name for name in config.target_modules if not any(f".{module}".endswith(f".{name}") for module in halves)]
    missing += [f"any of {name}" for name in idle]
    if missing or not halves:
        raise LoRAError(f"{path}: has no tensor {', '.join(missing[:8]) or 'at all'} ({len(missing)} are missing)")


def _expected(modules: Iterable[str], config: LoRAConfig, num_layers: int) -> Iterable[str]:
    """What is adapted in one layer is in every other one, too, as far as the configuration says so."""
    for module in modules:
        for layer in range(num_layers):
            sibling = _LAYER.sub(str(layer), module, count=1)
            if config.expects(sibling, layer):
                yield sibling


def _matrix(
    path: Path,
    module: str,
    halves: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    config: LoRAConfig,
    network: ModelConfig,
) -> Matrix:
    place = _place(module, network)
    if place is None:
        raise LoRAError(f"{path}: no LoRA is built for {module[:200]!r} of a {network.architecture} network")
    target, shard, layout = place
    first, in_features, out_features = _extent(target, shard, network)
    rank = config.rank_of(module)
    for half, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
        if shapes[halves[half]] != shape:
            raise LoRAError(
                f"{path}: tensor {halves[half]!r} has shape {list(shapes[halves[half]])}, expected {list(shape)}"
            )
    scale = config.scale_of(module)
    return Matrix(halves["A"], halves["B"], target, first, layout, in_features, out_features, rank, scale)


def _place(module: str, network: ModelConfig) -> tuple[str, str, str] | None:
    """Our module, the shard of a merged matrix, and the layout of its rows; None where adapters are not built."""
    family = FAMILIES.get(network.architecture)
    for rule in family.rules if family else ():
        match = re.fullmatch(rule.pattern, f"{module}.weight")
        if match:
            target = match.expand(rule.target).removesuffix(".weight")
            number = re.fullmatch(r"layers\.(\d+)\.(?:attention\.(?:qkv|o)|mlp\.(?:up|down))_proj", target)
            if number is None or int(number[1]) >= network.num_layers:
                return None
            layout = "" if rule.layout == "transposed" else rule.layout  # PEFT stores both halves as linear layers
            return target, match.expand(rule.shard), layout
    return None


def _extent(target: str, shard: str, network: ModelConfig) -> tuple[int, int, int]:
    """First column of the output, and how many elements come in and go out."""
    hidden, inner, q, kv = network.hidden_size, network.intermediate_size, network.q_size, network.kv_size
    extents = {
        ("qkv_proj", "q"): (0, hidden, q),
        ("qkv_proj", "k"): (q, hidden, kv),
        ("qkv_proj", "v"): (q + kv, hidden, kv),
        ("qkv_proj", ""): (0, hidden, q + 2 * kv),
        ("o_proj", ""): (0, q, hidden),
        ("up_proj", "gate"): (0, hidden, inner),
        ("up_proj", "up"): (inner * network.gated_mlp, hidden, inner),
        ("up_proj", ""): (0, hidden, inner * (1 + network.gated_mlp)),
        ("down_proj", ""): (0, inner, hidden),
    }
    return extents[target.rpartition(".")[2], shard]


def _most_bytes(network: ModelConfig, max_rank: int) -> int:
    """Of a file with every matrix at this rank, in fp32."""
    hidden, inner, q, kv = network.hidden_size, network.intermediate_size, network.q_size, network.kv_size
    attention = 2 * (hidden + q) + 2 * (hidden + kv)
    return HEADER_BYTES + 4 * max_rank * network.num_layers * (attention + 3 * (hidden + inner))
