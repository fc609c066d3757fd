// paged_attention: online softmax in chunks of 64 keys, anchored at absolute position 0.
//
// A query vector (one token, one head) takes every chunk in order, and inside it every key in order, whatever tile it is
// computed in. A hidden key adds exp = 0 and a hidden chunk multiplies by exp(0) = 1, so both leave the bits alone:
// a row of a prefill chunk equals the same row of a decode step.
namespace {

constexpr size_t TILE = 48;   // query vectors that share one pass over the keys
constexpr size_t CHUNK = 64;  // keys per softmax update: part of the result's definition

template <class W> struct AttentionTile {
    const AttentionParams& a;
    const int32_t* blocks;
    size_t kv_head, dim, padded, block_size;
    float q[TILE * MAX_HEAD_DIM];
    float acc[TILE * MAX_HEAD_DIM];
    float scores[TILE * CHUNK];
    f32x16 total[TILE];
    float highest[TILE];
    size_t visible[TILE];  // number of keys the vector may see

    AttentionTile(const AttentionParams& params, size_t request, size_t head)
        : a(params), blocks(params.block_tables + request * params.max_blocks), kv_head(head), dim(params.head_dim),
          padded((dim + 15) / 16 * 16), block_size(params.block_size) {}

    const W* keys(size_t position) const {
        size_t block = blocks[position / block_size];
        return (const W*)a.k_cache + (block * a.num_kv_heads + kv_head) * dim * block_size + position % block_size;
    }

    const W* values(size_t position) const {
        size_t block = blocks[position / block_size];
        return (const W*)a.v_cache + ((block * a.num_kv_heads + kv_head) * block_size + position % block_size) * padded;
    }

    // Brings the same keys of the next chunk into the cache: blocks are scattered, so the hardware cannot guess them.
    TR_INLINE void prefetch_block(size_t position) const {
        const char* k = (const char*)keys(position);
        const char* v = (const char*)values(position);
        for (size_t d = 0; d < dim; d += 64 / sizeof(W) / 16) __builtin_prefetch(k + d * block_size * sizeof(W), 0, 2);
        for (size_t i = 0; i < 16 * padded * sizeof(W); i += 64) __builtin_prefetch(v + i, 0, 2);
    }

    // scores[row][key] = sum over d ascending of q[row][d] * K[d][key]; hidden keys get -inf.
    template <int R, int P> TR_INLINE void score_blocks(size_t row, size_t start, size_t key) {
        f32x16 s[R][P];
        const W* k[P];
        for (int p = 0; p < P; p++) k[p] = keys(start + key + p * 16);
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) s[r][p] = broadcast(0.0f);
        multiply<R, P>(s, q + row * dim, dim, k, block_size, dim);
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) store(scores + (row + r) * CHUNK + key + p * 16, s[r][p]);
    }

    template <int R> void score(size_t row, size_t start, size_t seen) {
        constexpr int P = panels_for(R) > 2 ? 2 : panels_for(R);
        size_t key = 0;
        for (; key + (P - 1) * 16 < seen; key += P * 16) score_blocks<R, P>(row, start, key);
        for (; key < seen; key += 16) score_blocks<R, 1>(row, start, key);
        for (size_t r = row; r < row + R; r++)
            for (size_t i = visible[r] > start ? visible[r] - start : 0; i < CHUNK; i++)
                scores[r * CHUNK + i] = -__builtin_inff();
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

    // acc[row][d] += weight[row][key] * V[key][d], key ascending.
    template <int R, int P> TR_INLINE void weigh_columns(size_t row, size_t start, size_t seen, size_t d) {
        f32x16 sums[R][P];
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) sums[r][p] = load(acc + (row + r) * padded + d + p * 16);
        for (size_t key = 0; key < seen; key += 16) {
            const W* v[P];
            for (int p = 0; p < P; p++) v[p] = values(start + key) + d + p * 16;
            multiply<R, P>(sums, scores + row * CHUNK + key, CHUNK, v, padded, least(seen - key, size_t(16)));
        }
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) store(acc + (row + r) * padded + d + p * 16, sums[r][p]);
    }

    template <int R> void weigh(size_t row, size_t start, size_t seen) {
        constexpr int P = panels_for(R);
        size_t d = 0;
        for (; d + P * 16 <= padded; d += P * 16) weigh_columns<R, P>(row, start, seen, d);
        for (; d < padded; d += 16) weigh_columns<R, 1>(row, start, seen, d);
    }

    void run(size_t request, size_t first, size_t count) {
        const size_t group = a.num_heads / a.num_kv_heads;
        const size_t token = a.query_start[request], tokens = a.query_start[request + 1] - token;
        auto offset = [&](size_t vector) {  // in q and in out
            return ((token + vector / group) * a.num_heads + kv_head * group + vector % group) * dim;
        };
        for (size_t r = 0; r < count; r++) {
            visible[r] = a.seq_lens[request] - tokens + (first + r) / group + 1;
            highest[r] = -__builtin_inff();
            total[r] = broadcast(0.0f);
            for (size_t d = 0; d < dim; d++) q[r * dim + d] = a.q[offset(first + r) + d] * a.scale;
            for (size_t d = 0; d < padded; d++) acc[r * padded + d] = 0.0f;
        }
        const size_t most = a.seq_lens[request] - tokens + (first + count - 1) / group + 1;
        for (size_t start = 0; start < most; start += CHUNK)
            for_row_groups(0, count, [&](size_t row, auto rows) {
                constexpr int R = decltype(rows)::value;
                if (visible[row + R - 1] <= start) return;
                size_t seen = least(visible[row + R - 1] - start, CHUNK);
                if (row == 0)
                    for (size_t next = start + CHUNK; next < least(start + 2 * CHUNK, most); next += 16)
                        prefetch_block(next);
                score<R>(row, start, seen);
                for (int r = 0; r < R; r++) soften(row + r);
                weigh<R>(row, start, seen);
            });
        for (size_t r = 0; r < count; r++) {
            f32x16 share = broadcast(1.0f / sum(total[r]));
            for (size_t d = 0; d < dim; d += 16)
                store_part(a.out + offset(first + r) + d, mul(load(acc + r * padded + d), share), dim - d);
        }
    }
};

// Tasks are (request, tile of its query vectors, kv head), last first: the late tiles of a prefill see the most keys.
void paged_attention(const AttentionParams* params) {
    const AttentionParams& a = *params;
    const size_t group = a.num_heads / a.num_kv_heads;
    auto vectors = [&](size_t b) { return size_t(a.query_start[b + 1] - a.query_start[b]) * group; };
    auto* first_tile = static_cast<size_t*>(__builtin_alloca((a.num_requests + 1) * sizeof(size_t)));
    first_tile[0] = 0;
    for (int64_t b = 0; b < a.num_requests; b++) first_tile[b + 1] = first_tile[b] + (vectors(b) + TILE - 1) / TILE;
    const size_t tasks = first_tile[a.num_requests] * a.num_kv_heads;
    parallel_for(tasks, [&](size_t task) {
        size_t index = (tasks - 1 - task) / a.num_kv_heads, head = (tasks - 1 - task) % a.num_kv_heads;
        size_t low = 0, high = a.num_requests;
        while (high - low > 1) {
            size_t middle = (low + high) / 2;
            (first_tile[middle] <= index ? low : high) = middle;
        }
        size_t first = (index - first_tile[low]) * TILE, count = least(vectors(low) - first, TILE);
        if (a.is_bf16) AttentionTile<bf16>(a, low, head).run(low, first, count);
        else AttentionTile<float>(a, low, head).run(low, first, count);
    });
}

}  // namespace
