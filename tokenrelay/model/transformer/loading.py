"""From a checkpoint's tensors to a network that is ready to run on a device.

The checkpoint's rules say where each tensor goes; q, k and v are rows of one matrix here, as are gate and up. A tensor
that is missing, unknown or of the wrong shape is refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig, Quantization
from tokenrelay.model.families import Rule
from tokenrelay.model.quantized import Quantized, stacked
from tokenrelay.model.transformer.attention import Attention
from tokenrelay.model.transformer.communicator import Communicator
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.transformer.kernels.native_layers import replace_layers
from tokenrelay.model.transformer.layers import LayerNorm, RMSNorm
from tokenrelay.model.transformer.placing import Placed, WeightsError, placed
from tokenrelay.model.transformer.quantization import (
    check_quantization,
    keeps_stored,
    replace_embedding,
    replace_linears,
)
from tokenrelay.model.transformer.rope import local_rotary_table, rotary_table
from tokenrelay.model.transformer.sinusoids import SinusoidalPositions, sinusoidal_table
from tokenrelay.model.transformer.tensor_parallel import Share, sum_over_ranks
from tokenrelay.model.transformer.transformer import Transformer


def load_transformer(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor | Quantized]],
    rules: Sequence[Rule],
    *,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    attention_sinks: int = 0,
    quantization: Quantization = "auto",
    ranks: Communicator | None = None,
) -> Transformer:
    """Build the network, fill it from (name, tensor) pairs as the rules say, and make it ready for ``device``.

    Matrices that come quantized stay so where there are kernels for it, unless ``quantization`` is another.

    With ``ranks`` it is this rank's share of the network, cut tensor by tensor: no rank ever holds the whole.

    On a CPU activations are fp32 whatever the weights are: its kernels accumulate in fp32 anyway. Norms' weights are
    fp32 everywhere. Peak memory is the weights in ``dtype`` and one tensor.

    Raises:
        WeightsError: the tensors do not fit the network.
        ValueError: ``attention_sinks`` do not suit the network or the device, ``quantization`` the device, or the
            network as many ranks.
    """
    check_quantization(quantization, device)
    if attention_sinks and device.type != "cpu":
        raise ValueError(f"attention_sinks is not supported on {device.type}; set it to 0")
    incoming = placed(tensors, rules, config)
    if ranks:
        share = Share(config, ranks.rank, ranks.size)
        incoming, config = _parts(incoming, share), share.own_config
    model = empty(typed(config, max_model_len, attention_sinks, dtype, device), max_model_len, device)
    if ranks and ranks.rank:
        model.lm_head = nn.Identity()  # type: ignore[assignment] # only the leader samples
    packs = device.type == "cpu" and native.is_available()
    quantized = _fill(model, incoming, keeps_stored(quantization, device))
    if packs or device.type != "cpu":
        replace_linears(model, quantized, quantization)
        replace_embedding(model, quantized, quantization)
    if ranks:
        sum_over_ranks(model, ranks)
    elif packs:
        replace_layers(model)
    return model.requires_grad_(False).eval()


def _parts(whole: Iterable[Placed], share: Share) -> Iterator[Placed]:
    """A rank's part of each tensor."""
    for one in whole:
        part = share.part(one.target, one.shard, one.tensor)
        if part is not None:
            yield one._replace(tensor=part)


def typed(
    config: ModelConfig, max_model_len: int, attention_sinks: int, dtype: torch.dtype, device: torch.device
) -> Transformer:
    """The network on the meta device, every parameter of the type that it will have on ``device``."""
    with torch.device("meta"):
        model = Transformer(config, max_model_len, attention_sinks).to(dtype)
    on_cpu = device.type == "cpu"
    model.activation_dtype = torch.float32 if on_cpu else dtype
    _keep_in_fp32(model, linears=on_cpu and not native.is_available())
    return model


