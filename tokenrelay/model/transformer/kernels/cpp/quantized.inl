// quantized_linear: weights of 8 or 4 bits, activations of 8, and of more where they stick out; in groups of 32 along K.
//
// Within a group the products are summed as integers, which is exact in any order; then, groups ascending,
//   acc = fma(sum * w_scale, x_scale, acc), and acc = fma(x_scale * sum of x, minimum, acc) where weights have one;
// high parts are summed by themselves, and added at the end, + bias. So a row's bits depend on nothing but the row, whatever
// instructions do the sums.
//
// A sum begins as the bits of the float 1.5 * 2^23 (MAGIC), so its own are those of that float plus the sum: no conversion is
// needed, and fma(1.5 * 2^23 + sum, w_scale, -1.5 * 2^23 * w_scale) is their product, rounded once.
//
// An activation is 255 * high + low. The largest of a group makes its step, but none counts as more than six times the row's
// root mean square: the few beyond, which would drown the others in their rounding, have a high part, and are multiplied once
// more. (the outliers of LLM.int8(), by element instead of by column)
namespace {

constexpr float LARGEST = 127.0f;
constexpr float OUTLIER = 36.0f;  // an element squared, over the row's mean square: a row of K has less than K / 36 beyond
constexpr int32_t HIGH = 255;     // a unit of the high parts: the low ones are within 127 of 0
constexpr float TINY = 1e-24f;    // below, a group counts as zero: its factor would overflow, its products lose bits

// Of K at a time: two panels spread out take 24 KiB, in the first cache with the rows' activations.
constexpr size_t BLOCK_GROUPS = 24;

// So many rows lie interleaved, as their tile reads them: a group of each row, or its scale, after each other.
constexpr size_t INTERLEAVED = QUANTIZED_PANELS > 1 ? QUANTIZED_ROWS : 1;
static_assert(ROW_BLOCK % INTERLEAVED == 0, "a block begins with a tile");

struct Range { size_t begin, end; };

// Four activations with a high part: integers side by side, and their step times HIGH.
struct Outlier {
    int32_t high;
    float scale;
    uint32_t k, row;  // the row within the tile
};

struct Quantized {
    const QuantizedLinear& a;
    size_t groups;
    float* scales;      // [T, groups] interleaved: a step
    float* totals;      // the same: the group's sum, high parts included, as a number
    int32_t* sums;      // the same: of the low parts
    Outlier* outliers;  // [T, K / 32]: as many as a tile has, groups ascending
    uint32_t* counts;   // [T]: of the tile that begins there
    int8_t* low;        // [T, K] interleaved

    explicit Quantized(const QuantizedLinear& params)
        : a(params), groups(a.in_features / GROUP), scales((float*)a.scratch), totals(scales + a.rows * groups),
          sums((int32_t*)(totals + a.rows * groups)), outliers((Outlier*)(sums + a.rows * groups)),
          counts((uint32_t*)(outliers + a.rows * groups)), low((int8_t*)(counts + a.rows)) {}

    size_t panel_count() const { return (a.out_features + 15) / 16; }

    // Rows that lie interleaved are a tile: all of INTERLEAVED, or what is left at the end.
    size_t tile_begin(size_t row) const { return row / INTERLEAVED * INTERLEAVED; }
    size_t tile_rows(size_t row) const { return INTERLEAVED == 1 ? 1 : least(INTERLEAVED, a.rows - tile_begin(row)); }

    // A group with elements beyond LARGEST.
    void quantize_outliers(size_t row, size_t g, size_t at, float factor) const {
        const float* from = a.x + row * a.in_features + g * GROUP;
        int8_t* low_to = low + at * GROUP;
        alignas(4) int8_t high[GROUP];
        int32_t sum = 0, high_sum = 0;
        for (size_t i = 0; i < GROUP; i++) {
            const int32_t integer = round_to_even(from[i] * factor);
            const int32_t above = int32_t(uint32_t(integer + 127 + (HIGH << 12)) / HIGH) - (1 << 12);
            low_to[i] = int8_t(integer - above * HIGH), high[i] = int8_t(above);
            sum += low_to[i], high_sum += above;
        }
        const size_t first = tile_begin(row);
        Outlier* const of_tile = outliers + first * groups;
        for (size_t i = 0; i < GROUP; i += 4) {
            int32_t four;
            __builtin_memcpy(&four, high + i, 4);
            if (!four) continue;
            of_tile[counts[first]++] = {four, scales[at] * float(HIGH), uint32_t(g * GROUP + i), uint32_t(row - first)};
        }
        sums[at] = sum, totals[at] = scales[at] * float(sum + high_sum * HIGH);
    }

