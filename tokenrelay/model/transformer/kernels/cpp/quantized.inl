// quantized_linear: weights of 8 or 4 bits, activations of 8, and of 16 where they stick out; in groups of 32 along K.
//
// Within a group the products are summed as integers, which is exact in any order; then, groups ascending,
//   acc = fma(sum, x_scale * w_scale, acc), and acc = fma(x_scale * sum of x, minimum, acc) where weights have one;
// and + bias at the end. So a row's bits depend on nothing but the row, whatever instructions do the sums.
//
// An activation is 256 * high + low. Most groups have only the high half; a group far above the row's mean would drown
// the rest of the output in its rounding, so it has both. (the outliers of LLM.int8(), by group instead of by column)
namespace {

constexpr float HIGH = 127.0f, BOTH = 127.0f * 256.0f;  // the largest integers
constexpr float OUTLIER = 36.0f;  // largest element squared, over the row's mean square
constexpr float TINY = 1e-24f;    // below, a group counts as zero: its factor would overflow, its products lose bits

// Of K at a time: spread out 24 KiB, in the first cache with the rows' activations.
constexpr size_t BLOCK_GROUPS = 48 / QUANTIZED_PANELS;
constexpr size_t MOST_OUTLIERS = ROW_BLOCK * BLOCK_GROUPS;  // of a block of rows and of K

// So many rows' activations lie interleaved, as their tile reads them: four of each row, or a scale of each row, after each other.
constexpr size_t INTERLEAVED = QUANTIZED_PANELS > 1 ? QUANTIZED_ROWS : 1;
static_assert(ROW_BLOCK % INTERLEAVED == 0, "a block begins with a tile");

// A group with low halves, and their sum.
struct Outlier { uint32_t group; int32_t sum; };

// The outliers of some rows in a block of K, sorted by group: rows that have the same one multiply its weights together, wherever
// they are, and no others need to. Their products with a panel lie row after row.
template <int ROWS> struct Outliers {
    size_t row_begin, row_end, begin, end;      // rows, at most ROW_BLOCK, and groups
    uint16_t of_group[BLOCK_GROUPS + 1];        // where each group's begin in the three that follow
    uint8_t rows[MOST_OUTLIERS];     // from row_begin on
    int16_t sums[MOST_OUTLIERS];     // of low halves
    uint16_t places[MOST_OUTLIERS];  // of their products
    uint16_t of_row[ROW_BLOCK];                 // where each row's products begin
    uint8_t of_tile[ROW_BLOCK][BLOCK_GROUPS];   // bit r: row r of the tile has one; a tile is ROWS rows
};

struct Quantized {
    const QuantizedLinear& a;
    size_t groups;
    float* scales;      // [T, groups] interleaved: of the integers, which are 256 high + low in outliers, else high
    float* totals;      // the same: scale times the sum of the integers
    int32_t* sums;      // the same: of the integers without their low halves
    Outlier* outliers;  // [T, groups]: of each row as many as it has, groups ascending
    uint32_t* counts;   // [T], of outliers
    int8_t* high;       // [T, K] interleaved
    int8_t* low;        // [T, K], in outliers only

    explicit Quantized(const QuantizedLinear& params)
        : a(params), groups(a.in_features / GROUP), scales((float*)a.scratch), totals(scales + a.rows * groups),
          sums((int32_t*)(totals + a.rows * groups)), outliers((Outlier*)(sums + a.rows * groups)),
          counts((uint32_t*)(outliers + a.rows * groups)), high((int8_t*)(counts + a.rows)),
          low(high + a.rows * a.in_features) {}

    size_t panel_count() const { return (a.out_features + 15) / 16; }

    // Rows that lie interleaved are a tile: all of INTERLEAVED, or what is left at the end.
    size_t tile_begin(size_t row) const { return row / INTERLEAVED * INTERLEAVED; }
    size_t tile_rows(size_t row) const { return INTERLEAVED == 1 ? 1 : least(INTERLEAVED, a.rows - tile_begin(row)); }

