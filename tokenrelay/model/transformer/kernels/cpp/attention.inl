// paged_attention: online softmax in chunks of 64 keys, anchored at absolute position 0.
//
// A query vector (one token, one head) takes every chunk in order, and inside it every key in order, whatever tile it is
// computed in: first the sinks, if its window has moved past them, then the keys from its window's first to its own. A
// hidden key adds exp = 0 and a hidden chunk multiplies by exp(0) = 1 or does nothing, so both leave the bits alone: a row
// of a prefill chunk equals the same row of a decode step. Keys that no vector of a group sees are not read at all.
//
// A cache of integers is multiplied as it is: query vectors are rounded to integers with a scale each, and so are a row's
// weights of a chunk, under the chunk's own maximum, times the scales of their values. As many bits as keep the sums within 32,
// which makes them exact in any order. (after SageAttention, Zhang et al. 2024, which has 8 bits)
//
// Exponents are of two: scores are multiplied by log2(e).
namespace {

constexpr size_t TILE = 96;   // query vectors that share one pass over the keys
constexpr size_t CHUNK = 64;  // keys per softmax update: part of the result's definition

// `count` query vectors of a request from `vector` on, for `heads` kv heads from `head` on.
struct AttentionTask { size_t request, vector, count, head, heads; };

// What elements of the cache are multiplied with, and what their products are summed in.
template <class W> struct Products { using Factor = int16_t; using Sum = i32x16; };
template <> struct Products<float> { using Factor = float; using Sum = f32x16; };

constexpr float no_scales[16] = {};

// Where 16 keys of a head and their values begin, and their scales, if they have some.
template <class W> struct Sixteen {
    const W *keys, *values;
    const float *key_scales, *value_scales;
};

// What turns a chunk's weights into integers that are multiplied with its values, for the rows that see keys [from, to) of it.
struct ValueScales {
    alignas(64) float factors[CHUNK];
    alignas(64) float lost[CHUNK];  // 0, or NaN of a value that is not a number
    float unit;                     // of the sums
    bool all_numbers;
    size_t from, to;
};

template <class W> struct AttentionTile {
    using Factor = typename Products<W>::Factor;
    using Sum = typename Products<W>::Sum;
    static constexpr bool INTEGER = sizeof(W) <= 2;
    static constexpr size_t PAIR = pair_of<W>();
    const AttentionParams& a;
    const int32_t* blocks;
    size_t dim, padded, block_size;
    Sixteen<W> chunk[CHUNK / 16];   // what is seen of the current one
    Factor q[TILE * MAX_HEAD_DIM];  // rows so far apart whatever dim is: a constant needs no register
    float q_scale[TILE];
    float exponent[TILE + 16];  // of two, is a score times this
    float acc[TILE * MAX_HEAD_DIM];
    alignas(64) float scores[TILE * CHUNK];
    Factor rounded[INTEGER ? TILE * CHUNK : 1];  // of a chunk's weights
    float rounded_scale[TILE];
    ValueScales values;
    f32x16 total[TILE];
    float highest[TILE + 16];  // score so far, in powers of two
    size_t first[TILE], end[TILE];  // the keys that a vector sees in this pass; neither falls within a head

    AttentionTile(const AttentionParams& params, size_t request)
        : a(params), blocks(params.block_tables + request * params.max_blocks), dim(params.cache.head_dim),
          padded((dim + 15) / 16 * 16), block_size(params.cache.block_size) {}

    // The largest integer of which n, times the cache's largest, are summed within 32 bits.
    static float largest_factor(size_t n) { return float(least(32767, 0x7fffffff / (size_t(largest_integer<W>()) * n))); }

    // Where 16 keys from a position on lie, for one head: the first of them.
    void find(size_t position, size_t kv_head, Sixteen<W>& of) const {
        const KVCache& cache = a.cache;
        const size_t block = blocks[position / block_size], offset = position % block_size, size = block_size;
        of.keys = (const W*)cache.keys + block * cache.key_stride + kv_head * whole_pairs<W>(dim) * size + offset * PAIR;
        of.values = (const W*)cache.values + block * cache.value_stride + (kv_head * size + offset) * padded;
        if (!INTEGER) return;
        const size_t slot = (block * cache.num_kv_heads + kv_head) * size + offset;
        of.key_scales = cache.key_scales + slot, of.value_scales = cache.value_scales + slot;
    }

    // Brings keys of the next chunk into the cache: blocks are scattered, so the hardware cannot guess them.
    TR_INLINE void prefetch(const Sixteen<W>& of) const {
        const char *k = (const char*)of.keys, *v = (const char*)of.values;
        for (size_t d = 0; d < dim; d += 64 / sizeof(W) / 16) __builtin_prefetch(k + d * block_size * sizeof(W), 0, 2);
        for (size_t i = 0; i < 16 * padded * sizeof(W); i += 64) __builtin_prefetch(v + i, 0, 2);
        if (!INTEGER) return;
        __builtin_prefetch(of.key_scales, 0, 2);
        __builtin_prefetch(of.value_scales, 0, 2);
    }

    // A query vector, times the scale of all scores.
    void take_query(size_t row, const float* from) {
        Factor* to = q + row * MAX_HEAD_DIM;
        if constexpr (INTEGER) {
            const f32x16 scale = broadcast(a.scale), zero = broadcast(0.0f);
            f32x16 part[MAX_HEAD_DIM / 16], top = zero;
            for (size_t d = 0; d < dim; d += 16) {
                part[d / 16] = mul(load_part(from + d, dim - d), scale);
                top = max(top, max(part[d / 16], sub(zero, part[d / 16])));
            }
            const Step step(maximum(top), largest_factor(dim));
            for (size_t d = 0; d < dim; d += 16) store_rounded(to + d, mul(part[d / 16], broadcast(step.factor)));
            q_scale[row] = step.scale == 0.0f ? 1.0f : step.scale;  // times -inf, for a hidden key
        } else {
            for (size_t d = 0; d < dim; d++) to[d] = from[d] * a.scale;
            q_scale[row] = 1.0f;
        }
        exponent[row] = a.softcap > 0.0f ? LOG2_E : q_scale[row] * LOG2_E;
    }

    // scores[row][key] = sum over d ascending of q[row][d] * K[d][key], times the key's scale if they are integers.
    template <int R, int P> TR_INLINE void score_blocks(size_t row, size_t key) {
        Sum s[R][P];
        const W* k[P];
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) s[r][p] = nothing<Sum>();
        for (int p = 0; p < P; p++) k[p] = chunk[key / 16 + p].keys;
        multiply(s, q + row * MAX_HEAD_DIM, MAX_HEAD_DIM, k, block_size * PAIR, whole_pairs<W>(dim) / PAIR);
        for (int p = 0; p < P; p++) {
            float* to = scores + row * CHUNK + key + p * 16;
            if constexpr (INTEGER) {
                const f32x16 scale = load(chunk[key / 16 + p].key_scales);
                for (int r = 0; r < R; r++) store(to + r * CHUNK, mul(to_float(s[r][p]), scale));
            } else {
                for (int r = 0; r < R; r++) store(to + r * CHUNK, s[r][p]);
            }
        }
    }

