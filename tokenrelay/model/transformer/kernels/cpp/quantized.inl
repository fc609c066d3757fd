// quantized_linear: weights of 8 or 4 bits, activations of 8, and of 16 where they stick out; in groups of 32 along K.
//
// Within a group the products are summed as integers, which is exact in any order; then, groups ascending,
//   acc = fma(sum, x_scale * w_scale, acc), and acc = fma(x_scale * sum of x, minimum, acc) where weights have one,
// and + bias at the end. So a row's bits depend on nothing but the row, whatever instructions do the sums.
//
// An activation is 256 * high + low. Most groups have only the high half; a group far above the row's mean would drown
// the rest of the output in its rounding, so it has both. (the outliers of LLM.int8(), by group instead of by column)
namespace {

constexpr float HIGH = 127.0f, BOTH = 127.0f * 256.0f;  // the largest integers
constexpr float OUTLIER = 36.0f;  // largest element squared, over the row's mean square
constexpr float TINY = 1e-30f;    // below, a group counts as zero: its factor would overflow

template <int R> struct Sums { i32x16 of[R]; };

// Out of line and by value: it is rare, and the registers belong to the common case.
template <int BITS, int R>
__attribute__((noinline)) Sums<R> with_low(Sums<R> sums, const uint8_t* w, const int8_t* x, size_t x_stride) {
    add_products<BITS, 0>(w, x, x_stride, sums.of);
    return sums;
}

struct Quantized {
    const QuantizedLinear& a;
    size_t groups;
    float* scales;      // [T, groups], of the integers 256 high + low
    float* totals;      // [T, groups]: scale times the sum of the integers
    int32_t* sums;      // [T, groups]: what 8-bit weights, being stored with 128 added, make too much
    int8_t* high;       // [T, K]
    int8_t* low;        // [T, K], zero outside of outliers
    uint8_t* outliers;  // [T, groups]: 1 where there are low halves

    explicit Quantized(const QuantizedLinear& params)
        : a(params), groups(a.in_features / GROUP), scales((float*)a.scratch), totals(scales + a.rows * groups),
          sums((int32_t*)(totals + a.rows * groups)), high((int8_t*)(sums + a.rows * groups)),
          low(high + a.rows * a.in_features), outliers((uint8_t*)(low + a.rows * a.in_features)) {}

    // Integers x * (largest integer / max |x|), rounded to even.
    template <bool IS_OUTLIER> void quantize_group(const float* from, size_t group, float highest) const {
        const float factor = highest > TINY ? (IS_OUTLIER ? BOTH : HIGH) / highest : 0.0f;
        int8_t *to_high = high + group * GROUP, *to_low = low + group * GROUP;
        int32_t sum = 0, low_sum = 0;
        for (size_t i = 0; i < GROUP; i++) {
            int32_t integer = int32_t(bits_of(from[i] * factor + EXP_MAGIC) - bits_of(EXP_MAGIC));
            int32_t upper = IS_OUTLIER ? (integer + 128) >> 8 : integer;
            to_high[i] = int8_t(upper);
            to_low[i] = IS_OUTLIER ? int8_t(integer - upper * 256) : 0;
            sum += integer;
            low_sum += to_low[i];
        }
        if (!IS_OUTLIER) sum *= 256;
        scales[group] = highest > TINY ? highest / BOTH : 0.0f;
        totals[group] = scales[group] * float(sum);
        sums[group] = 128 * (SIGNED_WEIGHTS ? low_sum : sum);
        outliers[group] = IS_OUTLIER;
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
        for (size_t g = 0; g < groups; g++, from += GROUP) {
            const size_t group = row * groups + g;
            const float largest = finite ? scales[group] : 0.0f;
            if (largest * largest > limit) quantize_group<true>(from, group, largest);
            else quantize_group<false>(from, group, largest);
            if (!finite) scales[group] = __builtin_nanf("");  // enough: every output has a product with it
        }
    }

    void quantize() const {
        parallel_rows(a.rows, a.in_features, [&](size_t row) { quantize_row(row); });
    }

    template <int BITS, int R> void tile(size_t row, size_t panel) const {
        constexpr size_t GROUP_BYTES = GROUP * 16 * BITS / 8;
        const uint8_t* w = a.panels + panel * groups * GROUP_BYTES;
        const f16* w_scale = a.scales + panel * groups * 16;
        const f16* minimum = a.minima ? a.minima + panel * groups * 16 : nullptr;
        f32x16 acc[R];
        for (int r = 0; r < R; r++) acc[r] = broadcast(0.0f);
        for (size_t g = 0; g < groups; g++, w += GROUP_BYTES) {
            const size_t group = row * groups + g, at = row * a.in_features + g * GROUP;
            Sums<R> products;
            uint8_t has_low = 0;
            for (int r = 0; r < R; r++) products.of[r] = no_sum(), has_low |= outliers[group + r * groups];
            add_high<BITS>(w, high + at, a.in_features, products.of);
            if (__builtin_expect(has_low, 0)) products = with_low<BITS>(products, w, low + at, a.in_features);
            f32x16 scale = load_f16(w_scale + g * 16);
            for (int r = 0; r < R; r++) {
                if (BITS == 8 && (!SIGNED_WEIGHTS || has_low)) products.of[r] = minus(products.of[r], sums[group + r * groups]);
                acc[r] = fma(to_float(products.of[r]), mul(broadcast(scales[group + r * groups]), scale), acc[r]);
            }
            if (!minimum) continue;
            f32x16 lowest = load_f16(minimum + g * 16);
            for (int r = 0; r < R; r++) acc[r] = fma(broadcast(totals[group + r * groups]), lowest, acc[r]);
        }
        const size_t column = panel * 16, width = a.out_features - column;
        for (int r = 0; r < R; r++) {
            if (a.bias) acc[r] = add(acc[r], load_part(a.bias + column, width));
            store_part(a.out + (row + r) * a.out_features + column, acc[r], width);
        }
    }

    template <int BITS> void multiply_all() const {
        const size_t panel_count = (a.out_features + 15) / 16, row_blocks = (a.rows + ROW_BLOCK - 1) / ROW_BLOCK;
        const size_t panel_groups = (panel_count + PANEL_GROUP - 1) / PANEL_GROUP;
        constexpr int ROWS = BITS == 8 && SIGNED_WEIGHTS ? 4 : QUANTIZED_ROWS;
        parallel_for(panel_groups * row_blocks, [&](size_t task) {
            size_t first = task / row_blocks * PANEL_GROUP, last = least(first + PANEL_GROUP, panel_count);
            size_t row_begin = task % row_blocks * ROW_BLOCK, row_end = least(row_begin + ROW_BLOCK, size_t(a.rows));
            for (size_t panel = first; panel < last; panel++)
                for_row_groups<ROWS>(row_begin, row_end, [&](size_t row, auto count) {
                    tile<BITS, decltype(count)::value>(row, panel);
                });
        });
    }
};

void quantized_linear(const QuantizedLinear* params) {
    Quantized work(*params);
    work.quantize();
    if (params->bits == 4) work.multiply_all<4>();
    else work.multiply_all<8>();
}

}  // namespace
