"""One choice of a request: from its tokens to text, and to the events of its log."""

from __future__ import annotations

from collections.abc import Sequence

from tokenrelay.model.detokenizer import IncrementalDetokenizer, TokenBytes
from tokenrelay.model.engine.step import StepOutput
from tokenrelay.model.sampling_params import FinishReason
from tokenrelay.service.messages import Event, Submission
from tokenrelay.service.worker.stop_strings import StopStringMatcher


class Choice:
    """One of a request's n continuations: its ids so far, and the text not yet shown."""

    def __init__(self, index: int, submission: Submission, tokenizer: TokenBytes) -> None:
        params = submission.params
        self.index = index
        self.token_ids: list[int] = []
        self.mirostat_mu: float | None = None
        self.finish_reason: str | None = None
        self._stop_string = ""
        self._submission = submission
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, submission.prompt_tail, skip_special_tokens=submission.skip_special_tokens
        )
        self._matcher = StopStringMatcher(params.stop, include=params.include_stop_str_in_output)

    @property
    def untouched(self) -> bool:
        """Nothing has come of it yet."""
        return not self.token_ids and self.finish_reason is None

    def extend(self, output: StepOutput) -> Event:
        """The event of a step. The token that ends the choice is the last, whatever was computed behind it."""
        if self._submission.prompt_only:
            self.finish_reason = FinishReason.LENGTH
            return Event(
                choice=self.index, prompt_logprobs=list(output.prompt_logprobs), finish_reason=self.finish_reason
            )
        num_before = len(self.token_ids)
        text = self._append_all(output.token_ids, output.finish_reason)
        token_ids = self.token_ids[num_before:]
        return Event(
            choice=self.index,
            token_ids=token_ids,
            text=text,
            logprobs=list(output.logprobs[: len(token_ids)]),
            prompt_logprobs=list(output.prompt_logprobs),
            mirostat_mu=output.mirostat_mu,
            finish_reason=self.finish_reason,
            stop_string=self._stop_string,
        )

    def replay(self, event: Event) -> None:
        """Take over what another worker emitted; its text is already in the log."""
        for token_id in event.token_ids:
            self._append(token_id, None)
        if event.mirostat_mu is not None:
            self.mirostat_mu = event.mirostat_mu
        self.finish_reason = event.finish_reason

    def _append_all(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> str:
        """One by one, so that several at once give the text that they would give alone."""
        text = ""
        for i, token_id in enumerate(token_ids, 1):
            text += self._append(token_id, finish_reason if i == len(token_ids) else None)
            if self.finish_reason is not None:
                break
        return text

    def _append(self, token_id: int, finish_reason: FinishReason | None) -> str:
        """What may be shown now. ``finish_reason`` on it is final: the engine's, or a stop string's."""
        self.token_ids.append(token_id)
        may_stop = len(self.token_ids) >= self._submission.params.min_tokens
        matched = self._matcher.append(self._decode(token_id, finish_reason), may_stop=may_stop)
        self._stop_string = matched.stop
        self.finish_reason = FinishReason.STOP if matched.stop else finish_reason
        if finish_reason is None or matched.stop:
            return matched.text
        return matched.text + self._matcher.flush()

    def _decode(self, token_id: int, finish_reason: FinishReason | None) -> str:
        """A token that stops is not text, unless asked for; what was incomplete at the end is shown as it is."""
        is_text = finish_reason is not FinishReason.STOP or self._submission.params.include_stop_str_in_output
        text = self._detokenizer.append([token_id]) if is_text else ""
        return text if finish_reason is None else text + self._detokenizer.flush()