    __attribute__((noinline)) void cap_scores(size_t row, size_t from, size_t to) {
        const f32x16 softcap = broadcast(a.softcap), inverse = broadcast(q_scale[row] / a.softcap);
        for (float* s = scores + row * CHUNK + from; s < scores + row * CHUNK + to; s += 16)
            store(s, mul(softcap, tanh(mul(load(s), inverse))));
    }

    // Where a key stands in the chunk that begins at `start`, or on which side of it.
    static size_t beyond(size_t key, size_t start) { return key > start ? least(key - start, CHUNK) : 0; }

    // The scores of keys [from, to) of a chunk, in blocks of 16; what a row does not see gets -inf.
    template <int R> void score(size_t row, size_t start, size_t from, size_t to) {
        constexpr int P = INTEGER || panels_for(R) < 2 ? panels_for(R) : 2;
        size_t key = from / 16 * 16;
        for (; key + (P - 1) * 16 < to; key += P * 16) score_blocks<R, P>(row, key);
        for (; key < to; key += 16) score_blocks<R, 1>(row, key);
        for (size_t r = row; r < row + R; r++) {
            if (a.softcap > 0.0f) cap_scores(r, from / 16 * 16, to);
            float* s = scores + r * CHUNK;
            for (size_t i = 0; i < beyond(first[r], start); i++) s[i] = -__builtin_inff();
            for (size_t i = beyond(end[r], start); i < CHUNK; i++) s[i] = -__builtin_inff();
        }
    }

