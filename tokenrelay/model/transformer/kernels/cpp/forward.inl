// forward: all layers of a decoder for one step, as transformer.py spells them out, in one call instead of hundreds.
namespace {

void multiply(const Forward& a, const Matrix& m, const float* x, float* out) {
    if (m.bits <= 8 && !m.weight_only) {
        QuantizedLinear of{x,   (const uint8_t*)m.panels, m.scales, m.minima,      m.bias,
                           out, a.scratch,                a.num_tokens, m.in_features, m.out_features, m.bits};
        quantized_linear(&of);
    } else {
        linear(x, m.panels, m.scales, m.bias, out, a.num_tokens, m.in_features, m.out_features, m.bits);
    }
}

// residual += x, then normed = its norm.
void add_norm(const Forward& a, const Norm& norm_, const float* x) {
    auto normalise = a.centered_norms ? norm<true> : norm<false>;
    normalise(x, a.residual, norm_.weight, norm_.bias, a.normed, a.num_tokens, a.hidden_size, a.eps, 0);
}

void attend(const Forward& a, const Layer& layer) {
    RotateParams rotation{layer.cache, a.wide, a.positions, a.cos_sin, a.slots, a.q, a.num_tokens, a.num_heads};
    rotate_and_cache(&rotation);
    if (a.q_sink) {
        RotateParams again{layer.cache, a.wide, a.sink_positions, a.cos_sin, a.nowhere, a.q_sink, a.num_tokens, a.num_heads};
        rotate_and_cache(&again);
    }
    AttentionParams attention{layer.cache, a.q,            a.q_sink,     a.block_tables, a.query_start,
                              a.seq_lens,  a.narrow,       a.num_requests, a.max_blocks, a.num_heads,
                              layer.window, layer.num_sinks, layer.scale};
    paged_attention(&attention);
}

void forward(const Forward* params) {
    const Forward& a = *params;
    for (int64_t i = 0; i < a.num_layers; i++) {
        const Layer& layer = a.layers[i];
        add_norm(a, layer.attention_norm, a.x);
        multiply(a, layer.qkv, a.normed, a.wide);
        attend(a, layer);
        multiply(a, layer.out, a.narrow, a.x);
        add_norm(a, layer.mlp_norm, a.x);
        multiply(a, layer.up, a.normed, a.wide);
        activation(a.wide, a.narrow, a.num_tokens, layer.down.in_features, a.activation, a.gated);
        multiply(a, layer.down, a.narrow, a.x);
    }
    add_norm(a, a.final_norm, a.x);
}

}  // namespace