def empty(model: Transformer, max_model_len: int, device: torch.device) -> Transformer:
    """The same on ``device``, its weights uninitialised."""
    materialise(model, device)
    _compute_positions(model, max_model_len, device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give every meta parameter memory, uninitialised. (``to_empty`` would import torch's symbolic shapes for it)"""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module.register_parameter(name, nn.Parameter(memory, requires_grad=False))


def _compute_positions(model: Transformer, max_model_len: int, device: torch.device) -> None:
    """Fill the tables that no checkpoint has to bring along."""
    config = model.config
    if config.positions == "rotary":
        model.rotary = rotary_table(config, max_model_len).to(device)
        if config.local_rope_theta:
            model.local_rotary = local_rotary_table(config, max_model_len).to(device)
    if isinstance(model.embed_positions, SinusoidalPositions):
        model.embed_positions.table = sinusoidal_table(max_model_len, config.hidden_size).to(device)


def _keep_in_fp32(model: nn.Module, *, linears: bool) -> None:
    """Norms and learned sinks always; matrices where stock torch multiplies them: in one type, and bf16 slowly."""
    kinds = (RMSNorm, LayerNorm, nn.Linear, nn.Embedding) if linears else (RMSNorm, LayerNorm)
    for module in model.modules():
        if isinstance(module, kinds):
            module.float()
        elif isinstance(module, Attention) and module.sinks is not None:
            module.sinks.data = module.sinks.data.float()


def _fill(model: Transformer, tensors: Iterable[Placed], keep_quantized: bool) -> dict[str, Quantized]:
    """Copy every tensor to its place, and count rows so that a hole is noticed.

    Returns the matrices that stay quantized, by name. Their parameters are memory that was never touched.
    """
    config = model.config
    parameters = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    unfilled = _rows_to_fill(parameters, config)
    kept: dict[str, dict[int, Quantized]] = defaultdict(dict)  # by name, and by the row at which each begins
    for name, target, shard, tensor in tensors:
        if not target or (config.tie_word_embeddings and target == "lm_head.weight"):
            continue
        if target not in unfilled:
            raise WeightsError(f"tensor {name!r} has no place in a {config.architecture} network of this configuration")
        start, end = _span(parameters[target], shard, config)
        rows = parameters[target][start:end]
        matrix = _matrix_of(target, config)
        keeps = isinstance(tensor, Quantized) and matrix and keep_quantized
        if isinstance(tensor, Quantized) and keeps:
            _check_shape(name, tensor, rows)
            kept[matrix][start] = tensor
        else:
            _copy(name, tensor.dequantized() if isinstance(tensor, Quantized) else tensor, rows)
        unfilled[target] -= end - start
    missing = sorted(name for name, rows in unfilled.items() if rows > 0)
    if missing:
        raise WeightsError(f"the checkpoint does not fill {', '.join(missing[:8])} ({len(missing)} in all)")
    return {name: whole for name, shards in kept.items() if (whole := _whole(shards, parameters.get(name)))}


def _rows_to_fill(parameters: Mapping[str, Tensor], config: ModelConfig) -> dict[str, int]:
    """How many rows of each parameter the checkpoint has to bring; norms that do not scale are filled with ones."""
    constant = [] if config.norm_weight else [name for name in parameters if name.endswith("norm.weight")]
    for name in constant:
        parameters[name].data.fill_(1)
    return {name: parameter.shape[0] for name, parameter in parameters.items() if name not in constant}


def _matrix_of(target: str, config: ModelConfig) -> str:
    """Which linear layer's matrix this is, if it is one: itself, or the head that an embedding is tied to."""
    if target == "embed_tokens.weight":
        return "lm_head.weight" if config.tie_word_embeddings else target
    return target if target.endswith(("_proj.weight", "lm_head.weight")) else ""


def _whole(shards: Mapping[int, Quantized], parameter: Tensor | None) -> Quantized | None:
    """One matrix, if all its shards came quantized; if not, these join the others in the parameter."""
    if parameter is None or sum(shard.shape[0] for shard in shards.values()) == parameter.shape[0]:
        return stacked([shards[start] for start in sorted(shards)])
    for start, shard in shards.items():
        parameter.data[start : start + shard.shape[0]] = shard.dequantized()
    return None


def _span(parameter: Tensor, shard: str, config: ModelConfig) -> tuple[int, int]:
    """The rows of a merged matrix, or bias, that a shard fills."""
    q, kv, rows = config.q_size, config.kv_size, parameter.shape[0]
    gate = rows // 2 if config.gated_mlp else 0  # experts are narrower than config.intermediate_size
    spans = {"": (0, rows), "q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    spans |= {"gate": (0, gate), "up": (gate, rows)}
    return spans[shard]


def _copy(name: str, source: Tensor, destination: Tensor) -> None:
    _check_shape(name, source, destination)
    with torch.no_grad():
        destination.copy_(source)


def _check_shape(name: str, source: Tensor | Quantized, destination: Tensor) -> None:
    if source.shape != destination.shape:
        raise WeightsError(f"tensor {name!r} has shape {list(source.shape)}, expected {list(destination.shape)}")