    // Integers x * (largest integer / max |x|), rounded to even, to every `step`th four bytes; returns the sum of low halves.
    template <bool IS_OUTLIER>
    int32_t quantize_group(const float* from, size_t at, float highest, int8_t* to, size_t step, int8_t* to_low) const {
        const float largest = IS_OUTLIER ? BOTH : HIGH, factor = highest > TINY ? largest / highest : 0.0f;
        int8_t integers[GROUP];
        int32_t sum = 0, low_sum = 0;
        if constexpr (IS_OUTLIER) {
            for (size_t i = 0; i < GROUP; i++) {
                const int32_t integer = round_to_even(from[i] * factor);
                const int32_t upper = (integer + 128) >> 8;
                integers[i] = int8_t(upper), to_low[i] = int8_t(integer - upper * 256);
                sum += upper * 256, low_sum += to_low[i];
            }
        } else {
            sum = round_group(from, factor, integers);
        }
        for (size_t i = 0; i < GROUP; i += 4) __builtin_memcpy(to + i * step, integers + i, 4);
        scales[at] = highest > TINY ? highest / largest : 0.0f;
        sums[at] = sum;
        totals[at] = scales[at] * float(sum + low_sum);
        return low_sum;
    }

    // A NaN or an infinity makes all scales of its row NaN.
    void quantize_row(size_t row) const {
        const size_t step = tile_rows(row), first = tile_begin(row), place = row - first, begin = first * groups + place;
        const float* from = a.x + row * a.in_features;
        f32x16 squares = broadcast(0.0f), zero = broadcast(0.0f);
        for (size_t g = 0; g < groups; g++) {
            f32x16 left = load(from + g * GROUP), right = load(from + g * GROUP + 16);
            squares = fma(right, right, fma(left, left, squares));
            scales[begin + g * step] = maximum(max(max(left, sub(zero, left)), max(right, sub(zero, right))));
        }
        const float total = sum(squares), limit = OUTLIER * total / float(a.in_features);
        const bool finite = total < __builtin_inff();
        int8_t *to = high + first * a.in_features + place * 4, *to_low = low + row * a.in_features;
        uint32_t count = 0;
        for (size_t g = 0, at = begin; g < groups; g++, at += step, from += GROUP, to += GROUP * step, to_low += GROUP) {
            const float largest = finite ? scales[at] : 0.0f;
            if (largest * largest > limit) {
                outliers[row * groups + count++] = {uint32_t(g), quantize_group<true>(from, at, largest, to, step, to_low)};
            } else {
                quantize_group<false>(from, at, largest, to, step, to_low);
            }
            if (!finite) scales[at] = __builtin_nanf("");  // enough: every output has a product with it
        }
        counts[row] = count;
    }

    void quantize() const {
        const size_t tiles = (a.rows + INTERLEAVED - 1) / INTERLEAVED;  // one thread for each: their rows share cache lines
        parallel_rows(tiles, INTERLEAVED * a.in_features, [&](size_t tile) {
            const size_t end = least((tile + 1) * INTERLEAVED, a.rows);
            for (size_t row = tile * INTERLEAVED; row < end; row++) quantize_row(row);
        });
    }

    // f(group in the block, sum of low halves) for a row's outliers in a block of K.
    template <class F> void for_outliers(size_t row, size_t begin, size_t end, F f) const {
        for (const Outlier *i = outliers + row * groups, *last = i + counts[row]; i < last && i->group < end; i++)
            if (i->group >= begin) f(i->group - begin, i->sum);
    }

    template <int ROWS> void sort_outliers(Outliers<ROWS>& of) const {
        const size_t rows = of.row_end - of.row_begin;
        uint16_t next[BLOCK_GROUPS + 1] = {}, place = 0;
        __builtin_memset(of.of_tile, 0, (rows + ROWS - 1) / ROWS * BLOCK_GROUPS);
        for (size_t row = 0; row < rows; row++)
            for_outliers(of.row_begin + row, of.begin, of.end, [&](size_t g, int32_t) {
                next[g + 1]++;
                of.of_tile[row / ROWS][g] |= 1 << row % ROWS;
            });
        for (size_t g = 0; g < BLOCK_GROUPS; g++) next[g + 1] += next[g];
        __builtin_memcpy(of.of_group, next, sizeof next);
        for (size_t row = 0; row < rows; row++) {
            of.of_row[row] = place;
            for_outliers(of.row_begin + row, of.begin, of.end, [&](size_t g, int32_t sum) {
                of.rows[next[g]] = row, of.sums[next[g]] = sum, of.places[next[g]++] = place++;
            });
        }
    }

    // A panel's products with the low halves of outliers.
    template <class Weights>
    __attribute__((noinline)) void multiply_low(const Outliers<Weights::ROWS>& of, const uint8_t* w, i32x16* products) const {
        for (size_t g = of.begin; g < of.end; g++, w += Weights::GROUP_BYTES) {
            const uint16_t* first = of.of_group + (g - of.begin);
            for_row_groups<4>(first[0], first[1], [&](size_t i, auto count) {
                constexpr int R = decltype(count)::value;
                const int8_t* x[R];
                const uint8_t* const group[1] = {w};
                i32x16 sum[1][R];
                for (int r = 0; r < R; r++) x[r] = low + (of.row_begin + of.rows[i + r]) * a.in_features + g * GROUP;
                for (int r = 0; r < R; r++) sum[0][r] = no_sum();
                Weights::add_low(group, [&](int r, size_t k) { return x[r] + k; }, sum);
                for (int r = 0; r < R; r++)
                    products[of.places[i + r]] = Weights::BITS == 8 ? minus(sum[0][r], 128 * of.sums[i + r]) : sum[0][r];
            });
        }
    }

