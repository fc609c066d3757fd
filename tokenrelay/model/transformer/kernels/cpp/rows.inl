// Everything that works on one row at a time: norms, activations, rotary positions and the cache write.
namespace {

constexpr size_t WORK_PER_TASK = 16384;  // elements; below that, waking a thread costs more than it brings

template <class F> TR_INLINE void parallel_rows(size_t rows, size_t columns, F f) {
    size_t chunk = WORK_PER_TASK / columns + 1;
    parallel_for((rows + chunk - 1) / chunk, [&](size_t task) {
        for (size_t row = task * chunk; row < least((task + 1) * chunk, rows); row++) f(row);
    });
}

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
void norm_of(const float* x, float* residual, const W* weight, const W* bias, float* out, size_t rows, size_t columns,
             float eps) {
    parallel_rows(rows, columns, [=](size_t row) {
        size_t start = row * columns;
        const float* from = add_residual(x + start, residual ? residual + start : nullptr, columns);
        float mean = 0.0f;
        if (CENTER) {
            f32x16 total = broadcast(0.0f);
            for (size_t i = 0; i < columns; i += 16) total = add(total, load_part(from + i, columns - i));
            mean = sum(total) / float(columns);
        }
        f32x16 squares = broadcast(0.0f);
        for (size_t i = 0; i < columns; i += 16) {
            f32x16 d = sub(load_part(from + i, columns - i, mean), broadcast(mean));
            squares = fma(d, d, squares);
        }
        float factor = 1.0f / __builtin_sqrtf(sum(squares) / float(columns) + eps);
        scale_row(from, mean, factor, weight, bias, out + start, columns);
    });
}

template <bool CENTER>
void norm(const float* x, float* residual, const void* weight, const void* bias, float* out, int64_t rows,
          int64_t columns, float eps, int64_t is_bf16) {
    if (is_bf16) norm_of<CENTER>(x, residual, (const bf16*)weight, (const bf16*)bias, out, rows, columns, eps);
    else norm_of<CENTER>(x, residual, (const float*)weight, (const float*)bias, out, rows, columns, eps);
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
    if (KIND == RELU) return max(broadcast(0.0f), x);
    // 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
    f32x16 inner = fma(mul(x, x), broadcast(0.044715f * 1.5957691216057308f), broadcast(1.5957691216057308f));
    return times_sigmoid(x, mul(x, inner));
}

template <int KIND> void activation_of(const float* x, float* out, size_t rows, size_t columns, bool gated) {
    size_t stride = gated ? 2 * columns : columns;
    parallel_rows(rows, columns, [=](size_t row) {
        const float* from = x + row * stride;
        for (size_t i = 0; i < columns; i += 16) {
            size_t n = columns - i;
            f32x16 y = activate<KIND>(load_part(from + i, n));
            if (gated) y = mul(y, load_part(from + columns + i, n));
            store_part(out + row * columns + i, y, n);
        }
    });
}

void activation(const float* x, float* out, int64_t rows, int64_t columns, int64_t kind, int64_t gated) {
    if (kind == SILU) activation_of<SILU>(x, out, rows, columns, gated);
    else if (kind == GELU) activation_of<GELU>(x, out, rows, columns, gated);
    else if (kind == GELU_TANH) activation_of<GELU_TANH>(x, out, rows, columns, gated);
    else activation_of<RELU>(x, out, rows, columns, gated);
}

// One head, NeoX style: element i turns with element i + D/2 by the angle of its position.
TR_INLINE void rotate(const float* x, const float* cos_sin, float* out, size_t head_dim) {
    if (!cos_sin) {
        __builtin_memcpy(out, x, head_dim * sizeof(float));
        return;
    }
    size_t half = head_dim / 2;
    const float *cosine = cos_sin, *sine = cos_sin + half;
    for (size_t i = 0; i < half; i++) {
        out[i] = __builtin_fmaf(x[i], cosine[i], -(x[i + half] * sine[i]));
        out[i + half] = __builtin_fmaf(x[i + half], cosine[i], x[i] * sine[i]);
    }
}

struct CacheWrite {
    const float *qkv, *cos_sin;
    const int64_t *positions, *slots;
    float* q;
    size_t num_heads, num_kv_heads, head_dim, block_size;
};

template <class W> void write_token(const CacheWrite& a, W* k_cache, W* v_cache, size_t token) {
    const size_t dim = a.head_dim, padded = (dim + 15) / 16 * 16;
    const float* from = a.qkv + token * (a.num_heads + 2 * a.num_kv_heads) * dim;
    const float* angles = a.cos_sin ? a.cos_sin + a.positions[token] * dim : nullptr;
    for (size_t h = 0; h < a.num_heads; h++, from += dim)
        rotate(from, angles, a.q + (token * a.num_heads + h) * dim, dim);
    if (a.slots[token] < 0) return;
    size_t block = a.slots[token] / a.block_size, offset = a.slots[token] % a.block_size;
    for (size_t h = 0; h < a.num_kv_heads; h++, from += dim) {
        float turned[MAX_HEAD_DIM];
        rotate(from, angles, turned, dim);
        W* k = k_cache + (block * a.num_kv_heads + h) * dim * a.block_size + offset;
        W* v = v_cache + ((block * a.num_kv_heads + h) * a.block_size + offset) * padded;
        for (size_t i = 0; i < dim; i++) narrow(turned[i], k + i * a.block_size);
        for (size_t i = 0; i < dim; i++) narrow(from[a.num_kv_heads * dim + i], v + i);
    }
}

void rotate_and_cache(const float* qkv, const int64_t* positions, const float* cos_sin, void* k_cache, void* v_cache,
                      const int64_t* slots, float* q, int64_t rows, int64_t num_heads, int64_t num_kv_heads,
                      int64_t head_dim, int64_t block_size, int64_t is_bf16) {
    CacheWrite a{qkv, cos_sin, positions, slots, q, size_t(num_heads), size_t(num_kv_heads), size_t(head_dim),
                 size_t(block_size)};
    parallel_rows(rows, (num_heads + 2 * num_kv_heads) * head_dim, [&](size_t token) {
        if (is_bf16) write_token(a, static_cast<bf16*>(k_cache), static_cast<bf16*>(v_cache), token);
        else write_token(a, static_cast<float*>(k_cache), static_cast<float*>(v_cache), token);
    });
}

}  // namespace
