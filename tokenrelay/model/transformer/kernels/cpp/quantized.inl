// quantized_linear: weights of 8 or 4 bits, activations of 8, and of 16 where they stick out; in groups of 32 along K.
//
// Within a group the products are summed as integers, which is exact in any order; then, groups ascending,
//   acc = fma(sum, x_scale * w_scale, acc), and acc = fma(x_scale * sum of x, minimum, acc) where weights have one;
// and + bias at the end. So a row's bits depend on nothing but the row, whatever
// instructions do the sums.
//
// An activation is 256 * high + low. Most groups have only the high half; a group far above the row's mean would drown
// the rest of the output in its rounding, so it has both. (the outliers of LLM.int8(), by group instead of by column)
namespace {

constexpr float HIGH = 127.0f, BOTH = 127.0f * 256.0f;  // the largest integers
constexpr float OUTLIER = 36.0f;  // largest element squared, over the row's mean square
constexpr float TINY = 1e-30f;    // below, a group counts as zero: its factor would overflow

constexpr size_t BLOCK_GROUPS = 48;  // of K at a time: spread out 24 KiB, in the first cache with the rows' activations

// A group with low halves, and their sum.
struct Outlier { uint32_t group; int32_t sum; };

// The outliers of some rows in a block of K, sorted by group: rows that have the same one multiply its weights together, wherever
// they are, and no others need to. Their products with a panel lie row after row.
template <int ROWS> struct Outliers {
    size_t row_begin, row_end, begin, end;      // rows, at most ROW_BLOCK, and groups
    uint16_t of_group[BLOCK_GROUPS + 1];        // where each group's begin in the three that follow
    uint8_t rows[ROW_BLOCK * BLOCK_GROUPS];     // from row_begin on
    int16_t sums[ROW_BLOCK * BLOCK_GROUPS];     // of low halves
    uint16_t places[ROW_BLOCK * BLOCK_GROUPS];  // of their products
    uint16_t of_row[ROW_BLOCK];                 // where each row's products begin
    uint8_t of_tile[ROW_BLOCK][BLOCK_GROUPS];   // bit r: row r of the tile has one; a tile is ROWS rows
};

struct Quantized {
    const QuantizedLinear& a;
    size_t groups;
    float* scales;      // [T, groups], of the integers 256 high + low
    float* totals;      // [T, groups]: scale times the sum of the integers
    int32_t* sums;      // [T, groups], of the high halves, times 256
    Outlier* outliers;  // [T, groups]: of each row as many as it has, groups ascending
    uint32_t* counts;   // [T], of outliers
    int8_t* high;       // [T, K]
    int8_t* low;        // [T, K], in outliers only

    explicit Quantized(const QuantizedLinear& params)
        : a(params), groups(a.in_features / GROUP), scales((float*)a.scratch), totals(scales + a.rows * groups),
          sums((int32_t*)(totals + a.rows * groups)), outliers((Outlier*)(sums + a.rows * groups)),
          counts((uint32_t*)(outliers + a.rows * groups)), high((int8_t*)(counts + a.rows)),
          low(high + a.rows * a.in_features) {}

    // Integers x * (largest integer / max |x|), rounded to even. Returns the sum of their low halves.
    template <bool IS_OUTLIER> int32_t quantize_group(const float* from, size_t group, float highest) const {
        const float factor = highest > TINY ? (IS_OUTLIER ? BOTH : HIGH) / highest : 0.0f;
        int8_t *to_high = high + group * GROUP, *to_low = low + group * GROUP;
        int32_t sum = 0, low_sum = 0;
        for (size_t i = 0; i < GROUP; i++) {
            int32_t integer = int32_t(bits_of(from[i] * factor + EXP_MAGIC) - bits_of(EXP_MAGIC));
            int32_t upper = IS_OUTLIER ? (integer + 128) >> 8 : integer;
            to_high[i] = int8_t(upper);
            if (IS_OUTLIER) to_low[i] = int8_t(integer - upper * 256), low_sum += to_low[i];
            sum += upper;
        }
        scales[group] = highest > TINY ? highest / BOTH : 0.0f;
        sums[group] = 256 * sum;
        totals[group] = scales[group] * float(sums[group] + low_sum);
        return low_sum;
    }

