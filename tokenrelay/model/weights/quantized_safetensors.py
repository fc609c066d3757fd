"""Safetensors folders whose ``quantization_config`` says that matrices are stored in few bits.

They stay so where our kernels take their groups, and are dequantized where not; the log has one line about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import structlog
from torch import Tensor

from tokenrelay.model.config import UnsupportedModelError
from tokenrelay.model.quantized import Quantized
from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.quantized_formats import GroupedIntegers, Parts, awq, compressed_tensors, gptq, mxfp4


class Method(NamedTuple):
    """One way to store matrices in few bits."""

    read: Callable[[Parts, Mapping[str, Any]], GroupedIntegers | Tensor]
    config: Mapping[str, Any]
    mark: str  # the suffix of a tensor that only quantized matrices have
    suffixes: tuple[str, ...]  # of all tensors that may belong to one
    result: str = ".weight"  # what the whole is called


_GPTQ = (".qweight", ".qzeros", ".scales", ".g_idx")
_OF_ACTIVATIONS = (".input_scale", ".input_zero_point")  # known beforehand; ours are those of each row as it comes
_COMPRESSED = (".weight", ".weight_packed", ".weight_shape", ".weight_scale", ".weight_zero_point", ".weight_g_idx")


def read_method(described: Mapping[str, Any] | None) -> Method | None:
    """Of a ``quantization_config``; None without one. UnsupportedModelError names what is not known, and what is."""
    if not described:
        return None
    name = described.get("quant_method")
    reader = _READERS.get(str(name))
    if reader is None:
        raise UnsupportedModelError(f"quantization method {name!r} is not supported; known: {', '.join(_READERS)}")
    return reader(described)


def _awq(described: Mapping[str, Any]) -> Method:
    _only("awq", described, version=("gemm", "GEMM", None), bits=(4,))
    return Method(awq, described, ".qweight", _GPTQ[:3])


def _gptq(described: Mapping[str, Any]) -> Method:
    _only("gptq", described, checkpoint_format=("gptq", "gptq_v2", None), bits=(4, 8))
    return Method(gptq, described, ".qweight", _GPTQ)


def _compressed(described: Mapping[str, Any]) -> Method:
    groups = [group.get("weights") or {} for group in (described.get("config_groups") or {}).values()]
    if len(groups) != 1:
        raise UnsupportedModelError(f"compressed-tensors with {len(groups)} config_groups is not supported; known: 1")
    whole = dict(groups[0]) | {"format": described.get("format")}
    _only(
        "compressed-tensors",
        whole,
        format=("int-quantized", "pack-quantized", "naive-quantized"),
        type=("int", None),
        num_bits=(4, 8),
    )
    return Method(compressed_tensors, whole, ".weight_scale", _COMPRESSED)


def _mxfp4(described: Mapping[str, Any]) -> Method:
    return Method(mxfp4, described, "_blocks", ("_blocks", "_scales"), "")


_READERS: dict[str, Callable[[Mapping[str, Any]], Method]] = {
    "awq": _awq,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}


def _only(method: str, described: Mapping[str, Any], **known: tuple[object, ...]) -> None:
    for key, values in known.items():
        if described.get(key) not in values:
            names = ", ".join(str(value) for value in values if value is not None)
            raise UnsupportedModelError(f"{method} with {key}={described.get(key)!r} is not supported; known: {names}")


def assembled(
    tensors: Iterable[tuple[str, Tensor]], names: Iterable[str], method: Method, *, keep: bool
) -> Iterator[tuple[str, Tensor | Quantized]]:
    """Each quantized matrix as one, when the last of its tensors has come; the others as they are.

    ``names``: of all tensors. What cannot be kept, or is not to be, is dequantized.
    """
    sizes = _sizes(names, method)
    waiting: dict[str, dict[str, Tensor]] = {}
    became: Counter[str] = Counter()
    for name, tensor in tensors:
        base, suffix = _split(name, method)
        if base not in sizes:
            if not name.endswith(_OF_ACTIVATIONS):
                yield name, _unscaled(name, tensor)
            continue
        parts = waiting.setdefault(base, {})
        parts[suffix] = tensor
        if len(parts) == sizes[base]:
            read = method.read(Parts(base, waiting.pop(base)), method.config)
            whole, what = _matrix(read, keep)
            became[what] += 1
            yield base + method.result, whole
    _tell(became)


def _unscaled(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor
    raise CheckpointError(f"tensor {name!r} holds integers, and no other says what they mean")


def _sizes(names: Iterable[str], method: Method) -> dict[str, int]:
    """How many tensors each quantized matrix consists of, by what their names have in common."""
    split = [_split(name, method) for name in names]
    counts = Counter(base for base, _ in split)
    bases = {base for base, suffix in split if suffix in (method.mark, ".weight_packed")}
    return {base: counts[base] for base in bases}


def _split(name: str, method: Method) -> tuple[str, str]:
    """A tensor's name and "", or what it shares with its matrix's other tensors, and its own suffix."""
    suffix = next((suffix for suffix in method.suffixes if name.endswith(suffix)), "")
    return name.removesuffix(suffix), suffix


def _matrix(read: GroupedIntegers | Tensor, keep: bool) -> tuple[Tensor | Quantized, str]:
    """And what became of it."""
    if isinstance(read, Tensor):
        return read, "dequantized: floats of 4 bits"
    kept = read.kept() if keep else "as asked for"
    if isinstance(kept, Quantized):
        return kept, f"stay in {kept.bits} bits"
    return read.dequantized(), f"dequantized: {kept}"


def _tell(became: Counter[str]) -> None:
    """ "12 of 14 stay in 4 bits; 2 of 14 dequantized: act-order"."""
    if became:
        total = became.total()
        structlog.get_logger().info(
            "quantized matrices", became="; ".join(f"{n} of {total} {what}" for what, n in became.most_common())
        )
