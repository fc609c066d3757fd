"""The requests that a worker holds, and which of them might be about to kill it."""

from __future__ import annotations

from tokenrelay.service.queue import Claim


class Holdings:
    """From claim to finish, each under the epoch of its claim."""

    def __init__(self, max_attempts: int) -> None:
        self.epochs: dict[str, int] = {}  # by request id
        self._max_attempts = max(2, max_attempts)  # a first attempt is nobody's last
        self._unproven: dict[str, int] = {}  # request id → attempts; no progress since the claim

    def __len__(self) -> int:
        return len(self.epochs)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.epochs

    def add(self, claim: Claim) -> None:
        request_id = claim.submission.request_id
        self.epochs[request_id] = claim.epoch
        self._unproven[request_id] = claim.attempts

    def note_progress(self, request_id: str) -> bool:
        """Something was published for it: whatever killed its earlier workers, it was not this request.

        True if it was the last of which that was not known.
        """
        return self._unproven.pop(request_id, None) is not None and self.unsuspected

    def forget(self, request_id: str, epoch: int) -> bool:
        """False if it is not held, or under a newer epoch: lost, and won again before that was noticed."""
        if self.epochs.get(request_id) != epoch:
            return False
        del self.epochs[request_id]
        self._unproven.pop(request_id, None)
        return True

    @property
    def unsuspected(self) -> bool:
        """Whether everything here has made progress."""
        return not self._unproven

    @property
    def on_trial(self) -> bool:
        """Whether a request makes its last attempt: nothing that could be blamed in its place may come beside it."""
        return any(attempts >= self._max_attempts for attempts in self._unproven.values())
