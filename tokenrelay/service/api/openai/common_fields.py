"""The fields that chunks and answers of OpenAI's both routes have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenrelay.service.api.lifecycle.choices import Finished, Output, Step
from tokenrelay.service.api.schemas.usage import CompletionUsage, PromptTokensDetails
from tokenrelay.service.terms import AnswerSpec


class CommonFields:
    """Of one answer. Notes what is told, for those who want the usage so far with every chunk."""

    def __init__(self, answer_id: str, kind: str, specs: Sequence[AnswerSpec]) -> None:
        spec = specs[0]
        self._spec = spec
        self._num_prompt_tokens = sum(spec.num_prompt_tokens for spec in specs)
        self._num_told = 0
        told = {"system_fingerprint": spec.system_fingerprint, "service_tier": spec.service_tier}
        self.always: dict[str, Any] = {"id": answer_id, "object": kind, "created": spec.created, "model": spec.model}
        self.always |= {name: value for name, value in told.items() if value}

    def note(self, output: Output) -> None:
        """This is told now, or has been."""
        self._num_told += len(output.token_ids)

    @property
    def of_a_chunk(self) -> dict[str, Any]:
        """OpenAI's chunks say that they have no usage, if one will come."""
        usage = self._so_far if self._spec.include_continuous_usage else None
        return self.always | ({"usage": usage} if self._spec.include_usage else {})

    @staticmethod
    def at_the_end(last: Step | Finished) -> dict[str, Any]:
        """The timings, if they were asked for."""
        return {"timings": last.timings} if last.timings else {}

    @property
    def _so_far(self) -> CompletionUsage:
        return CompletionUsage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_told,
            total_tokens=self._num_prompt_tokens + self._num_told,
            prompt_tokens_details=PromptTokensDetails(),
        )
