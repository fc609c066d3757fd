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

    // The group of a row's i-th outlier, or past all.
    uint32_t outlier_of(size_t row, uint32_t i) const { return i < counts[row] ? outliers[row * groups + i].group : ~0u; }

    // What R rows have in their outliers, begin to end: the groups that are somebody's, ascending, and each one's products with low
    // halves; 0 where a row has none.
    template <int R> struct Low {
        uint32_t groups[BLOCK_GROUPS + 1];  // and one past all
        i32x16 sums[BLOCK_GROUPS][R];
    };

    template <int BITS, int R>
    __attribute__((noinline)) void multiply_low(Low<R>& out, size_t row, size_t panel, size_t begin, size_t end) const {
        uint32_t next[R] = {};
        for (int r = 0; r < R; r++)
            while (outlier_of(row + r, next[r]) < begin) next[r]++;
        for (size_t i = 0;; i++) {
            size_t group = end;
            for (int r = 0; r < R; r++) group = least(group, outlier_of(row + r, next[r]));
            out.groups[i] = group == end ? ~0u : group;
            if (group == end) return;
            for (int r = 0; r < R; r++) out.sums[i][r] = no_sum();
            const uint8_t* w = a.panels + (panel * groups + group) * GROUP * 2 * BITS;
            add_products<BITS, 0>(w, low + row * a.in_features + group * GROUP, a.in_features, out.sums[i]);
            for (int r = 0; r < R; r++) {
                if (outlier_of(row + r, next[r]) != group) out.sums[i][r] = no_sum();  // what lies there is not its own
                else if (BITS == 8) out.sums[i][r] = minus(out.sums[i][r], 128 * outliers[(row + r) * groups + next[r]].sum);
                next[r] += outlier_of(row + r, next[r]) == group;
            }
        }
    }

    // acc [R, 16] += groups begin to end of R rows and a panel, w: its weights from begin on. A function of its own: whatever else
    // is here costs it registers.
    template <class Weights, int R>
    __attribute__((noinline)) void add_groups(float* acc, size_t row, size_t panel, const uint8_t* w, size_t begin, size_t end,
                                              const Low<R>& low_part) const {
        const uint32_t* outlier = low_part.groups;
        const i32x16(*low_sum)[R] = low_part.sums;
        f32x16 total[R];
        for (int r = 0; r < R; r++) total[r] = load(acc + r * 16);
        for (size_t g = begin; g < end; g++, w += Weights::GROUP_BYTES) {
            const size_t group = row * groups + g;
            i32x16 sum[R];
            for (int r = 0; r < R; r++) sum[r] = no_sum();
            Weights::add_high(w, high + row * a.in_features + g * GROUP, a.in_features, sum);
            if (__builtin_expect(g == *outlier, 0)) {
                for (int r = 0; r < R; r++) sum[r] = plus(sum[r], (*low_sum)[r]);
                outlier++, low_sum++;
            }
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
    template <class Weights, int R> void tile(size_t row, size_t panel, const uint8_t* w, size_t begin, size_t end) const {
        const size_t column = panel * 16, width = a.out_features - column;
        float* out = a.out + row * a.out_features + column;
        alignas(64) float acc[R * 16] = {};
        for (int r = 0; r < R && begin; r++) store(acc + r * 16, load_part(out + r * a.out_features, width));
        Low<R> low_part;
        multiply_low<Weights::BITS, R>(low_part, row, panel, begin, end);
        add_groups<Weights, R>(acc, row, panel, w, begin, end, low_part);
        for (int r = 0; r < R; r++) {
            f32x16 y = load(acc + r * 16);
            if (end == groups && a.bias) y = add(y, load_part(a.bias + column, width));
            store_part(out + r * a.out_features, y, width);
        }
    }

    template <class Weights>
    void multiply_block(size_t panel, const uint8_t* w, size_t row_begin, size_t row_end, size_t begin, size_t end) const {
        for_row_groups<Weights::ROWS>(row_begin, row_end, [&](size_t row, auto count) {
            tile<Weights, decltype(count)::value>(row, panel, w, begin, end);
        });
    }

    template <class Weights> void multiply_panel(size_t panel, size_t row_begin, size_t row_end) const {
        for (size_t begin = 0; begin < groups; begin += BLOCK_GROUPS) {
            const uint8_t* w = a.panels + (panel * groups + begin) * Weights::GROUP_BYTES;
            multiply_block<Weights>(panel, w, row_begin, row_end, begin, least(begin + BLOCK_GROUPS, groups));
        }
    }

    // Many rows read weights that were spread out once for all of them.
    void multiply_spread(size_t panel, size_t row_begin, size_t row_end) const {
        alignas(64) uint8_t spread[BLOCK_GROUPS * Spread::GROUP_BYTES];
        for (size_t begin = 0; begin < groups; begin += BLOCK_GROUPS) {
            const size_t end = least(begin + BLOCK_GROUPS, groups), bytes = (end - begin) * FourBits::GROUP_BYTES;
            const uint8_t* packed = a.panels + (panel * groups + begin) * FourBits::GROUP_BYTES;
            spread_out(packed, spread, bytes);
            for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(packed + bytes + i);  // the next block, or panel
            multiply_block<Spread>(panel, spread, row_begin, row_end, begin, end);
        }
    }

    void multiply_rows(size_t panel, size_t row_begin, size_t row_end) const {
        if (a.bits == 8) multiply_panel<EightBits>(panel, row_begin, row_end);
        else if (row_end - row_begin < ROWS_TO_SPREAD) multiply_panel<FourBits>(panel, row_begin, row_end);
        else multiply_spread(panel, row_begin, row_end);
    }

    void multiply_all() const {
        const size_t panel_count = (a.out_features + 15) / 16, row_blocks = (a.rows + ROW_BLOCK - 1) / ROW_BLOCK;
        const size_t panel_groups = (panel_count + PANEL_GROUP - 1) / PANEL_GROUP;
        parallel_for(panel_groups * row_blocks, [&](size_t task) {
            size_t first = task / row_blocks * PANEL_GROUP, last = least(first + PANEL_GROUP, panel_count);
            size_t row_begin = task % row_blocks * ROW_BLOCK, row_end = least(row_begin + ROW_BLOCK, size_t(a.rows));
            for (size_t panel = first; panel < last; panel++) multiply_rows(panel, row_begin, row_end);
        });
    }
};

void quantized_linear(const QuantizedLinear* params) {
    Quantized work(*params);
    work.quantize();
    work.multiply_all();
}

}  // namespace
