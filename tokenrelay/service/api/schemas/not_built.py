"""Parameters other servers know and this one does not build (yet), each with the values that ask for nothing.

Clients send such neutral values routinely; they are accepted. Any other value is refused by name: a parameter is
never accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Neutral = Mapping[str, tuple[Any, ...]]

_OPENAI = {
    "store": (False,),
    "prompt_cache_retention": ("in-memory", "in_memory"),
}
_VLLM = {
    "spaces_between_special_tokens": (True,),
    "logprob_token_ids": (),
    "logits_processors": (),
    "request_id": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "repetition_detection": (),
    "prompt_embeds": (),
}
_LLAMA_CPP = {
    "n_probs": (0,),
    "n_keep": (0,),
    "id_slot": (-1,),
    "samplers": (),
    "t_max_predict_ms": (),
    "lora": ([],),
}
_SGLANG = {
    "rid": (),
    "lora_path": (),
    "session_params": (),
}

ON_BOTH_ROUTES: Neutral = _OPENAI | _VLLM | _LLAMA_CPP | _SGLANG

ON_CHAT: Neutral = {
    **ON_BOTH_ROUTES,
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "thinking_token_budget": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": (),
    "add_special_tokens": (False,),
    "echo": (False,),
}

ON_COMPLETIONS: Neutral = {
    **ON_BOTH_ROUTES,
    "separate_reasoning": (True,),
    "suffix": ("",),
}

IN_MESSAGES: Neutral = {
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
}

IN_STRUCTURED_OUTPUTS: Neutral = {
    "structural_tag": (),
    "whitespace_pattern": (),
    "disable_fallback": (False,),
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
}

IN_STREAM_OPTIONS: Neutral = {
    "include_obfuscation": (False,),
}


def asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Null always does. JSON's false is not 0 here, though Python's is."""
    return value is None or any(
        value == candidate and isinstance(value, bool) == isinstance(candidate, bool) for candidate in neutral
    )
