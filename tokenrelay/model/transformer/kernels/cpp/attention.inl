// paged_attention: online softmax in chunks of 64 keys, anchored at absolute position 0.
//
// A query vector (one token, one head) takes every chunk in order, and inside it every key in order, whatever tile it is
// computed in: first the sinks, if its window has moved past them, then the keys from its window's first to its own. A
// hidden key adds exp = 0 and a hidden chunk multiplies by exp(0) = 1 or does nothing, so both leave the bits alone: a row
// of a prefill chunk equals the same row of a decode step. Keys that no vector of a group sees are not read at all.
//
// int8: a score is the product with the integers times the key's scale; the softmax's weight, once summed, is multiplied
// by the value's scale and then by the integers.
namespace {

constexpr size_t TILE = 48;   // query vectors that share one pass over the keys
constexpr size_t CHUNK = 64;  // keys per softmax update: part of the result's definition

template <class W> struct AttentionTile {
    static constexpr bool QUANTIZED = sizeof(W) == 1;
    const AttentionParams& a;
    const int32_t* blocks;
    size_t kv_head, dim, padded, block_size;
    float q[TILE * MAX_HEAD_DIM];
    float acc[TILE * MAX_HEAD_DIM];
    float scores[TILE * CHUNK];
    float wide_keys[MAX_HEAD_DIM * CHUNK], wide_values[CHUNK * MAX_HEAD_DIM];  // of one chunk, as float
    f32x16 total[TILE];
    float highest[TILE];
    size_t first[TILE], end[TILE];  // the keys that a vector sees in this pass; neither falls from vector to vector

    AttentionTile(const AttentionParams& params, size_t request, size_t head)
        : a(params), blocks(params.block_tables + request * params.max_blocks), kv_head(head), dim(params.cache.head_dim),
          padded((dim + 15) / 16 * 16), block_size(params.cache.block_size) {}

    size_t head_block(size_t position) const { return blocks[position / block_size] * a.cache.num_kv_heads + kv_head; }

    size_t slot(size_t position) const { return head_block(position) * block_size + position % block_size; }

    const W* keys(size_t position) const {
        return (const W*)a.cache.keys + head_block(position) * dim * block_size + position % block_size;
    }

    const W* values(size_t position) const { return (const W*)a.cache.values + slot(position) * padded; }

    // Brings the same keys of the next chunk into the cache: blocks are scattered, so the hardware cannot guess them.
    TR_INLINE void prefetch_block(size_t position) const {
        const char* k = (const char*)keys(position);
        const char* v = (const char*)values(position);
        for (size_t d = 0; d < dim; d += 64 / sizeof(W) / 16) __builtin_prefetch(k + d * block_size * sizeof(W), 0, 2);
        for (size_t i = 0; i < 16 * padded * sizeof(W); i += 64) __builtin_prefetch(v + i, 0, 2);
    }

    // Many vectors read the same chunk: what is narrow becomes float once, not once per group of rows.
    void widen_chunk(size_t start, size_t from, size_t to) {
        for (size_t key = from / 16 * 16; key < to; key += 16) {
            const W *k = keys(start + key), *v = values(start + key);
            for (size_t d = 0; d < dim; d++) store(wide_keys + d * CHUNK + key, load(k + d * block_size));
            for (size_t i = 0; i < 16 * padded; i += 16) store(wide_values + key * padded + i, load(v + i));
        }
    }

    // scores[row][key] = sum over d ascending of q[row][d] * K[d][key], times the key's scale if it has one.
    template <int R, int P, bool WIDE> TR_INLINE void score_blocks(size_t row, size_t start, size_t key) {
        f32x16 s[R][P];
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) s[r][p] = broadcast(0.0f);
        if constexpr (WIDE) {
            const float* k[P];
            for (int p = 0; p < P; p++) k[p] = wide_keys + key + p * 16;
            multiply<R, P>(s, q + row * dim, dim, k, CHUNK, dim);
        } else {
            const W* k[P];
            for (int p = 0; p < P; p++) k[p] = keys(start + key + p * 16);
            multiply<R, P>(s, q + row * dim, dim, k, block_size, dim);
        }
        for (int p = 0; p < P; p++) {
            if constexpr (QUANTIZED) {
                f32x16 scale = load(a.cache.key_scales + slot(start + key + p * 16));
                for (int r = 0; r < R; r++) s[r][p] = mul(s[r][p], scale);
            }
            for (int r = 0; r < R; r++) store(scores + (row + r) * CHUNK + key + p * 16, s[r][p]);
        }
    }

