// forward: all layers of a decoder for one step, as transformer.py spells them out, in one call instead of hundreds.
namespace {

void add_update(const Forward& a, const Update& update, const AdaptedRows& of, int64_t out_features, const float* x,
                float* out) {
    const Matrix &down = update.a, &up = update.b;
    const int64_t width = up.out_features;
    linear(x + of.start * down.in_features, down.panels, nullptr, nullptr, a.low, of.count, down.in_features,
           down.out_features, down.bits);
    linear(a.low, up.panels, nullptr, nullptr, a.added, of.count, up.in_features, width, up.bits);
    parallel_rows(of.count, width, [=, from = a.added, to = out + of.start * out_features + update.first](size_t row) {
        for (int64_t i = 0; i < width; i++) to[row * out_features + i] += from[row * width + i];
    });
}

TR_INLINE bool is_quantized(const Matrix& m) { return m.bits <= 8 && !m.weight_only; }

// Of the rows of x. prepare(row, room) writes one first, where it belongs, or into the room if there is one, and returns it: a
// row that is quantized at once need not be anywhere, if no other call reads it. Quantized matrices activate what they give, if
// they are asked to.
template <class F>
void multiply(const Forward& a, const Layer& layer, MatrixOfLayer which, const float* x, float* out, F prepare,
              const Activated* activated = nullptr) {
    const Matrix& m = layer.matrices[which];
    if (is_quantized(m)) {
        const QuantizedLinear of{x,   (const uint8_t*)m.panels, m.scales, m.minima,      m.bias,
                                 out, a.scratch,                a.num_tokens, m.in_features, m.out_features, m.bits};
        const Quantized work(of, activated);
        const bool is_read_again = a.num_adapted || a.network.parallel;
        work.quantize([&](size_t row, float* room) { return prepare(row, is_read_again ? nullptr : room); });
        work.multiply_all();
    } else {
        parallel_rows(a.num_tokens, m.in_features, [&](size_t row) { prepare(row, nullptr); });
        linear(x, m.panels, m.scales, m.bias, out, a.num_tokens, m.in_features, m.out_features, m.bits);
    }
    for (int64_t i = 0; i < a.num_adapted; i++) {
        const Update& update = a.adapted[i].updates[(&layer - a.network.layers) * MATRICES + which];
        if (update.a.panels) add_update(a, update, a.adapted[i], m.out_features, x, out);
    }
}

// Of a row of x; if there is a residual, it is added to that, and this taken. Returns out, or without a norm what was taken.
TR_INLINE const float* normalise_row(const Forward& a, const Norm& of, const float* x, float* residual, float* out,
                                     size_t row) {
    const Network& n = a.network;
    const size_t columns = n.hidden_size, start = row * columns;
    const float* from = add_residual(x + start, residual ? residual + start : nullptr, columns);
    if (!of.weight) return from;
    if (n.centered_norms) norm_row<true>(from, of.weight, of.bias, out, columns, n.eps);
    else norm_row<false>(from, of.weight, of.bias, out, columns, n.eps);
    return out;
}

// f(i) for every element of an array [T, C].
template <class F> TR_INLINE void for_elements(const Forward& a, F f) {
    const size_t columns = a.network.hidden_size;
    parallel_rows(a.num_tokens, columns, [=](size_t row) {
        for (size_t i = row * columns; i < (row + 1) * columns; i++) f(i);
    });
}

// The layers' input: residual += x, and its norm if there is one.
struct Entering {
    const Forward& a;
    const Norm& norm;
    const float* operator()(size_t row, float* room) const {
        return normalise_row(a, norm, a.x, a.residual, room ? room : a.normed + row * a.network.hidden_size, row);
    }
    const float* result() const { return norm.weight ? a.normed : a.residual; }
};

// What is to be added to the residual: x, normalised and scaled.
void leave(const Forward& a, const Norm& of) {
    const float scale = a.network.residual_scale;
    const size_t columns = a.network.hidden_size;
    if (of.weight)
        parallel_rows(a.num_tokens, columns, [&](size_t row) { normalise_row(a, of, a.x, nullptr, a.x + row * columns, row); });
    if (scale != 1.0f) for_elements(a, [=, x = a.x](size_t i) { x[i] = x[i] * scale; });
}

void normalise_heads(const Forward& a, const Layer& layer) {
    const Network& n = a.network;
    const int64_t q_size = n.num_heads * layer.cache.head_dim, kv_size = layer.cache.num_kv_heads * layer.cache.head_dim;
    HeadNormParams params{a.wide,  layer.q_norm.weight, layer.k_norm.weight, a.num_tokens, q_size,
                          kv_size, n.q_norm_width,      n.k_norm_width,      n.eps};
    head_norm(&params);
}

void rotate(const Forward& a, const Layer& layer, const int64_t* positions, const int64_t* slots, float* q) {
    const Network& n = a.network;
    const float* const tables[] = {nullptr, a.cos_sin, n.local_cos_sin};  // by Rotation
    const float* cos_sin = tables[layer.rotation];
    const int64_t rotary_dim = cos_sin ? n.rotary_dim : 0;
    RotateParams params{layer.cache, a.wide, positions, cos_sin, slots, q, a.num_tokens, n.num_heads, rotary_dim};
    rotate_and_cache(&params);
}

void project(const Forward& a, const Layer& layer) {
    const Entering entering{a, layer.attention_norm};
    multiply(a, layer, QKV, entering.result(), a.wide, entering);
    if (layer.q_norm.weight) normalise_heads(a, layer);
    rotate(a, layer, a.positions, a.slots, a.q);
    if (a.q_sink) rotate(a, layer, a.sink_positions, a.nowhere, a.q_sink);
}

void attend(const Forward& a, const Layer& layer) {
    const Network& n = a.network;
    AttentionParams attention{layer.cache,       a.q,         a.q_sink,       a.block_tables, a.query_start, a.seq_lens,
                              layer.sink_logits, a.narrow,    a.num_requests, a.max_blocks,   n.num_heads,   layer.window,
                              layer.num_sinks,   layer.scale, n.softcap};
    paged_attention(&attention);
    const size_t columns = layer.matrices[OUT].in_features;
    multiply(a, layer, OUT, a.narrow, a.x, [&](size_t row, float*) { return a.narrow + row * columns; });
}

// Activated by the product itself, if it is quantized and nothing is added to it before.
template <class F> void feed_forward(const Forward& a, const Layer& layer, const float* hidden, float* out, F prepare) {
    const Matrix& up = layer.matrices[UP];
    const size_t width = up.out_features, columns = layer.matrices[DOWN].in_features;
    const Activated activated{a.narrow, a.network.activation, a.network.gated != 0};
    const bool at_once = is_quantized(up) && !a.num_adapted && columns % 16 == 0;
    multiply(a, layer, UP, hidden, a.wide, prepare, at_once ? &activated : nullptr);
    multiply(a, layer, DOWN, a.narrow, out, [&](size_t row, float*) {
        float* to = a.narrow + row * columns;
        if (!at_once) activate_row(a.wide + row * width, to, columns, activated.kind, activated.gated);
        return to;
    });
}

// What follows once the keys and values are cached.
void add_in_turn(const Forward& a, const Layer& layer) {
    attend(a, layer);
    leave(a, layer.attention_post_norm);
    const Entering entering{a, layer.mlp_norm};
    feed_forward(a, layer, entering.result(), a.x, entering);
    leave(a, layer.mlp_post_norm);
}

void add_in_parallel(const Forward& a, const Layer& layer) {
    attend(a, layer);
    const size_t columns = a.network.hidden_size;
    feed_forward(a, layer, a.normed, a.normed, [&](size_t row, float*) {
        float* to = a.normed + row * columns;
        if (layer.mlp_norm.weight) normalise_row(a, layer.mlp_norm, a.residual, nullptr, to, row);
        return to;
    });
    for_elements(a, [x = a.x, other = a.normed](size_t i) { x[i] = x[i] + other[i]; });
    leave(a, Norm{});
}

// Rows that are asked for, of each request its last ones, from where they stand to the front, or back.
void move_rows(const Forward& a, const int32_t* start, float* rows, size_t width, bool back) {
    for (int64_t i = 0; i < a.num_requests; i++) {
        const int64_t request = back ? a.num_requests - 1 - i : i, count = start[request + 1] - start[request];
        float *own = rows + (a.query_start[request + 1] - count) * width, *front = rows + start[request] * width;
        __builtin_memmove(back ? own : front, back ? front : own, count * width * sizeof(float));
    }
}

// What is left of a step in its last layer: the rows that are asked for, at the front. start: [B + 1], written.
Forward keep_results(const Forward& whole, int32_t* start) {
    const Network& n = whole.network;
    const size_t q_size = n.num_heads * n.layers[n.num_layers - 1].cache.head_dim;
    start[0] = 0;
    for (int64_t i = 0; i < whole.num_requests; i++) start[i + 1] = start[i] + whole.num_results[i];
    move_rows(whole, start, whole.residual, n.hidden_size, false);
    if (n.parallel) move_rows(whole, start, whole.normed, n.hidden_size, false);
    move_rows(whole, start, whole.q, q_size, false);
    if (whole.q_sink) move_rows(whole, start, whole.q_sink, q_size, false);
    Forward kept = whole;
    kept.query_start = start, kept.num_tokens = start[whole.num_requests];
    return kept;
}

void forward(const Forward* params) {
    const Forward& whole = *params;
    const Network& n = whole.network;
    Forward step = whole;
    auto* start = static_cast<int32_t*>(__builtin_alloca((whole.num_requests + 1) * sizeof(int32_t)));
    for_elements(whole, [residual = whole.residual](size_t i) { residual[i] = 0.0f; });
    for (int64_t i = 0; i < n.num_layers; i++) {
        const Layer& layer = n.layers[i];
        project(whole, layer);
        if (whole.num_results && i + 1 == n.num_layers) step = keep_results(whole, start);
        if (n.parallel) add_in_parallel(step, layer);
        else add_in_turn(step, layer);
    }
    const Entering leaving{step, n.final_norm};
    parallel_rows(step.num_tokens, n.hidden_size, [&](size_t row) { leaving(row, nullptr); });
    if (whole.num_results) move_rows(whole, start, n.final_norm.weight ? whole.normed : whole.residual, n.hidden_size, true);
}

}  // namespace
