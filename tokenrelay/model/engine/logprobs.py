"""Log-probabilities of tokens under the model's own distribution, before anything the sampler does to it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenrelay.model.sampling_params import TokenLogprobs


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Of one token per row of ``logits`` [S, V] fp32, and of each row's ``num_top`` likeliest.

    The normaliser is a running sum in double: torch's own splits a lone row among threads, and rounds differently then.
    """
    top_logits, top_ids = logits.topk(max(1, num_top), dim=-1)
    weights = (logits - top_logits[:, :1]).exp()
    normaliser = weights.double().cumsum(dim=-1)[:, -1:].log() + top_logits[:, :1]
    chosen = logits.gather(1, logits.new_tensor([token_ids]).long().T)
    ranks = (logits > chosen).sum(dim=-1) + 1
    logprobs = (chosen - normaliser).squeeze(1)
    columns = (top_logits - normaliser).tolist()
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(zip(ids[:num_top], tops[:num_top], strict=True)))
        for token_id, logprob, rank, ids, tops in zip(
            token_ids, logprobs.tolist(), ranks.tolist(), top_ids.tolist(), columns, strict=True
        )
    ]