    // What is of all rows that see keys [from, to) of the chunk.
    __attribute__((noinline)) void scale_values(size_t from, size_t to) {
        f32x16 top = broadcast(0.0f), lost = top;
        for (size_t i = 0; i < CHUNK; i += 16) {
            const float* scales = chunk[i / 16].value_scales;
            float seen[16], none[16];
            for (size_t lane = 0; lane < 16; lane++) {
                seen[lane] = i + lane >= from && i + lane < to ? scales[lane] : 0.0f;
                none[lane] = seen[lane] * 0.0f;
                seen[lane] = none[lane] == 0.0f ? seen[lane] : 0.0f;
            }
            store(values.factors + i, load(seen));
            store(values.lost + i, load(none));
            top = max(load(values.factors + i), top), lost = add(lost, load(values.lost + i));
        }
        const Step step(maximum(top), largest_factor(CHUNK));
        for (size_t i = 0; i < CHUNK; i += 16) store(values.factors + i, mul(load(values.factors + i), broadcast(step.factor)));
        values.unit = step.scale, values.all_numbers = sum(lost) == 0.0f, values.from = from, values.to = to;
    }

    // Turns R rows' scores into weights, and brings what was summed so far under the new maximum. Integers: under the chunk's
    // maximum, times the scales of their values, rounded. A value that is not a number makes a row's total none, if it sees it.
    template <int R> TR_INLINE void soften(size_t row, size_t start) {
        constexpr size_t N = CHUNK / 16;
        f32x16 tops[R];
        for (int r = 0; r < R; r++) {
            const float* s = scores + (row + r) * CHUNK;
            tops[r] = max(max(load(s), load(s + 16)), max(load(s + 32), load(s + 48)));
        }
        const f32x16 scale = load(exponent + row), before = load(highest + row);
        const f32x16 top = max(mul(maxima(tops), scale), broadcast(-__FLT_MAX__)), now = max(top, before);  // finite
        alignas(64) float below[16], kept[16], share[16];
        store(below, sub(broadcast(0.0f), INTEGER ? top : now));
        store(kept, exp2_below_0(sub(before, now)));
        store(share, exp2_below_0(INTEGER ? sub(top, now) : broadcast(0.0f)));
        store_part(highest + row, now, R);
        for (int r = 0; r < R; r++) {
            float* s = scores + (row + r) * CHUNK;
            f32x16 part[N];
            for (size_t i = 0; i < N; i++)
                part[i] = exp2_below_0(fma(load(s + i * 16), broadcast(exponent[row + r]), broadcast(below[r])));
            const f32x16 sums = add(add(part[0], part[1]), add(part[2], part[3]));
            f32x16& all = total[row + r];
            if (kept[r] != 1.0f) {
                all = mul(all, broadcast(kept[r]));
                float* to = acc + (row + r) * MAX_HEAD_DIM;
                for (size_t d = 0; d < padded; d += 16) store(to + d, mul(load(to + d), broadcast(kept[r])));
            }
            all = fma(sums, broadcast(share[r]), all);
            if constexpr (INTEGER) {
                const size_t from = beyond(first[row + r], start), to = beyond(end[row + r], start);
                if (values.from != from || values.to != to) scale_values(from, to);
                for (size_t i = 0; !values.all_numbers && i < N; i++)
                    all = add(all, zero_where_below(load(values.lost + i * 16), part[i], __FLT_MIN__));
                for (size_t i = 0; i < N; i++) part[i] = mul(part[i], load(values.factors + i * 16));
                for (size_t i = 0; i < N; i += 2) store_rounded(rounded + (row + r) * CHUNK + i * 16, part[i], part[i + 1]);
                rounded_scale[row + r] = share[r] * values.unit;
            } else {
                for (size_t i = 0; i < N; i++) store(s + i * 16, part[i]);
            }
        }
    }