    // Integers x * (LARGEST / max |x| of the group), rounded to even. A NaN or an infinity makes all scales of its row NaN:
    // enough, for every output has a product with each.
    void quantize_row(size_t row) const {
        const size_t step = tile_rows(row), first = tile_begin(row), begin = first * groups + row - first;
        const size_t padded = (groups + 15) / 16 * 16;
        const float* from = a.x + row * a.in_features;
        auto* highest = static_cast<float*>(__builtin_alloca(3 * padded * sizeof(float)));
        float *factors = highest + padded, *steps = factors + padded;
        for (size_t g = groups; g < padded; g++) highest[g] = 0.0f;
        const float total = sum(largest_of_groups(from, groups, highest));
        const float limit = total > 1e-30f ? __builtin_sqrtf(OUTLIER * total / float(a.in_features)) : __builtin_inff();
        const bool finite = total < __builtin_inff();
        const f32x16 most = broadcast(LARGEST);
        for (size_t g = 0; g < padded; g += 16) {
            const f32x16 top = min(load(highest + g), broadcast(limit));
            store(factors + g, finite ? zero_where_below(div(most, top), top, TINY) : broadcast(0.0f));
            store(steps + g, finite ? zero_where_below(div(top, most), top, TINY) : broadcast(__builtin_nanf("")));
        }
        round_groups(from, groups, factors, low + begin * GROUP, step * GROUP, sums + begin, step);
        for (size_t g = 0, at = begin; g < groups; g++, at += step) {
            scales[at] = steps[g];
            totals[at] = steps[g] * float(sums[at]);
            if (finite && highest[g] > limit) quantize_outliers(row, g, at, factors[g]);
        }
    }

    // By group, so that rows take turns: a sum need not wait for the one before.
    void sort_outliers(Outlier* of_tile, size_t count) const {
        auto* sorted = static_cast<Outlier*>(__builtin_alloca(count * sizeof(Outlier)));
        auto* next = static_cast<uint32_t*>(__builtin_alloca((groups + 1) * sizeof(uint32_t)));
        __builtin_memset(next, 0, (groups + 1) * sizeof(uint32_t));
        for (size_t i = 0; i < count; i++) next[of_tile[i].k / GROUP + 1]++;
        for (size_t g = 1; g < groups; g++) next[g] += next[g - 1];
        for (size_t i = 0; i < count; i++) sorted[next[of_tile[i].k / GROUP]++] = of_tile[i];
        __builtin_memcpy(of_tile, sorted, count * sizeof(Outlier));
    }

    // Of rows that prepare(row) writes first, while they are at hand.
    template <class F> void quantize(F prepare) const {
        const size_t tiles = (a.rows + INTERLEAVED - 1) / INTERLEAVED;  // one thread for each: their rows share cache lines
        const size_t width = INTERLEAVED * a.in_features, chunk = WORK_PER_TASK / width + (width > WORK_PER_TASK);
        parallel_chunks(tiles, chunk, [&](size_t tile) {
            const size_t first = tile * INTERLEAVED, end = least(first + INTERLEAVED, a.rows);
            counts[first] = 0;
            for (size_t row = first; row < end; row++) {
                prepare(row);
                quantize_row(row);
            }
            if (end - first > 1) sort_outliers(outliers + first * groups, counts[first]);
        });
    }