    // out [R, 16] of each of P panels, or 0 at first, += a block of K; w: the panels' weights. A function of its own: whatever
    // else is here costs it registers.
    template <class Weights, int R>
    __attribute__((noinline)) void add_groups(float* const (&out)[Weights::PANELS], size_t next_out, size_t row,
                                              const size_t (&panels)[Weights::PANELS],
                                              const uint8_t* const (&weights)[Weights::PANELS],
                                              const Outliers<Weights::ROWS>& of, const i32x16* low_products) const {
        constexpr int P = Weights::PANELS;
        constexpr bool IS_TILE = INTERLEAVED > 1;
        static_assert(!IS_TILE || Weights::ROWS == INTERLEAVED, "rows are multiplied as they were interleaved");
        const size_t next_row = IS_TILE ? 1 : groups, next_group = IS_TILE ? R : 1;  // in scales, totals and sums
        const uint8_t* has_outlier = of.of_tile[(row - of.row_begin) / Weights::ROWS];
        const i32x16* low_sum[R];
        const uint8_t* w[P];
        f32x16 total[P][R];
        for (int p = 0; p < P; p++) w[p] = weights[p];
        for (int r = 0; r < R; r++) low_sum[r] = low_products + of.of_row[row - of.row_begin + r];
        for (int p = 0; p < P; p++)
            for (int r = 0; r < R; r++) total[p][r] = of.begin ? load(out[p] + r * next_out) : broadcast(0.0f);
        for (size_t g = of.begin; g < of.end; g++) {
            const size_t at = row * groups + g * next_group;
            i32x16 sum[P][R];
            for (int p = 0; p < P; p++)
                for (int r = 0; r < R; r++) sum[p][r] = no_sum();
            Weights::add_high(w, [x = high + at * GROUP, next = a.in_features](int r, size_t k) {
                return IS_TILE ? x + k * R + r * 4 : x + r * next + k;
            }, sum);
            for (int p = 0; p < P; p++) w[p] += Weights::GROUP_BYTES;
            if (const unsigned rows = has_outlier[g - of.begin])
                for (int r = 0; r < R; r++)
                    if (rows >> r & 1) {
                        for (int p = 0; p < P; p++)
                            sum[p][r] = plus(times_256(sum[p][r]), low_sum[r][p * MOST_OUTLIERS]);
                        low_sum[r]++;
                    }
            for (int p = 0; p < P; p++) {
                const f32x16 scale = load_f16(a.scales + (panels[p] * groups + g) * 16);
                for (int r = 0; r < R; r++) {
                    if (Weights::BITS == 8 && !Weights::SIGNED) sum[p][r] = minus(sum[p][r], 128 * sums[at + r * next_row]);
                    total[p][r] = fma(to_float(sum[p][r]), mul(broadcast(scales[at + r * next_row]), scale), total[p][r]);
                }
                if (Weights::BITS == 8) continue;
                const f32x16 lowest = load_f16(a.minima + (panels[p] * groups + g) * 16);
                for (int r = 0; r < R; r++) total[p][r] = fma(broadcast(totals[at + r * next_row]), lowest, total[p][r]);
            }
        }
        for (int p = 0; p < P; p++)
            for (int r = 0; r < R; r++) store(out[p] + r * next_out, total[p][r]);
    }

