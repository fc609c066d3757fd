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

// add_products: sums += (products of 16 columns over one group) << SHIFT, for R rows. Weights are unsigned and lie as [16][4]
// bytes: 8 bits, four k after each other; 4 bits, four k in the low halves and the next four in the high ones. Where there is
// no VNNI, 8 bits are two times 4: sums of 32 products of 4 and 8 bits fit into 16.
#if defined(TR_AVX512)

struct i32x16 { __m512i v; };
TR_INLINE i32x16 no_sum() { return {_mm512_setzero_si512()}; }
TR_INLINE i32x16 minus(i32x16 a, int32_t b) { return {_mm512_sub_epi32(a.v, _mm512_set1_epi32(b))}; }
TR_INLINE f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
TR_INLINE __m512i four(const int8_t* x) {
    int32_t all;
    __builtin_memcpy(&all, x, 4);
    return _mm512_set1_epi32(all);
}

template <int BITS, int SHIFT, int R>
TR_INLINE void add_products(const uint8_t* w, const int8_t* x, size_t x_stride, i32x16 (&sums)[R]) {
    const __m512i half = _mm512_set1_epi8(15);
    __m512i s[R];
    for (int r = 0; r < R; r++) s[r] = _mm512_setzero_si512();
    for (size_t k = 0; k < GROUP; k += 32 / BITS, w += 64) {
        __m512i all = _mm512_loadu_si512(w);
        __m512i first = BITS == 8 ? all : _mm512_and_si512(all, half);
        for (int r = 0; r < R; r++) s[r] = _mm512_dpbusd_epi32(s[r], first, four(x + r * x_stride + k));
        if constexpr (BITS == 4) {
            __m512i second = _mm512_and_si512(_mm512_srli_epi16(all, 4), half);
            for (int r = 0; r < R; r++) s[r] = _mm512_dpbusd_epi32(s[r], second, four(x + r * x_stride + k + 4));
        }
    }
    for (int r = 0; r < R; r++) sums[r].v = _mm512_add_epi32(sums[r].v, _mm512_slli_epi32(s[r], SHIFT));
}

#elif defined(TR_AVX2)

struct i32x16 { __m256i lo, hi; };
TR_INLINE i32x16 no_sum() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
TR_INLINE i32x16 minus(i32x16 a, int32_t b) {
    __m256i value = _mm256_set1_epi32(b);
    return {_mm256_sub_epi32(a.lo, value), _mm256_sub_epi32(a.hi, value)};
}
TR_INLINE f32x16 to_float(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
TR_INLINE __m256i four(const int8_t* x) {
    int32_t all;
    __builtin_memcpy(&all, x, 4);
    return _mm256_set1_epi32(all);
}

// 8 bits less 128, << 8: sizes times activations with the weight's sign; these must not be -128. Two products fit into 16.
template <int R>
TR_INLINE void add_signed_products(const uint8_t* w, const int8_t* x, size_t x_stride, i32x16 (&sums)[R]) {
    const __m256i middle = _mm256_set1_epi8(-128), unit = _mm256_set1_epi16(256);
    for (size_t k = 0; k < GROUP; k += 4, w += 64) {
        __m256i left = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)w), middle);
        __m256i right = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)w + 1), middle);
        __m256i left_size = _mm256_abs_epi8(left), right_size = _mm256_abs_epi8(right);
        for (int r = 0; r < R; r++) {
            __m256i value = four(x + r * x_stride + k);
            __m256i a = _mm256_maddubs_epi16(left_size, _mm256_sign_epi8(value, left));
            __m256i b = _mm256_maddubs_epi16(right_size, _mm256_sign_epi8(value, right));
            sums[r].lo = _mm256_add_epi32(sums[r].lo, _mm256_madd_epi16(a, unit));
            sums[r].hi = _mm256_add_epi32(sums[r].hi, _mm256_madd_epi16(b, unit));
        }
    }
}

template <int BITS, int SHIFT, int R>
TR_INLINE void add_products(const uint8_t* w, const int8_t* x, size_t x_stride, i32x16 (&sums)[R]) {
    const __m256i half = _mm256_set1_epi8(15);
    __m256i s[2][R][2];  // 16 bits; [1]: of the high halves of 8-bit weights
    for (auto& part : s)
        for (int r = 0; r < R; r++) part[r][0] = part[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (size_t k = 0; k < GROUP; k += 32 / BITS, w += 64) {
        __m256i left = _mm256_loadu_si256((const __m256i*)w), right = _mm256_loadu_si256((const __m256i*)w + 1);
#pragma GCC unroll 2
        for (int high = 0; high < 2; high++) {
            if (high) left = _mm256_srli_epi16(left, 4), right = _mm256_srli_epi16(right, 4);
            __m256i a = _mm256_and_si256(left, half), b = _mm256_and_si256(right, half);
            auto& part = s[BITS == 8 ? high : 0];
            for (int r = 0; r < R; r++) {
                __m256i value = four(x + r * x_stride + k + (BITS == 4 ? 4 * high : 0));
                part[r][0] = _mm256_add_epi16(part[r][0], _mm256_maddubs_epi16(a, value));
                part[r][1] = _mm256_add_epi16(part[r][1], _mm256_maddubs_epi16(b, value));
            }
        }
    }
    for (int high = 0; high < BITS / 4; high++) {
        const __m256i unit = _mm256_set1_epi16(1 << (SHIFT + 4 * high));
        for (int r = 0; r < R; r++) {
            sums[r].lo = _mm256_add_epi32(sums[r].lo, _mm256_madd_epi16(s[high][r][0], unit));
            sums[r].hi = _mm256_add_epi32(sums[r].hi, _mm256_madd_epi16(s[high][r][1], unit));
        }
    }
}

#else

struct i32x16 { int32_t v[16]; };
TR_INLINE i32x16 no_sum() { return {}; }
TR_INLINE i32x16 minus(i32x16 a, int32_t b) {
    for (int32_t& value : a.v) value -= b;
    return a;
}
TR_INLINE f32x16 to_float(const i32x16& a) { return each([&](int i) { return float(a.v[i]); }); }

template <int BITS, int SHIFT, int R>
TR_INLINE void add_products(const uint8_t* w, const int8_t* x, size_t x_stride, i32x16 (&sums)[R]) {
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 16; c++) {
            int32_t sum = 0;
            for (size_t k = 0; k < GROUP; k++) {
                uint8_t byte = w[k / (32 / BITS) * 64 + c * 4 + k % 4];
                sum += (BITS == 8 ? byte : k / 4 % 2 ? byte >> 4 : byte & 15) * x[r * x_stride + k];
            }
            sums[r].v[c] += sum << SHIFT;
        }
}

#endif

// The main part of a tile: high halves of the activations.
#if defined(TR_AVX2)
constexpr bool SIGNED_WEIGHTS = true;  // of 8 bits
template <int BITS, int R>
TR_INLINE void add_high(const uint8_t* w, const int8_t* x, size_t x_stride, i32x16 (&sums)[R]) {
    if constexpr (BITS == 8) add_signed_products(w, x, x_stride, sums);
    else add_products<BITS, 8>(w, x, x_stride, sums);
}
#else
constexpr bool SIGNED_WEIGHTS = false;
template <int BITS, int R>
TR_INLINE void add_high(const uint8_t* w, const int8_t* x, size_t x_stride, i32x16 (&sums)[R]) {
    add_products<BITS, 8>(w, x, x_stride, sums);
}
#endif

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
