"""How a layer adds attention and MLP to the residual stream: one class for each placement of the norms."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.transformer.attention import Attention, AttentionMetadata
from tokenrelay.model.transformer.kv_cache import LayerCache
from tokenrelay.model.transformer.layers import MLP, make_norm


class DecoderLayer(nn.Module):
    """What all placements share. The stream is ``residual`` + x: an addition waits for the norm that it is fused with.

    ``residual`` is updated in place.
    """

    def __init__(self, config: ModelConfig, window: int, num_sinks: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, window, num_sinks)
        self.mlp_norm = nn.Identity() if config.shared_norm else make_norm(config)
        self.mlp = MLP(config, config.intermediate_size)
        self._shared_norm, self._residual_scale = config.shared_norm, config.residual_scale

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        positions: Tensor,
        rotary: Tensor | None,
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """x [T, C], residual [T, C] → what is still to be added to the residual."""

        def attend(hidden: Tensor) -> Tensor:
            attended: Tensor = self.attention(hidden, positions, rotary, cache, metadata)
            return attended

        return self.connect(attend, x, residual)

    def connect(self, attend: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor) -> Tensor:
        """``forward``, with the attention's other arguments bound."""
        raise NotImplementedError

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self._residual_scale == 1.0 else x * self._residual_scale


class PreNormLayer(DecoderLayer):
    """x + f(norm x), for attention and then the MLP. (Xiong et al. 2020)"""

    def connect(self, attend: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor) -> Tensor:
        x = self._scaled(attend(self.attention_norm(x, residual)))
        return self._scaled(self.mlp(self.mlp_norm(x, residual)))


class ParallelLayer(DecoderLayer):
    """x + attention(norm x) + mlp(norm x), the norms being one or two. (GPT-J, Wang & Komatsuzaki 2021)"""

    def connect(self, attend: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor) -> Tensor:
        normed = self.attention_norm(x, residual)
        attended = attend(normed)
        return self._scaled(attended + self.mlp(self.mlp_norm(normed if self._shared_norm else residual)))


class PostNormLayer(DecoderLayer):
    """x + norm(f x). (OLMo 2, 2024)"""

    def connect(self, attend: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor) -> Tensor:
        x = self._scaled(self.attention_norm(attend(residual.add_(x))))
        return self._scaled(self.mlp_norm(self.mlp(residual.add_(x))))


class SandwichLayer(DecoderLayer):
    """x + norm(f(norm x)). (Ding et al. 2021; Gemma 2)"""

    def __init__(self, config: ModelConfig, window: int, num_sinks: int) -> None:
        super().__init__(config, window, num_sinks)
        self.attention_post_norm, self.mlp_post_norm = make_norm(config), make_norm(config)

    def connect(self, attend: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor) -> Tensor:
        x = self._scaled(self.attention_post_norm(attend(self.attention_norm(x, residual))))
        return self._scaled(self.mlp_post_norm(self.mlp(self.mlp_norm(x, residual))))


class NormAfterSumLayer(DecoderLayer):
    """norm(x + f x), so that x itself is the stream and the residual stays zero. (Vaswani et al. 2017)"""

    def connect(self, attend: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor) -> Tensor:
        x = self.attention_norm(self._scaled(attend(x)), x)
        stream: Tensor = self.mlp_norm(self._scaled(self.mlp(x)), x)
        return stream


_PLACEMENTS = {"pre": PreNormLayer, "post": PostNormLayer, "sandwich": SandwichLayer, "after_sum": NormAfterSumLayer}


def make_layer(config: ModelConfig, window: int, num_sinks: int) -> DecoderLayer:
    """The layer that the configuration's placement asks for; ``window`` and ``num_sinks`` as ``Attention`` has them."""
    kind = ParallelLayer if config.parallel_residual else _PLACEMENTS[config.norm_placement]
    return kind(config, window, num_sinks)