    // A block of K that does not begin at 0 goes on with what is in out. A panel of fewer than 16 columns is computed beside it.
    template <class Weights, int R>
    void tile(size_t row, const size_t (&panels)[Weights::PANELS], const uint8_t* const (&w)[Weights::PANELS],
              const Outliers<Weights::ROWS>& of, const i32x16* low_products) const {
        constexpr int P = Weights::PANELS;
        const size_t next = a.out_features, row_out = row * next;
        float* out[P];
        for (int p = 0; p < P; p++) out[p] = a.out + row_out + panels[p] * 16;
        if (panels[P - 1] * 16 + 16 <= next) {
            add_groups<Weights, R>(out, next, row, panels, w, of, low_products);
        } else {
            alignas(64) float room[P][R * 16];
            float* beside[P];
            for (int p = 0; p < P; p++) {
                beside[p] = room[p];
                for (int r = 0; of.begin && r < R; r++) store(room[p] + r * 16, load_part(out[p] + r * next, next - panels[p] * 16));
            }
            add_groups<Weights, R>(beside, 16, row, panels, w, of, low_products);
            for (int p = 0; p < P; p++)
                for (int r = 0; r < R; r++) store_part(out[p] + r * next, load(room[p] + r * 16), next - panels[p] * 16);
        }
        if (!a.bias || of.end < groups) return;
        const size_t end = least(panels[P - 1] * 16 + 16, next);
        for (int r = 0; r < R; r++)
            for (size_t n = panels[0] * 16; n < end; n++) a.out[row_out + r * next + n] += a.bias[n];
    }

    // Weights that are unpacked come from memory, panels that lie so far ahead, beside these; what is read as it lies, the
    // processor foresees.
    template <class Weights>
    void multiply_block(const size_t (&panels)[Weights::PANELS], size_t ahead, const Outliers<Weights::ROWS>& of,
                        i32x16* low_products) const {
        constexpr size_t P = Weights::PANELS;
        alignas(64) uint8_t room[P][BLOCK_GROUPS * Weights::GROUP_BYTES];
        const size_t bytes = (of.end - of.begin) * Weights::PACKED_BYTES;
        const uint8_t *packed[P], *w[P];
        for (size_t p = 0; p < P; p++) {
            packed[p] = a.panels + (panels[p] * groups + of.begin) * Weights::PACKED_BYTES;
            w[p] = Weights::unpack(packed[p], room[p], bytes);
            multiply_low<Weights>(of, w[p], low_products + p * MOST_OUTLIERS);
        }
        const size_t share = bytes * Weights::ROWS / (of.row_end - of.row_begin) + 64;
        size_t fetched = 0, wanted = ahead && w[0] != packed[0] ? bytes : 0;
        for_row_groups<Weights::ROWS>(of.row_begin, of.row_end, [&](size_t row, auto count) {
            for (const size_t stop = least(fetched + share, wanted); fetched < stop; fetched += 64)
                for (size_t p = 0; p < P; p++) __builtin_prefetch(packed[p] + ahead * groups * Weights::PACKED_BYTES + fetched);
            tile<Weights, decltype(count)::value>(row, panels, w, of, low_products);
        });
    }

    template <class Weights>
    void multiply_panels(size_t first, size_t last, size_t next, size_t row_begin, size_t row_end) const {
        constexpr size_t P = Weights::PANELS;
        i32x16 low_products[P * MOST_OUTLIERS];
        Outliers<Weights::ROWS> of;
        of.row_begin = row_begin, of.row_end = row_end;
        for (of.begin = 0; of.begin < groups; of.begin = of.end) {
            of.end = least(of.begin + BLOCK_GROUPS, groups);
            sort_outliers(of);
            for (size_t panel = first; panel < last; panel += P) {
                const size_t after = panel + P < last ? panel + P : next, ahead = after < panel_count() ? after - panel : 0;
                size_t panels[P];  // the last one twice, where one is missing
                for (size_t p = 0; p < P; p++) panels[p] = least(panel + p, last - 1);
                multiply_block<Weights>(panels, ahead, of, low_products);
            }
        }
    }

    // Sorting a block's outliers is done once per task: tasks are larger where there are more of them than threads need.
    void multiply_all() const {
        const size_t threads = tr_num_threads(), row_blocks = (a.rows + ROW_BLOCK - 1) / ROW_BLOCK;
        const size_t pairs = (panel_count() + PANEL_GROUP - 1) / PANEL_GROUP * row_blocks;
        const size_t step = PANEL_GROUP * least(pairs / (16 * threads) + 1, 4);
        parallel_for((panel_count() + step - 1) / step * row_blocks, [&](size_t task) {
            const size_t first = task / row_blocks * step, last = least(first + step, panel_count());
            const size_t next = (task + threads) / row_blocks * step;  // this thread's, if tasks take turns
            const size_t begin = task % row_blocks * ROW_BLOCK, end = least(begin + ROW_BLOCK, size_t(a.rows));
            if (a.bits == 8) multiply_panels<EightBits>(first, last, next, begin, end);
            else if (end - begin < ROWS_TO_SPREAD) multiply_panels<FourBits>(first, last, next, begin, end);
            else multiply_panels<Spread>(first, last, next, begin, end);
        });
    }
};

void quantized_linear(const QuantizedLinear* params) {
    Quantized work(*params);
    work.quantize();
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