    // out [R, 16] of each of P panels, or 0 at first, += a block of K, + high_products; w: the panels' weights. A function of its
    // own: whatever else is here costs it registers.
    template <class Weights, int R>
    __attribute__((noinline)) void add_groups(float* const (&out)[Weights::PANELS], size_t next_out, size_t row,
                                              const size_t (&panels)[Weights::PANELS],
                                              const uint8_t* const (&weights)[Weights::PANELS], Range of,
                                              const float* high_products) const {
        constexpr int P = Weights::PANELS;
        constexpr bool IS_TILE = INTERLEAVED > 1, IS_SHIFTED = Weights::BITS == 8 && !Weights::SIGNED;  // by 128
        static_assert(!IS_TILE || Weights::ROWS == INTERLEAVED, "rows are multiplied as they were interleaved");
        const size_t next_row = IS_TILE ? 1 : groups, next_group = IS_TILE ? R : 1;  // in scales, totals and sums
        const uint8_t* w[P];
        f32x16 total[P][R];
        for (int p = 0; p < P; p++) w[p] = weights[p];
        for (int p = 0; p < P; p++)
            for (int r = 0; r < R; r++) total[p][r] = of.begin ? load(out[p] + r * next_out) : broadcast(0.0f);
        for (size_t g = of.begin; g < of.end; g++) {
            const size_t at = row * groups + g * next_group;
            i32x16 sum[P][R];
            for (int r = 0; r < R; r++) {
                const i32x16 first = all(IS_SHIFTED ? MAGIC_BITS - 128 * sums[at + r * next_row] : MAGIC_BITS);
                for (int p = 0; p < P; p++) sum[p][r] = first;
            }
            Weights::add(w, [x = low + at * GROUP, next = next_row * GROUP](int r, size_t k) {
                return x + r * (IS_TILE ? GROUP : next) + k;
            }, sum);
            for (int p = 0; p < P; p++) {
                w[p] += Weights::GROUP_BYTES;
                const f32x16 scale = load_f16(a.scales + (panels[p] * groups + g) * 16), magic = mul(scale, broadcast(-MAGIC));
                for (int r = 0; r < R; r++)
                    total[p][r] = fma(fma(float_of(sum[p][r]), scale, magic), broadcast(scales[at + r * next_row]), total[p][r]);
                if (Weights::BITS == 8) continue;
                const f32x16 lowest = load_f16(a.minima + (panels[p] * groups + g) * 16);
                for (int r = 0; r < R; r++) total[p][r] = fma(broadcast(totals[at + r * next_row]), lowest, total[p][r]);
            }
        }
        for (int p = 0; p < P; p++)
            for (int r = 0; r < R; r++) {
                if (high_products) total[p][r] = add(total[p][r], load(high_products + (p * R + r) * 16));
                store(out[p] + r * next_out, total[p][r]);
            }
    }

    // Products with high parts, of all of K: to [P][R][16].
    template <class Weights, int R>
    __attribute__((noinline)) void multiply_high(size_t row, const size_t (&panels)[Weights::PANELS], float* to) const {
        constexpr int P = Weights::PANELS, STEP = INTERLEAVED > 1 ? R : 1;
        const uint8_t* w[P];
        const f16* w_scales[P];
        for (int p = 0; p < P; p++) {
            w[p] = a.panels + panels[p] * groups * Weights::PACKED_BYTES;
            w_scales[p] = a.scales + panels[p] * groups * 16;
        }
#pragma GCC unroll 16
        for (int i = 0; i < P * R; i++) store(to + i * 16, broadcast(0.0f));
        for (size_t first = row; first < row + R; first += STEP) {
            const Outlier *of = outliers + first * groups, *last = of + counts[first];
            for (; of < last; of++)
                for (int p = 0; p < P; p++) {
                    float* of_row = to + (p * R + first - row + of->row) * 16;
                    const f32x16 sum = to_float(four_products<Weights::BITS>(w[p], of->k, of->high));
                    const f32x16 w_scale = load_f16(w_scales[p] + of->k / GROUP * 16);
                    store(of_row, fma(mul(sum, w_scale), broadcast(of->scale), load(of_row)));
                }
        }
    }

    // A block of K that does not begin at 0 goes on with what is in out. A panel of fewer than 16 columns is computed beside it.
    template <class Weights, int R>
    void tile(size_t row, const size_t (&panels)[Weights::PANELS], const uint8_t* const (&w)[Weights::PANELS],
              Range of) const {
        constexpr int P = Weights::PANELS;
        alignas(64) float high_products[P * R * 16];
        const float* added = of.end == groups ? high_products : nullptr;
        if (added) multiply_high<Weights, R>(row, panels, high_products);
        const size_t next = a.out_features, row_out = row * next;
        float* out[P];
        for (int p = 0; p < P; p++) out[p] = a.out + row_out + panels[p] * 16;
        if (panels[P - 1] * 16 + 16 <= next) {
            add_groups<Weights, R>(out, next, row, panels, w, of, added);
        } else {
            alignas(64) float room[P][R * 16];
            float* beside[P];
            for (int p = 0; p < P; p++) {
                beside[p] = room[p];
                for (int r = 0; of.begin && r < R; r++) store(room[p] + r * 16, load_part(out[p] + r * next, next - panels[p] * 16));
            }
            add_groups<Weights, R>(beside, 16, row, panels, w, of, added);
            for (int p = 0; p < P; p++)
                for (int r = 0; r < R; r++) store_part(out[p] + r * next, load(room[p] + r * 16), next - panels[p] * 16);
        }
        if (!a.bias || of.end < groups) return;
        const size_t end = least(panels[P - 1] * 16 + 16, next);
        for (int r = 0; r < R; r++)
            for (size_t n = panels[0] * 16; n < end; n++) a.out[row_out + r * next + n] += a.bias[n];
    }

