"""From a checkpoint's tensors to a network that is ready to run on a device.

The checkpoint's rules say where each tensor goes; q, k and v are rows of one matrix here, as are gate and up. A tensor
that is missing, unknown or of the wrong shape is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig, Quantization
from tokenrelay.model.families import Rule
from tokenrelay.model.quantized import Quantized
from tokenrelay.model.transformer.attention import Attention
from tokenrelay.model.transformer.communicator import Communicator
from tokenrelay.model.transformer.filling import Filling
from tokenrelay.model.transformer.heap import returning_memory
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.transformer.kernels.native_layers import replace_layers
from tokenrelay.model.transformer.layers import LayerNorm, RMSNorm
from tokenrelay.model.transformer.placing import Placed, placed
from tokenrelay.model.transformer.quantization import check_quantization, keeps_stored
from tokenrelay.model.transformer.rope import local_rotary_table, rotary_table
from tokenrelay.model.transformer.sinusoids import SinusoidalPositions, sinusoidal_table
from tokenrelay.model.transformer.tensor_parallel import Share, sum_over_ranks
from tokenrelay.model.transformer.transformer import Transformer


@returning_memory()
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
    fp32 everywhere. Peak memory is the weights as they will be, and where tensors are not mapped from a file, or on a
    GPU, one matrix.

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
    replaces = quantization if packs or device.type != "cpu" else None
    Filling(model, replaces, keep_quantized=keeps_stored(quantization, device)).fill(incoming)
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
