"""Arguments of a call as the object that they should be."""

from __future__ import annotations

import json
from typing import Any

INVALID = "INVALID_JSON"  # Anthropic's name for text where an object should be


def arguments_object(text: str) -> dict[str, Any]:
    """What is no JSON object, as when max_tokens cut it off, is kept as text."""
    try:
        parsed = json.loads(text or "{}")
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {INVALID: text}
