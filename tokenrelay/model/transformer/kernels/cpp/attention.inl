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

constexpr size_t TILE = 96;   // query vectors that share one pass over the keys
constexpr size_t CHUNK = 64;  // keys per softmax update: part of the result's definition

// `count` query vectors of a request from `vector` on, for `heads` kv heads from `head` on.
struct AttentionTask { size_t request, vector, count, head, heads; };

template <class W> struct AttentionTile {
    static constexpr bool QUANTIZED = sizeof(W) == 1;
    const AttentionParams& a;
    const int32_t* blocks;
    size_t kv_head, dim, padded, block_size;
    float q[TILE * MAX_HEAD_DIM];  // rows so far apart whatever dim is: a constant needs no register
    float acc[TILE * MAX_HEAD_DIM];  // lanes in the order of load_shuffled
    float scores[TILE * CHUNK];
    float wide_keys[MAX_HEAD_DIM * CHUNK], wide_values[CHUNK * MAX_HEAD_DIM];  // of one chunk, as float
    f32x16 total[TILE];
    float highest[TILE];
    size_t first[TILE], end[TILE];  // the keys that a vector sees in this pass; neither falls within a head

    AttentionTile(const AttentionParams& params, size_t request)
        : a(params), blocks(params.block_tables + request * params.max_blocks), dim(params.cache.head_dim),
          padded((dim + 15) / 16 * 16), block_size(params.cache.block_size) {}

    size_t block(size_t position) const { return blocks[position / block_size]; }

    size_t slot(size_t position) const {
        return (block(position) * a.cache.num_kv_heads + kv_head) * block_size + position % block_size;
    }

    const W* keys(size_t position) const {
        const W* of_block = (const W*)a.cache.keys + block(position) * a.cache.key_stride;
        return of_block + kv_head * dim * block_size + position % block_size;
    }

    const W* values(size_t position) const {
        const W* of_block = (const W*)a.cache.values + block(position) * a.cache.value_stride;
        return of_block + (kv_head * block_size + position % block_size) * padded;
    }

    // Brings the same keys of the next chunk into the cache: blocks are scattered, so the hardware cannot guess them.
    TR_INLINE void prefetch_block(size_t position) const {
        const char* k = (const char*)keys(position);
        const char* v = (const char*)values(position);
        for (size_t d = 0; d < dim; d += 64 / sizeof(W) / 16) __builtin_prefetch(k + d * block_size * sizeof(W), 0, 2);
        for (size_t i = 0; i < 16 * padded * sizeof(W); i += 64) __builtin_prefetch(v + i, 0, 2);
    }

    // Many vectors read the same chunk: what is narrow becomes float once, not once per group of rows.
    void widen_chunk(size_t start, size_t to) {
        const size_t dims = dim, step = block_size, width = padded;  // what is stored might be these, for all the compiler knows
        for (size_t key = 0; key < to; key += 16) {
            const W *k = keys(start + key), *v = values(start + key);
            for (size_t d = 0; d < dims; d++) store(wide_keys + d * CHUNK + key, load(k + d * step));
            for (size_t i = 0; i < 16 * width; i += 16) store(wide_values + key * width + i, load_shuffled(v + i));
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
            multiply(s, q + row * MAX_HEAD_DIM, MAX_HEAD_DIM, k, CHUNK, dim);
        } else {
            const W* k[P];
            for (int p = 0; p < P; p++) k[p] = keys(start + key + p * 16);
            multiply<true>(s, q + row * MAX_HEAD_DIM, MAX_HEAD_DIM, k, block_size, dim);
            for (int r = 0; r < R; r++)
                for (int p = 0; p < P; p++) s[r][p] = in_order(s[r][p], k[p]);
        }
        for (int p = 0; p < P; p++) {
            if constexpr (QUANTIZED) {
                f32x16 scale = load(a.cache.key_scales + slot(start + key + p * 16));
                for (int r = 0; r < R; r++) s[r][p] = mul(s[r][p], scale);
            }
            for (int r = 0; r < R; r++) store(scores + (row + r) * CHUNK + key + p * 16, s[r][p]);
        }
    }

    __attribute__((noinline)) void cap_scores(size_t row, size_t from, size_t to) {
        const f32x16 softcap = broadcast(a.softcap), inverse = broadcast(1.0f / a.softcap);
        for (float* s = scores + row * CHUNK + from; s < scores + row * CHUNK + to; s += 16)
            store(s, mul(softcap, tanh(mul(load(s), inverse))));
    }

    // The scores of keys [from, to) of a chunk, in blocks of 16; what a row does not see gets -inf.
    template <int R, bool WIDE> void score(size_t row, size_t start, size_t from, size_t to) {
        constexpr int P = panels_for(R) > 2 ? 2 : panels_for(R);
        size_t key = from / 16 * 16;
        for (; key + (P - 1) * 16 < to; key += P * 16) score_blocks<R, P, WIDE>(row, start, key);
        for (; key < to; key += 16) score_blocks<R, 1, WIDE>(row, start, key);
        for (size_t r = row; r < row + R; r++) {
            if (a.softcap > 0.0f) cap_scores(r, from / 16 * 16, to);
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
        const f32x16 highest_now = broadcast(highest[row]);
        f32x16 sum = total[row];
        for (size_t i = 0; i < CHUNK; i += 16) {
            const f32x16 weight = exp(sub(load(s + i), highest_now));
            store(s + i, weight);
            sum = add(sum, weight);
        }
        total[row] = sum;
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
            multiply(sums, scores + row * CHUNK + from, CHUNK, v, padded, to - from);
        } else {
            size_t skipped = from % 16;
            for (size_t key = from - skipped; key < to; key += 16, skipped = 0) {
                const W* v[P];
                for (int p = 0; p < P; p++) v[p] = values(start + key) + skipped * padded + d + p * 16;
                const float* weights = scores + row * CHUNK + key + skipped;
                multiply<true>(sums, weights, CHUNK, v, padded, least(to - key, size_t(16)) - skipped);
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

    // One pass over the keys that the vectors see, chunk by chunk: `count` vectors of each head, heads after each other.
    template <bool WIDE> void attend(size_t count, size_t head, size_t heads) {
        const size_t most = end[count - 1];
        for (size_t start = first[0] / CHUNK * CHUNK; start < most; start += CHUNK)
            for (size_t h = 0; h < heads; h++) {
                kv_head = head + h;
                for (size_t next = start + CHUNK; next < least(start + 2 * CHUNK, most); next += 16) prefetch_block(next);
                if (WIDE) widen_chunk(start, least(most - start, CHUNK));
                for_row_groups(h * count, (h + 1) * count, [&](size_t row, auto rows) {
                    attend_chunk<decltype(rows)::value, WIDE>(row, start);
                });
            }
    }

    void attend(const AttentionTask& task) {
        if (task.count > MAX_ROWS) attend<true>(task.count, task.head, task.heads);
        else attend<false>(task.count, task.head, task.heads);
    }

    void run(const AttentionTask& task) {
        const size_t group = a.num_heads / a.cache.num_kv_heads, rows = task.count * task.heads;
        const size_t token = a.query_start[task.request], tokens = a.query_start[task.request + 1] - token;
        const size_t window = a.window ? a.window : SIZE_MAX / 2, whole = a.num_sinks + window;  // sees all keys below
        auto vector = [&](size_t r) { return task.vector + r % task.count; };
        auto position = [&](size_t r) { return a.seq_lens[task.request] - tokens + vector(r) / group; };
        auto query_head = [&](size_t r) { return (task.head + r / task.count) * group + vector(r) % group; };
        auto offset = [&](size_t r) {  // in q and in out
            return ((token + vector(r) / group) * a.num_heads + query_head(r)) * dim;
        };
        auto load_queries = [&](const float* from) {
            for (size_t r = 0; r < rows; r++)
                for (size_t d = 0, at = offset(r); d < dim; d++) q[r * MAX_HEAD_DIM + d] = from[at + d] * a.scale;
        };
        for (size_t r = 0; r < rows; r++) {
            const float sink = a.sink_logits ? a.sink_logits[query_head(r)] : -__builtin_inff(), one = 1.0f;
            highest[r] = sink > -__FLT_MAX__ ? sink : -__FLT_MAX__;  // finite: keys hidden before others weigh exp(-inf) = 0
            total[r] = load_part(&one, a.sink_logits ? 1 : 0);
            for (size_t d = 0; d < padded; d++) acc[r * padded + d] = 0.0f;
        }
        if (a.num_sinks && position(task.count - 1) >= whole) {
            load_queries(a.q_sink ? a.q_sink : a.q);
            for (size_t r = 0; r < rows; r++) first[r] = 0, end[r] = position(r) < whole ? 0 : a.num_sinks;
            attend(task);
        }
        load_queries(a.q);
        for (size_t r = 0; r < rows; r++) {
            first[r] = position(r) < whole ? 0 : position(r) + 1 - window;
            end[r] = position(r) + 1;
        }
        attend(task);
        for (size_t r = 0; r < rows; r++) {
            f32x16 share = broadcast(1.0f / sum(total[r]));
            const float* sums = acc + r * padded;
            float* to = a.out + offset(r);
            for (size_t d = 0; d < dim; d += 16)
                store_part(to + d, mul(in_order(load(sums + d), (const W*)nullptr), share), dim - d);
        }
    }
};

// Tiles of a request's query vectors, one kv head each; or all heads of a request that has few, where there are requests
// enough for all threads: its blocks are read in one piece. Last first: the late tiles of a prefill see the most keys.
void paged_attention(const AttentionParams* params) {
    const AttentionParams& a = *params;
    const size_t kv_heads = a.cache.num_kv_heads, group = a.num_heads / kv_heads;
    const bool many = a.num_requests >= 4 * tr_num_threads();
    auto vectors = [&](size_t b) { return size_t(a.query_start[b + 1] - a.query_start[b]) * group; };
    auto heads = [&](size_t b) { return many && vectors(b) * kv_heads <= TILE ? kv_heads : 1; };
    auto* first_task = static_cast<size_t*>(__builtin_alloca((a.num_requests + 1) * sizeof(size_t)));
    first_task[0] = 0;
    for (int64_t b = 0; b < a.num_requests; b++)
        first_task[b + 1] = first_task[b] + (vectors(b) + TILE - 1) / TILE * (kv_heads / heads(b));
    const size_t tasks = first_task[a.num_requests];
    parallel_for(tasks, [&](size_t i) {
        const size_t index = tasks - 1 - i;
        size_t low = 0, high = a.num_requests;
        while (high - low > 1) {
            size_t middle = (low + high) / 2;
            (first_task[middle] <= index ? low : high) = middle;
        }
        const size_t parts = kv_heads / heads(low), tile = (index - first_task[low]) / parts * TILE;
        const AttentionTask task{low, tile, least(vectors(low) - tile, TILE), (index - first_task[low]) % parts, heads(low)};
        if (a.cache.type == INT8) AttentionTile<int8_t>(a, low).run(task);
        else if (a.cache.type == BFLOAT16) AttentionTile<bf16>(a, low).run(task);
        else AttentionTile<float>(a, low).run(task);
    });
}

}  // namespace