    // acc[row][d] += weight[row][key] * V[key][d], key ascending.
    template <int R, int P> TR_INLINE void weigh_columns(size_t row, size_t from, size_t to, size_t d) {
        Sum sums[R][P];
        float* const out = acc + row * MAX_HEAD_DIM + d;
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++)
                if constexpr (INTEGER) sums[r][p] = nothing<Sum>();
                else sums[r][p] = load(out + r * MAX_HEAD_DIM + p * 16);
        for (size_t key = from / PAIR * PAIR, next; key < to; key = next) {
            next = least(key / 16 * 16 + 16, to);
            const W* v[P];
            for (int p = 0; p < P; p++) v[p] = chunk[key / 16].values + key % 16 * padded + (d + p * 16) * PAIR;
            const Factor* weights;
            if constexpr (INTEGER) weights = rounded + row * CHUNK + key;
            else weights = scores + row * CHUNK + key;
            multiply(sums, weights, CHUNK, v, padded * PAIR, whole_pairs<W>(next - key) / PAIR);
        }
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) {
                float* to_row = out + r * MAX_HEAD_DIM + p * 16;
                if constexpr (INTEGER) store(to_row, fma(to_float(sums[r][p]), broadcast(rounded_scale[row + r]), load(to_row)));
                else store(to_row, sums[r][p]);
            }
    }

    template <int R> void weigh(size_t row, size_t from, size_t to) {
        constexpr int P = panels_for(R);
        size_t d = 0;
        for (; d + P * 16 <= padded; d += P * 16) weigh_columns<R, P>(row, from, to, d);
        for (; d < padded; d += 16) weigh_columns<R, 1>(row, from, to, d);
    }

    // The rows' share of one chunk.
    template <int R> void attend_chunk(size_t row, size_t start) {
        if (end[row + R - 1] <= start || first[row] >= start + CHUNK) return;
        const size_t from = beyond(first[row], start), to = beyond(end[row + R - 1], start);
        score<R>(row, start, from, to);
        soften<R>(row, start);
        weigh<R>(row, from, to);
    }

    // One pass over the keys that the vectors see, chunk by chunk: as many of each head, heads after each other.
    void attend(const AttentionTask& task) {
        const size_t count = task.count, most = end[count - 1];
        for (size_t start = first[0] / CHUNK * CHUNK; start < most; start += CHUNK) {
            const size_t from = beyond(first[0], start), to = beyond(most, start);
            for (size_t head = 0; head < task.heads; head++) {
                for (Sixteen<W>& of : chunk) of.value_scales = no_scales;
                for (size_t key = from / 16 * 16; key < to; key += 16) find(start + key, task.head + head, chunk[key / 16]);
                for (size_t next = start + CHUNK; next < least(start + 2 * CHUNK, most); next += 16) {
                    Sixteen<W> coming;
                    find(next, task.head + head, coming);
                    prefetch(coming);
                }
                values.to = SIZE_MAX;  // not yet known
                for_row_groups(head * count, (head + 1) * count, [&](size_t row, auto rows) {
                    attend_chunk<decltype(rows)::value>(row, start);
                });
            }
        }
    }

    void run(const AttentionTask& task) {
        const size_t group = a.num_heads / a.cache.num_kv_heads, rows = task.count * task.heads;
        const size_t token = a.query_start[task.request], tokens = a.query_start[task.request + 1] - token;
        const size_t window = a.window ? a.window : SIZE_MAX / 2, whole = a.num_sinks + window;  // sees all keys below
        size_t position[TILE], place[TILE];  // of a row: its token's, and its vector's in q and in out
        for (size_t r = 0; r < rows; r++) {
            const size_t vector = task.vector + r % task.count, head = (task.head + r / task.count) * group + vector % group;
            position[r] = a.seq_lens[task.request] - tokens + vector / group;
            place[r] = ((token + vector / group) * a.num_heads + head) * dim;
            const float one = 1.0f, sink = a.sink_logits ? a.sink_logits[head] * LOG2_E : -__builtin_inff();
            highest[r] = sink > -__FLT_MAX__ ? sink : -__FLT_MAX__;  // finite: keys hidden before others weigh exp(-inf) = 0
            total[r] = a.sink_logits ? load_part(&one, 1) : broadcast(0.0f);
            for (size_t d = 0; d < padded; d += 16) store(acc + r * MAX_HEAD_DIM + d, broadcast(0.0f));
        }
        auto load_queries = [&](const float* from) {
            for (size_t r = 0; r < rows; r++) take_query(r, from + place[r]);
        };
        if (a.num_sinks && position[task.count - 1] >= whole) {
            load_queries(a.q_sink ? a.q_sink : a.q);
            for (size_t r = 0; r < rows; r++) first[r] = 0, end[r] = position[r] < whole ? 0 : a.num_sinks;
            attend(task);
        }
        load_queries(a.q);
        for (size_t r = 0; r < rows; r++) {
            first[r] = position[r] < whole ? 0 : position[r] + 1 - window;
            end[r] = position[r] + 1;
        }
        attend(task);
        for (size_t r = 0; r < rows; r++) {
            f32x16 share = broadcast(1.0f / sum(total[r]));
            const float* sums = acc + r * MAX_HEAD_DIM;
            float* to = a.out + place[r];
            for (size_t d = 0; d < dim; d += 16)
                store_part(to + d, mul(load(sums + d), share), dim - d);
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
        const size_t tiles = (vectors(low) + TILE - 1) / TILE, of_request = index - first_task[low];
        const size_t tile = of_request % tiles * TILE;
        const AttentionTask task{low, tile, least(vectors(low) - tile, TILE), of_request / tiles, heads(low)};
        if (a.cache.type == INT8) AttentionTile<int8_t>(a, low).run(task);
        else if (a.cache.type == INT16) AttentionTile<int16_t>(a, low).run(task);
        else AttentionTile<float>(a, low).run(task);
    });
}

}  // namespace