    // The scores of keys [from, to) of a chunk, in blocks of 16; what a row does not see gets -inf.
    template <int R, bool WIDE> void score(size_t row, size_t start, size_t from, size_t to) {
        constexpr int P = panels_for(R) > 2 ? 2 : panels_for(R);
        size_t key = from / 16 * 16;
        for (; key + (P - 1) * 16 < to; key += P * 16) score_blocks<R, P, WIDE>(row, start, key);
        for (; key < to; key += 16) score_blocks<R, 1, WIDE>(row, start, key);
        for (size_t r = row; r < row + R; r++) {
            float* s = scores + r * CHUNK;
            const size_t hidden = first[r] > start ? least(first[r] - start, CHUNK) : 0;
            for (size_t i = 0; i < hidden; i++) s[i] = -__builtin_inff();
            for (size_t i = end[r] > start ? end[r] - start : 0; i < CHUNK; i++) s[i] = -__builtin_inff();
        }
    }

    // Turns scores into weights under the new maximum, and brings what was summed so far under it as well.
    TR_INLINE void soften(size_t row) {
        float* s = scores + row * CHUNK;
        f32x16 top = max(max(load(s), load(s + 16)), max(load(s + 32), load(s + 48)));
        float before = highest[row], now = maximum(top);
        if (now > before) {
            highest[row] = now;
            f32x16 factor = exp(broadcast(before - now));
            total[row] = mul(total[row], factor);
            float* sums = acc + row * padded;
            for (size_t d = 0; d < padded; d += 16) store(sums + d, mul(load(sums + d), factor));
        }
        for (size_t i = 0; i < CHUNK; i += 16) {
            f32x16 weight = exp(sub(load(s + i), broadcast(highest[row])));
            store(s + i, weight);
            total[row] = add(total[row], weight);
        }
    }

    template <int R> void scale_weights(size_t row, size_t start, size_t from, size_t to) {
        for (size_t key = from / 16 * 16; key < to; key += 16) {
            f32x16 scale = load(a.cache.value_scales + slot(start + key));
            for (size_t r = row; r < row + R; r++) {
                float* weights = scores + r * CHUNK + key;
                store(weights, mul(load(weights), scale));
            }
        }
    }

