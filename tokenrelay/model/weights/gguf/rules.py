"""Where the tensors of a GGUF file go. Its names are uniform, so that one table serves every architecture. No torch."""

from __future__ import annotations

from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import Rule
from tokenrelay.model.weights.gguf.architectures import ARCHITECTURES
from tokenrelay.model.weights.gguf.metadata import GGUFMetadata

_B = r"blk\.(\d+)\."
_KIND = r"\.(weight|bias)"


def gguf_rules(metadata: GGUFMetadata, config: ModelConfig) -> tuple[Rule, ...]:
    """The table for this file: what depends on the architecture are the order of q's and k's rows, and which norm is
    which."""
    order = "paired_rotary" if ARCHITECTURES[metadata.architecture].rotates_pairs else ""
    return (*_ENDS, *_norms(metadata, config), *_attention(order), *_mlp(metadata), *_EXPERTS)


_ENDS = (
    Rule(r"token_embd\.(weight)", r"embed_tokens.\1"),
    Rule(r"position_embd\.(weight)", r"embed_positions.\1"),
    Rule(r"output_norm" + _KIND, r"norm.\1"),
    Rule(r"output" + _KIND, r"lm_head.\1"),
    Rule(r"rope_freqs\.weight|rope_factors_(?:long|short)\.weight", ""),  # configuration, not weights
)
_EXPERTS = (
    Rule(_B + r"ffn_gate_inp" + _KIND, r"layers.\1.mlp.router.\2"),
    Rule(_B + r"ffn_(gate|up)_exps" + _KIND, r"layers.\1.mlp.experts.{expert}.up_proj.\3", r"\2"),
    Rule(_B + r"ffn_down_exps" + _KIND, r"layers.\1.mlp.experts.{expert}.down_proj.\2"),
    Rule(_B + r"ffn_(gate|up)\.(\d+)\.(weight)", r"layers.\1.mlp.experts.\3.up_proj.\4", r"\2"),  # before 2024-04
    Rule(_B + r"ffn_down\.(\d+)\.(weight)", r"layers.\1.mlp.experts.\2.down_proj.\3"),
    Rule(_B + r"ffn_(gate|up)_shexp\.(weight)", r"layers.\1.mlp.shared_expert.up_proj.\3", r"\2"),
    Rule(_B + r"ffn_down_shexp\.(weight)", r"layers.\1.mlp.shared_expert.down_proj.\2"),
    Rule(_B + r"ffn_gate_inp_shexp\.(weight)", r"layers.\1.mlp.shared_gate.\2", layout="one_row"),
)


def _attention(order: str) -> tuple[Rule, ...]:
    return (
        Rule(_B + r"attn_([qk])" + _KIND, r"layers.\1.attention.qkv_proj.\3", r"\2", order),
        Rule(_B + r"attn_(v)" + _KIND, r"layers.\1.attention.qkv_proj.\3", r"\2"),
        Rule(_B + r"attn_qkv" + _KIND, r"layers.\1.attention.qkv_proj.\2"),
        Rule(_B + r"attn_output" + _KIND, r"layers.\1.attention.o_proj.\2"),
        Rule(_B + r"attn_([qk])_norm\.(weight)", r"layers.\1.attention.\2_norm.\3"),
        Rule(_B + r"attn_sinks\.weight", r"layers.\1.attention.sinks"),
    )


def _norms(metadata: GGUFMetadata, config: ModelConfig) -> tuple[Rule, ...]:
    """By where they are applied; "post" has nothing before a sublayer, and Falcon 40B's first is its MLP's."""
    before_mlp = ARCHITECTURES[metadata.architecture].mlp_norm
    names = {"attn_norm": "attention_norm", before_mlp: "mlp_norm"}
    if config.norm_placement == "post":
        names = {"post_attention_norm": "attention_norm", "post_ffw_norm": "mlp_norm"}
    elif config.norm_placement == "sandwich":
        names |= {"post_attention_norm": "attention_post_norm", "post_ffw_norm": "mlp_post_norm"}
    elif "blk.0.attn_norm_2.weight" in metadata.tensors:
        names = {"attn_norm_2": "attention_norm", "attn_norm": "mlp_norm"}
    return tuple(Rule(_B + name + _KIND, rf"layers.\1.{target}.\2") for name, target in names.items())


def _mlp(metadata: GGUFMetadata) -> tuple[Rule, ...]:
    """Phi-3 has gate and up in one matrix, in our order; others that have no gate have only up."""
    up = "up" if any(name.endswith("ffn_gate.weight") for name in metadata.tensors) else ""
    return (
        Rule(_B + r"ffn_(gate)" + _KIND, r"layers.\1.mlp.up_proj.\3", r"\2"),
        Rule(_B + r"ffn_up" + _KIND, r"layers.\1.mlp.up_proj.\2", up),
        Rule(_B + r"ffn_down" + _KIND, r"layers.\1.mlp.down_proj.\2"),
    )