    // A NaN or an infinity makes all scales of its row NaN.
    void quantize_row(size_t row) const {
        const float* from = a.x + row * a.in_features;
        float* highest = scales + row * groups;
        f32x16 squares = broadcast(0.0f), zero = broadcast(0.0f);
        for (size_t g = 0; g < groups; g++) {
            f32x16 left = load(from + g * GROUP), right = load(from + g * GROUP + 16);
            squares = fma(right, right, fma(left, left, squares));
            highest[g] = maximum(max(max(left, sub(zero, left)), max(right, sub(zero, right))));
        }
        const float total = sum(squares), limit = OUTLIER * total / float(a.in_features);
        const bool finite = total < __builtin_inff();
        uint32_t count = 0;
        for (size_t g = 0; g < groups; g++, from += GROUP) {
            const size_t group = row * groups + g;
            const float largest = finite ? scales[group] : 0.0f;
            if (largest * largest > limit) {
                outliers[row * groups + count++] = {uint32_t(g), quantize_group<true>(from, group, largest)};
            } else {
                quantize_group<false>(from, group, largest);
            }
            if (!finite) scales[group] = __builtin_nanf("");  // enough: every output has a product with it
        }
        counts[row] = count;
    }

    void quantize() const {
        parallel_rows(a.rows, a.in_features, [&](size_t row) { quantize_row(row); });
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
                i32x16 sum[R];
                for (int r = 0; r < R; r++) x[r] = low + (of.row_begin + of.rows[i + r]) * a.in_features + g * GROUP;
                for (int r = 0; r < R; r++) sum[r] = no_sum();
                Weights::add_low(w, [&](int r) { return x[r]; }, sum);
                for (int r = 0; r < R; r++)
                    products[of.places[i + r]] = Weights::BITS == 8 ? minus(sum[r], 128 * of.sums[i + r]) : sum[r];
            });
        }
    }

    // acc [R, 16] += a block of K, of R rows and a panel, w: its weights. A function of its own: whatever else is here costs it
    // registers.
    template <class Weights, int R>
    __attribute__((noinline)) void add_groups(float* acc, size_t row, size_t panel, const uint8_t* w,
                                              const Outliers<Weights::ROWS>& of, const i32x16* low_products) const {
        const uint8_t* has_outlier = of.of_tile[(row - of.row_begin) / Weights::ROWS];
        const i32x16* low_sum[R];
        f32x16 total[R];
        for (int r = 0; r < R; r++) low_sum[r] = low_products + of.of_row[row - of.row_begin + r];
        for (int r = 0; r < R; r++) total[r] = load(acc + r * 16);
        for (size_t g = of.begin; g < of.end; g++, w += Weights::GROUP_BYTES) {
            const size_t group = row * groups + g;
            i32x16 sum[R];
            for (int r = 0; r < R; r++) sum[r] = no_sum();
            const int8_t* x = high + row * a.in_features + g * GROUP;
            Weights::add_high(w, [x, stride = a.in_features](int r) { return x + r * stride; }, sum);
            if (const unsigned rows = has_outlier[g - of.begin])
                for (int r = 0; r < R; r++)
                    if (rows >> r & 1) sum[r] = plus(sum[r], *low_sum[r]++);
            const f32x16 scale = load_f16(a.scales + (panel * groups + g) * 16);
            for (int r = 0; r < R; r++) {
                if (Weights::BITS == 8 && !Weights::SIGNED) sum[r] = minus(sum[r], 128 * sums[group + r * groups]);
                total[r] = fma(to_float(sum[r]), mul(broadcast(scales[group + r * groups]), scale), total[r]);
            }
            if (Weights::BITS == 8) continue;
            const f32x16 lowest = load_f16(a.minima + (panel * groups + g) * 16);
            for (int r = 0; r < R; r++) total[r] = fma(broadcast(totals[group + r * groups]), lowest, total[r]);
        }
        for (int r = 0; r < R; r++) store(acc + r * 16, total[r]);
    }

    // A block of K that does not begin at 0 goes on with what is in out.
    template <class Weights, int R>
    void tile(size_t row, size_t panel, const uint8_t* w, const Outliers<Weights::ROWS>& of, const i32x16* low_products) const {
        const size_t column = panel * 16, width = a.out_features - column;
        float* out = a.out + row * a.out_features + column;
        alignas(64) float acc[R * 16];
        for (int r = 0; r < R; r++) store(acc + r * 16, of.begin ? load_part(out + r * a.out_features, width) : broadcast(0.0f));
        add_groups<Weights, R>(acc, row, panel, w, of, low_products);
        for (int r = 0; r < R; r++) {
            f32x16 y = load(acc + r * 16);
            if (of.end == groups && a.bias) y = add(y, load_part(a.bias + column, width));
            store_part(out + r * a.out_features, y, width);
        }
    }

    // Weights that are unpacked come from memory beside the panel before; what is read as it lies, the processor foresees.
    template <class Weights>
    void multiply_block(size_t panel, const Outliers<Weights::ROWS>& of, i32x16* low_products) const {
        alignas(64) uint8_t room[BLOCK_GROUPS * Weights::GROUP_BYTES];
        const size_t bytes = (of.end - of.begin) * Weights::PACKED_BYTES;
        const uint8_t* packed = a.panels + (panel * groups + of.begin) * Weights::PACKED_BYTES;
        const uint8_t *w = Weights::unpack(packed, room, bytes), *next = packed + groups * Weights::PACKED_BYTES;
        const uint8_t* end = next + (w == packed ? 0 : bytes);
        multiply_low<Weights>(of, w, low_products);
        const size_t share = bytes * Weights::ROWS / (of.row_end - of.row_begin) + 64;
        for_row_groups<Weights::ROWS>(of.row_begin, of.row_end, [&](size_t row, auto count) {
            for (const uint8_t* stop = next + share; next < stop && next < end; next += 64) __builtin_prefetch(next);
            tile<Weights, decltype(count)::value>(row, panel, w, of, low_products);
        });
    }

    template <class Weights> void multiply_panels(size_t first, size_t last, size_t row_begin, size_t row_end) const {
        i32x16 low_products[ROW_BLOCK * BLOCK_GROUPS];
        Outliers<Weights::ROWS> of;
        of.row_begin = row_begin, of.row_end = row_end;
        for (of.begin = 0; of.begin < groups; of.begin = of.end) {
            of.end = least(of.begin + BLOCK_GROUPS, groups);
            sort_outliers(of);
            for (size_t panel = first; panel < last; panel++) multiply_block<Weights>(panel, of, low_products);
        }
    }

    void multiply_all() const {
        const size_t panel_count = (a.out_features + 15) / 16, row_blocks = (a.rows + ROW_BLOCK - 1) / ROW_BLOCK;
        const size_t panel_groups = (panel_count + PANEL_GROUP - 1) / PANEL_GROUP;
        parallel_for(panel_groups * row_blocks, [&](size_t task) {
            size_t first = task / row_blocks * PANEL_GROUP, last = least(first + PANEL_GROUP, panel_count);
            size_t row_begin = task % row_blocks * ROW_BLOCK, row_end = least(row_begin + ROW_BLOCK, size_t(a.rows));
            if (a.bits == 8) multiply_panels<EightBits>(first, last, row_begin, row_end);
            else if (row_end - row_begin < ROWS_TO_SPREAD) multiply_panels<FourBits>(first, last, row_begin, row_end);
            else multiply_panels<Spread>(first, last, row_begin, row_end);
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