    // acc[row][d] += weight[row][key] * V[key][d], key ascending.
    template <int R, int P, bool WIDE>
    TR_INLINE void weigh_columns(size_t row, size_t start, size_t from, size_t to, size_t d) {
        f32x16 sums[R][P];
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) sums[r][p] = load(acc + (row + r) * padded + d + p * 16);
        if constexpr (WIDE) {
            const float* v[P];
            for (int p = 0; p < P; p++) v[p] = wide_values + from * padded + d + p * 16;
            multiply<R, P>(sums, scores + row * CHUNK + from, CHUNK, v, padded, to - from);
        } else {
            size_t skipped = from % 16;
            for (size_t key = from - skipped; key < to; key += 16, skipped = 0) {
                const W* v[P];
                for (int p = 0; p < P; p++) v[p] = values(start + key) + skipped * padded + d + p * 16;
                const float* weights = scores + row * CHUNK + key + skipped;
                multiply<R, P>(sums, weights, CHUNK, v, padded, least(to - key, size_t(16)) - skipped);
            }
        }
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) store(acc + (row + r) * padded + d + p * 16, sums[r][p]);
    }

    template <int R, bool WIDE> void weigh(size_t row, size_t start, size_t from, size_t to) {
        constexpr int P = panels_for(R);
        if constexpr (QUANTIZED) scale_weights<R>(row, start, from, to);
        size_t d = 0;
        for (; d + P * 16 <= padded; d += P * 16) weigh_columns<R, P, WIDE>(row, start, from, to, d);
        for (; d < padded; d += 16) weigh_columns<R, 1, WIDE>(row, start, from, to, d);
    }

    // The rows' share of one chunk.
    template <int R, bool WIDE> void attend_chunk(size_t row, size_t start) {
        if (end[row + R - 1] <= start || first[row] >= start + CHUNK) return;
        const size_t from = first[row] > start ? first[row] - start : 0;
        const size_t to = least(end[row + R - 1] - start, CHUNK);
        score<R, WIDE>(row, start, from, to);
        for (int r = 0; r < R; r++) soften(row + r);
        weigh<R, WIDE>(row, start, from, to);
    }

    // One pass over the keys that the vectors see, chunk by chunk.
    template <bool WIDE> void attend(size_t count) {
        const size_t most = end[count - 1];
        for (size_t start = first[0] / CHUNK * CHUNK; start < most; start += CHUNK) {
            for (size_t next = start + CHUNK; next < least(start + 2 * CHUNK, most); next += 16) prefetch_block(next);
            if (WIDE) widen_chunk(start, 0, least(most - start, CHUNK));
            for_row_groups(0, count, [&](size_t row, auto rows) {
                attend_chunk<decltype(rows)::value, WIDE>(row, start);
            });
        }
    }

    void attend(size_t count) {
        if (count > MAX_ROWS) attend<true>(count);
        else attend<false>(count);
    }

    void run(size_t request, size_t vector, size_t count) {
        const size_t group = a.num_heads / a.cache.num_kv_heads;
        const size_t token = a.query_start[request], tokens = a.query_start[request + 1] - token;
        const size_t window = a.window ? a.window : SIZE_MAX / 2, whole = a.num_sinks + window;  // sees all keys below
        auto position = [&](size_t r) { return a.seq_lens[request] - tokens + (vector + r) / group; };
        auto offset = [&](size_t r) {  // in q and in out
            return ((token + (vector + r) / group) * a.num_heads + kv_head * group + (vector + r) % group) * dim;
        };
        auto load_queries = [&](const float* from) {
            for (size_t r = 0; r < count; r++)
                for (size_t d = 0; d < dim; d++) q[r * dim + d] = from[offset(r) + d] * a.scale;
        };
        for (size_t r = 0; r < count; r++) {
            highest[r] = -__FLT_MAX__;  // finite: hidden keys that come before all others weigh exp(-inf), nothing
            total[r] = broadcast(0.0f);
            for (size_t d = 0; d < padded; d++) acc[r * padded + d] = 0.0f;
        }
        if (a.num_sinks && position(count - 1) >= whole) {
            load_queries(a.q_sink ? a.q_sink : a.q);
            for (size_t r = 0; r < count; r++) first[r] = 0, end[r] = position(r) < whole ? 0 : a.num_sinks;
            attend(count);
        }
        load_queries(a.q);
        for (size_t r = 0; r < count; r++) {
            first[r] = position(r) < whole ? 0 : position(r) + 1 - window;
            end[r] = position(r) + 1;
        }
        attend(count);
        for (size_t r = 0; r < count; r++) {
            f32x16 share = broadcast(1.0f / sum(total[r]));
            for (size_t d = 0; d < dim; d += 16)
                store_part(a.out + offset(r) + d, mul(load(acc + r * padded + d), share), dim - d);
        }
    }
};

// Tasks are (request, tile of its query vectors, kv head), last first: the late tiles of a prefill see the most keys.
void paged_attention(const AttentionParams* params) {
    const AttentionParams& a = *params;
    const size_t kv_heads = a.cache.num_kv_heads, group = a.num_heads / kv_heads;
    auto vectors = [&](size_t b) { return size_t(a.query_start[b + 1] - a.query_start[b]) * group; };
    auto* first_tile = static_cast<size_t*>(__builtin_alloca((a.num_requests + 1) * sizeof(size_t)));
    first_tile[0] = 0;
    for (int64_t b = 0; b < a.num_requests; b++) first_tile[b + 1] = first_tile[b] + (vectors(b) + TILE - 1) / TILE;
    const size_t tasks = first_tile[a.num_requests] * kv_heads;
    parallel_for(tasks, [&](size_t task) {
        size_t index = (tasks - 1 - task) / kv_heads, head = (tasks - 1 - task) % kv_heads;
        size_t low = 0, high = a.num_requests;
        while (high - low > 1) {
            size_t middle = (low + high) / 2;
            (first_tile[middle] <= index ? low : high) = middle;
        }
        size_t first = (index - first_tile[low]) * TILE, count = least(vectors(low) - first, TILE);
        if (a.cache.type == INT8) AttentionTile<int8_t>(a, low, head).run(low, first, count);
        else if (a.cache.type == BFLOAT16) AttentionTile<bf16>(a, low, head).run(low, first, count);
        else AttentionTile<float>(a, low, head).run(low, first, count);
    });
}

}  // namespace
