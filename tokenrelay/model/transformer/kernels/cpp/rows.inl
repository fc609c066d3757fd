// Everything that works on one row at a time: norms, activations, rotary positions and the cache write.
namespace {

constexpr size_t WORK_PER_TASK = 4096;  // elements; below that, handing them over costs more than it brings

template <class F> TR_INLINE void parallel_chunks(size_t rows, size_t chunk, F f) {
    parallel_for((rows + chunk - 1) / chunk, [&](size_t task) {
        for (size_t row = task * chunk; row < least((task + 1) * chunk, rows); row++) f(row);
    });
}

template <class F> TR_INLINE void parallel_rows(size_t rows, size_t columns, F f) {
    parallel_chunks(rows, WORK_PER_TASK / columns + 1, f);
}

// A cache of integers holds pairs: of a key's elements, and of keys for each element of a value. (what integer products take)
template <class W> constexpr size_t pair_of() { return sizeof(W) <= 2 ? 2 : 1; }
template <class W> constexpr size_t whole_pairs(size_t n) { return (n + pair_of<W>() - 1) / pair_of<W>() * pair_of<W>(); }
template <class W> constexpr float largest_integer() { return sizeof(W) == 1 ? 127.0f : 8191.0f; }

// Integers up to `largest` for numbers up to `highest`; what is smaller than any factor can make of it is 0. A NaN or an infinity
// lives on in the scale.
struct Step {
    float factor = 0.0f, scale = 0.0f;
    Step(float highest, float largest) {
        if (highest < 1e-34f) return;  // a NaN is not
        scale = highest / largest;
        if (highest < __builtin_inff()) factor = largest / highest;
    }
};

// The row to normalise: x itself, or the residual stream after x was added to it.
TR_INLINE const float* add_residual(const float* x, float* residual, size_t columns) {
    if (!residual) return x;
    for (size_t i = 0; i < columns; i++) residual[i] = residual[i] + x[i];
    return residual;
}

// out = (x - mean) * factor * weight + bias
template <class W>
TR_INLINE void scale_row(const float* x, float mean, float factor, const W* weight, const W* bias, float* out,
                         size_t columns) {
    for (size_t i = 0; i < columns; i += 16) {
        size_t n = columns - i;
        f32x16 y = mul(sub(load_part(x + i, n), broadcast(mean)), broadcast(factor));
        y = mul(y, load_part(weight + i, n));
        if (bias) y = add(y, load_part(bias + i, n));
        store_part(out + i, y, n);
    }
}

template <bool CENTER, class W>
TR_INLINE void norm_row(const float* x, const W* weight, const W* bias, float* out, size_t columns, float eps) {
    float mean = 0.0f;
    if (CENTER) {
        f32x16 total = broadcast(0.0f);
        for (size_t i = 0; i < columns; i += 16) total = add(total, load_part(x + i, columns - i));
        mean = sum(total) / float(columns);
    }
    f32x16 squares = broadcast(0.0f);
    for (size_t i = 0; i < columns; i += 16) {
        f32x16 d = sub(load_part(x + i, columns - i, mean), broadcast(mean));
        squares = fma(d, d, squares);
    }
    float factor = 1.0f / __builtin_sqrtf(sum(squares) / float(columns) + eps);
    scale_row(x, mean, factor, weight, bias, out, columns);
}

template <bool CENTER, class W>
void norm_of(const float* x, float* residual, const W* weight, const W* bias, float* out, size_t rows, size_t columns,
             float eps) {
    parallel_rows(rows, columns, [=](size_t row) {
        size_t start = row * columns;
        const float* from = add_residual(x + start, residual ? residual + start : nullptr, columns);
        norm_row<CENTER>(from, weight, bias, out + start, columns, eps);
    });
}

template <bool CENTER>
void norm(const float* x, float* residual, const void* weight, const void* bias, float* out, int64_t rows,
          int64_t columns, float eps, int64_t is_bf16) {
    if (is_bf16) norm_of<CENTER>(x, residual, (const bf16*)weight, (const bf16*)bias, out, rows, columns, eps);
    else norm_of<CENTER>(x, residual, (const float*)weight, (const float*)bias, out, rows, columns, eps);
}

void head_norm(const HeadNormParams* params) {
    const HeadNormParams& a = *params;
    const size_t q_size = a.q_size, kv_size = a.kv_size;
    parallel_rows(a.num_tokens, q_size + 2 * kv_size, [&](size_t token) {
        float *q = a.qkv + token * (q_size + 2 * kv_size), *k = q + q_size;
        const float* no_bias = nullptr;
        for (size_t i = 0; i < q_size; i += a.q_width) norm_row<false>(q + i, a.q_weight, no_bias, q + i, a.q_width, a.eps);
        for (size_t i = 0; i < kv_size; i += a.k_width) norm_row<false>(k + i, a.k_weight, no_bias, k + i, a.k_width, a.eps);
    });
}

TR_INLINE f32x16 times_sigmoid(f32x16 x, f32x16 u) {
    return div(x, add(broadcast(1.0f), exp(sub(broadcast(0.0f), u))));
}

TR_INLINE f32x16 gelu(f32x16 x) {
    float lanes[16];
    store(lanes, x);
    for (float& lane : lanes) lane = 0.5f * lane * (1.0f + __builtin_erff(lane * 0.70710678118654752f));
    return load(lanes);
}

template <int KIND> TR_INLINE f32x16 activate(f32x16 x) {
    if (KIND == SILU) return times_sigmoid(x, x);
    if (KIND == GELU) return gelu(x);
    if (KIND == RELU || KIND == RELU2) {
        const f32x16 positive = max(broadcast(0.0f), x);
        return KIND == RELU ? positive : mul(positive, positive);
    }
    // 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
    f32x16 inner = fma(mul(x, x), broadcast(0.044715f * 1.5957691216057308f), broadcast(1.5957691216057308f));
    return times_sigmoid(x, mul(x, inner));
}

template <int KIND> TR_INLINE f32x16 activate_gate(f32x16 gate, f32x16 up) {
    if (KIND != SWIGLU_OAI) return mul(activate<KIND>(gate), up);
    const f32x16 limit = broadcast(7.0f), one = broadcast(1.0f);
    gate = min(limit, gate);
    up = min(limit, max(broadcast(-7.0f), up));
    return mul(times_sigmoid(gate, mul(gate, broadcast(1.702f))), add(up, one));
}

template <int KIND> TR_INLINE void activate_row(const float* x, float* out, size_t columns, bool gated) {
    for (size_t i = 0; i < columns; i += 16) {
        size_t n = columns - i;
        const f32x16 gate = load_part(x + i, n);
        f32x16 y = gated ? activate_gate<KIND>(gate, load_part(x + columns + i, n)) : activate<KIND>(gate);
        store_part(out + i, y, n);
    }
}

// f(Count<kind>{}).
template <class F> TR_INLINE void with_activation(int64_t kind, F f) {
    if (kind == SILU) f(Count<SILU>{});
    else if (kind == GELU) f(Count<GELU>{});
    else if (kind == GELU_TANH) f(Count<GELU_TANH>{});
    else if (kind == RELU) f(Count<RELU>{});
    else if (kind == RELU2) f(Count<RELU2>{});
    else f(Count<SWIGLU_OAI>{});
}

void activate_row(const float* x, float* out, size_t columns, int64_t kind, bool gated) {
    with_activation(kind, [=](auto of) { activate_row<decltype(of)::value>(x, out, columns, gated); });
}

void activation(const float* x, float* out, int64_t rows, int64_t columns, int64_t kind, int64_t gated) {
    parallel_rows(rows, columns, [=](size_t row) {
        activate_row(x + row * columns * (gated ? 2 : 1), out + row * columns, columns, kind, gated);
    });
}

// best[row] = the first index of the row's largest element; of a row without numbers 0.
void argmax(const float* x, int64_t* best, int64_t rows, int64_t columns) {
    const size_t width = columns, parts = (width + WORK_PER_TASK - 1) / WORK_PER_TASK;
    auto* highest = static_cast<float*>(__builtin_alloca(rows * parts * sizeof(float)));
    parallel_for(rows * parts, [=](size_t task) {
        const float* row = x + task / parts * width;
        const size_t begin = task % parts * WORK_PER_TASK, end = least(begin + WORK_PER_TASK, width);
        f32x16 top = broadcast(-__builtin_inff());
        for (size_t i = begin; i < end; i += 16) top = max(load_part(row + i, end - i, -__builtin_inff()), top);
        highest[task] = maximum(top);
    });
    parallel_for(rows, [=](size_t row) {
        size_t part = 0;
        for (size_t other = 1; other < parts; other++)
            if (highest[row * parts + other] > highest[row * parts + part]) part = other;
        const float* from = x + row * width;
        size_t i = part * WORK_PER_TASK;
        while (i < width && from[i] != highest[row * parts + part]) i++;
        best[row] = i < width ? i : 0;
    });
}

// One head, NeoX style: of the first rotary_dim elements i turns with i + rotary_dim / 2 by the angle of its position.
TR_INLINE void rotate(const float* x, const float* cos_sin, float* out, size_t head_dim, size_t rotary_dim) {
    const size_t half = rotary_dim / 2;
    const float *cosine = cos_sin, *sine = cos_sin + half;
    for (size_t i = 0; i < half; i++) {
        out[i] = __builtin_fmaf(x[i], cosine[i], -(x[i + half] * sine[i]));
        out[i + half] = __builtin_fmaf(x[i + half], cosine[i], x[i] * sine[i]);
    }
    __builtin_memcpy(out + rotary_dim, x + rotary_dim, (head_dim - rotary_dim) * sizeof(float));
}

// A key or value vector into the cache, element i at to[i / pair * step + i % pair].
TR_INLINE void write_vector(const float* x, size_t dim, float* to, size_t pair, size_t step, float*, size_t) {
    for (size_t i = 0; i < dim; i++) to[i / pair * step + i % pair] = x[i];
}

// Integers: x * (largest integer / max |x|), rounded to even. A NaN or an infinity lives on in the scale.
template <class W>
TR_INLINE void write_vector(const float* x, size_t dim, W* to, size_t pair, size_t step, float* scales, size_t slot) {
    int32_t highest = 0;  // as bits: ordered as the numbers, a NaN above all
    for (size_t i = 0; i < dim; i++) {
        const int32_t size = int32_t(bits_of(x[i]) & 0x7fffffff);
        highest = size > highest ? size : highest;
    }
    const Step steps(float_of(uint32_t(highest)), largest_integer<W>());
    scales[slot] = steps.scale;
    W integers[MAX_HEAD_DIM + 1];
    for (size_t i = 0; i < dim; i++) integers[i] = steps.factor > 0.0f ? W(round_to_even(x[i] * steps.factor)) : W(0);
    integers[dim] = 0;
    if (pair == 1) {
        for (size_t i = 0; i < dim; i++) to[i * step] = integers[i];
    } else {
        for (size_t i = 0; i < dim; i += 2) __builtin_memcpy(to + i / 2 * step, integers + i, 2 * sizeof(W));
    }
}

template <class W> void write_token(const RotateParams& a, size_t token) {
    constexpr size_t pair = pair_of<W>();
    const KVCache& cache = a.cache;
    const size_t dim = cache.head_dim, padded = (dim + 15) / 16 * 16, kv_heads = cache.num_kv_heads;
    const float* from = a.qkv + token * (a.num_heads + 2 * kv_heads) * dim;
    const size_t rotary_dim = a.rotary_dim;
    const float* angles = rotary_dim ? a.cos_sin + a.positions[token] * rotary_dim : nullptr;
    for (size_t h = 0; h < size_t(a.num_heads); h++, from += dim)
        rotate(from, angles, a.q + (token * a.num_heads + h) * dim, dim, rotary_dim);
    if (a.slots[token] < 0) return;
    const size_t size = cache.block_size, block = a.slots[token] / size, offset = a.slots[token] % size;
    for (size_t h = 0; h < kv_heads; h++, from += dim) {
        float turned[MAX_HEAD_DIM];
        rotate(from, angles, turned, dim, rotary_dim);
        W* keys = (W*)cache.keys + block * cache.key_stride + h * whole_pairs<W>(dim) * size + offset * pair;
        W* values = (W*)cache.values + block * cache.value_stride + (h * size + offset / pair * pair) * padded + offset % pair;
        const size_t slot = (block * kv_heads + h) * size + offset;
        write_vector(turned, dim, keys, pair, size * pair, cache.key_scales, slot);
        write_vector(from + kv_heads * dim, dim, values, 1, pair, cache.value_scales, slot);
    }
}

void rotate_and_cache(const RotateParams* params) {
    const RotateParams& a = *params;
    // A block's keys share cache lines: of a prompt, one thread writes them.
    const size_t width = (a.num_heads + 2 * a.cache.num_kv_heads) * a.cache.head_dim, least_chunk = WORK_PER_TASK / width + 1;
    parallel_chunks(a.num_tokens, a.num_tokens < 64 ? least_chunk : 16, [&](size_t token) {
        if (a.cache.type == INT8) write_token<int8_t>(a, token);
        else if (a.cache.type == INT16) write_token<int16_t>(a, token);
        else write_token<float>(a, token);
    });
}

}  // namespace