    // The panels that lie so far ahead are fetched beside these: outliers come first, so the processor would not foresee them.
    template <class Weights>
    void multiply_block(const size_t (&panels)[Weights::PANELS], size_t ahead, Range rows, Range of) const {
        constexpr size_t P = Weights::PANELS;
        alignas(64) uint8_t room[P][BLOCK_GROUPS * Weights::GROUP_BYTES];
        const size_t bytes = (of.end - of.begin) * Weights::PACKED_BYTES;
        const uint8_t *packed[P], *w[P];
        for (size_t p = 0; p < P; p++) {
            packed[p] = a.panels + (panels[p] * groups + of.begin) * Weights::PACKED_BYTES;
            w[p] = Weights::unpack(packed[p], room[p], bytes);
        }
        const size_t share = bytes * Weights::ROWS / (rows.end - rows.begin) + 64;
        size_t fetched = 0, wanted = ahead ? bytes : 0;
        for_row_groups<Weights::ROWS>(rows.begin, rows.end, [&](size_t row, auto count) {
            for (const size_t stop = least(fetched + share, wanted); fetched < stop; fetched += 64)
                for (size_t p = 0; p < P; p++) __builtin_prefetch(packed[p] + ahead * groups * Weights::PACKED_BYTES + fetched);
            tile<Weights, decltype(count)::value>(row, panels, w, of);
        });
    }

    template <class Weights> void multiply_panels(size_t first, size_t last, size_t next, Range rows) const {
        constexpr size_t P = Weights::PANELS;
        for (size_t begin = 0; begin < groups; begin += BLOCK_GROUPS) {
            const Range of{begin, least(begin + BLOCK_GROUPS, groups)};
            for (size_t panel = first; panel < last; panel += P) {
                const size_t after = panel + P < last ? panel + P : next, ahead = after < panel_count() ? after - panel : 0;
                size_t panels[P];  // the last one twice, where one is missing
                for (size_t p = 0; p < P; p++) panels[p] = least(panel + p, last - 1);
                multiply_block<Weights>(panels, ahead, rows, of);
            }
        }
    }

    // Tasks are larger where there are more of them than threads need.
    void multiply_all() const {
        const size_t threads = tr_num_threads(), row_blocks = (a.rows + ROW_BLOCK - 1) / ROW_BLOCK;
        const size_t pairs = (panel_count() + PANEL_GROUP - 1) / PANEL_GROUP * row_blocks;
        const size_t step = PANEL_GROUP * least(pairs / (16 * threads) + 1, 4);
        parallel_for((panel_count() + step - 1) / step * row_blocks, [&](size_t task) {
            const size_t first = task / row_blocks * step, last = least(first + step, panel_count());
            const size_t next = (task + threads) / row_blocks * step;  // this thread's, if tasks take turns
            const size_t begin = task % row_blocks * ROW_BLOCK;
            const Range rows{begin, least(begin + ROW_BLOCK, size_t(a.rows))};
            if (a.bits == 8) multiply_panels<EightBits>(first, last, next, rows);
            else if (rows.end - rows.begin < ROWS_TO_SPREAD) multiply_panels<FourBits>(first, last, next, rows);
            else multiply_panels<Spread>(first, last, next, rows);
        });
    }
};

void quantized_linear(const QuantizedLinear* params) {
    Quantized work(*params);
    work.quantize([](size_t) {});
    work.multiply_all();
}

void quantized_rows(const QuantizedRows* params) {
    const QuantizedRows a = *params;
    const size_t columns = a.in_features, groups = columns / GROUP;
    parallel_rows(a.rows, columns, [=](size_t row) {
        const size_t panel = a.ids[row] / 16, column = a.ids[row] % 16;
        const uint8_t* from = a.panels + panel * groups * GROUP * (a.minima ? 8 : 16) + column * 4;
        for (size_t k = 0; k < columns; k++) {
            const uint8_t byte = from[k / (a.minima ? 8 : 4) * 64 + k % 4];
            const int integer = !a.minima ? byte - 128 : k / 4 % 2 ? byte >> 4 : byte & 15;
            const size_t group = (panel * groups + k / GROUP) * 16 + column;
            const float scaled = float(integer) * widen_f16(a.scales[group]);
            a.out[row * columns + k] = a.minima ? scaled + widen_f16(a.minima[group]) : scaled;
        }
    });
}

}  // namespace
