"""Whether a model thinks before it answers, where its chat template leaves the choice."""

from __future__ import annotations

from typing import Any

from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.errors import UnsupportedParameter

SWITCH = "enable_thinking"  # the name that templates have agreed on


def thinking_switch(wanted: bool, dialect: Dialect, param: str) -> dict[str, Any]:
    """Arguments of the template that turn it on or off. Raises UnsupportedParameter, naming ``param``, where neither
    the template knows the switch nor the model is so anyway."""
    if SWITCH in dialect.variables:
        return {SWITCH: wanted}
    if wanted == bool(dialect.reasoning_format):
        return {}
    always = "always thinks before it answers" if dialect.reasoning_format else "does not think before it answers"
    raise UnsupportedParameter(f"'{param}': this model {always}; leave it out.", param=param)
