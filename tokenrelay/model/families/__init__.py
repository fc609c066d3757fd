"""The families of networks that this server runs, by transformers' ``model_type``. No torch.

Each is a module with a reader of ``config.json`` and a table of tensor names; ``transformer.transformer`` is the one
network that they all configure. Every key that would change the result and is not built is refused by name. Checkpoints
of other formats are renamed to these keys, so that what is supported is decided here alone.
"""

from __future__ import annotations

from tokenrelay.model.config import ModelConfig, UnsupportedModelError
from tokenrelay.model.families import (
    cohere,
    exaone4,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    llama,
    mistral,
    mixtral,
    olmo,
    opt,
    phi,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
    stablelm,
    ungated,
    vanilla_transformer,
)
from tokenrelay.model.families.family import EXPERT, Config, Family, Rule

__all__ = ["EXPERT", "FAMILIES", "Config", "Family", "Rule", "read_hf_config"]

FAMILIES = {
    "arcee": Family(ungated.read_arcee, ungated.RULES),
    "cohere": Family(cohere.read, cohere.RULES),
    "cohere2": Family(cohere.read_cohere2, cohere.RULES),
    "cwm": Family(mistral.read_cwm, mistral.RULES),
    "ernie4_5": Family(glm.read_ernie, glm.RULES),
    "exaone4": Family(exaone4.read, exaone4.RULES),
    "falcon": Family(falcon.read, falcon.RULES),
    "gemma": Family(gemma.read, gemma.RULES),
    "gemma2": Family(gemma.read_gemma2, gemma.GEMMA2_RULES),
    "gemma3": Family(gemma.read_gemma3, gemma.GEMMA3_RULES),
    "gemma3_text": Family(gemma.read_gemma3, gemma.GEMMA3_RULES),
    "glm": Family(glm.read, glm.RULES),
    "glm4": Family(glm.read_glm4, glm.GLM4_RULES),
    "gpt2": Family(gpt2.read, gpt2.RULES),
    "gpt_bigcode": Family(gpt_bigcode.read, gpt_bigcode.RULES),
    "gpt_neo": Family(gpt_neo.read, gpt_neo.RULES),
    "gpt_neox": Family(gpt_neox.read, gpt_neox.RULES),
    "gpt_oss": Family(gpt_oss.read, gpt_oss.RULES),
    "gptj": Family(gptj.read, gptj.RULES),
    "granite": Family(granite.read, granite.RULES),
    "granitemoe": Family(granite.read_moe, granite.MOE_RULES),
    "granitemoeshared": Family(granite.read_moe, granite.MOE_RULES),
    "helium": Family(glm.read_helium, glm.RULES),
    "llama": Family(llama.read, llama.RULES),
    "ministral": Family(mistral.read_ministral, mistral.RULES),
    "mistral": Family(mistral.read, mistral.RULES),
    "mixtral": Family(mixtral.read, mixtral.RULES),
    "nemotron": Family(ungated.read_nemotron, ungated.NEMOTRON_RULES),
    "olmo": Family(olmo.read, olmo.RULES),
    "olmo2": Family(olmo.read_olmo2, olmo.OLMO2_RULES),
    "olmo3": Family(olmo.read_olmo3, olmo.OLMO2_RULES),
    "olmoe": Family(olmo.read_olmoe, olmo.OLMOE_RULES),
    "openai-gpt": Family(gpt2.read_gpt1, gpt2.RULES),
    "opt": Family(opt.read, opt.RULES),
    "phi": Family(phi.read, phi.RULES),
    "phi3": Family(phi3.read, phi3.RULES),
    "qwen2": Family(qwen2.read, qwen2.RULES),
    "qwen2_moe": Family(qwen2.read_moe, qwen2.RULES),
    "qwen3": Family(qwen3.read, qwen3.RULES),
    "qwen3_moe": Family(qwen3.read_moe, qwen3.RULES),
    "seed_oss": Family(seed_oss.read, seed_oss.RULES),
    "smollm3": Family(smollm3.read, smollm3.RULES),
    "stablelm": Family(stablelm.read, stablelm.RULES),
    "starcoder2": Family(ungated.read_starcoder2, ungated.RULES),
    "vanilla-transformer": Family(vanilla_transformer.read, vanilla_transformer.RULES),
}


def read_hf_config(config: Config) -> ModelConfig:
    """The network that a ``config.json`` describes.

    Raises:
        UnsupportedModelError: unknown ``model_type``, or a switch that would change the result and is not built.
        KeyError, TypeError, AttributeError, ArithmeticError: a key is missing, or its value is of the wrong kind.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedModelError(f"model_type {model_type!r} is not supported; known: {', '.join(sorted(FAMILIES))}")
    return family.read(config)
