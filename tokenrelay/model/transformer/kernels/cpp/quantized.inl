// quantized_linear: weights of 8 or 4 bits, activations of 16, in groups of 32 along K. Included by kernels.inl.
//
// Within a group the products are summed as integers, which is exact in any order; then, groups ascending,
//   acc = fma(sum, x_scale * w_scale, acc), and acc = fma(x_scale * sum of x, minimum, acc) where weights have one,
// and + bias at the end. So a row's bits depend on nothing but the row, whatever instructions do the sums.
// Activations of 8 bits would be faster by a third where there is no VNNI, but SmolLM2 then forgets where Paris is.
namespace {

constexpr size_t GROUP = 32;
constexpr float LARGEST = 32767.0f;

// The integer sums of 16 columns over one group, for R rows; they stay below 2^27. Weights of a group: 8 bits [16][16][2],
// signed, steps of two k after each other; 4 bits [8][16][2], unsigned, the low halves of the bytes two k and the high
// halves the next two.
#if defined(TR_AVX512)

struct i32x16 { __m512i v; };
TR_INLINE f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
TR_INLINE __m512i pair(const int16_t* x) {
    int32_t both;
    __builtin_memcpy(&both, x, 4);
    return _mm512_set1_epi32(both);
}

template <int BITS, int R>
TR_INLINE void sum_group(const uint8_t* w, const int16_t* x, size_t x_stride, i32x16 (&sums)[R]) {
    for (int r = 0; r < R; r++) sums[r].v = _mm512_setzero_si512();
    const __m256i half = _mm256_set1_epi8(15);
    for (size_t k = 0; k < GROUP; k += 4) {
        __m512i first, second;
        if constexpr (BITS == 8) {
            first = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w + k * 16)));
            second = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w + k * 16 + 32)));
        } else {
            __m256i both = _mm256_loadu_si256((const __m256i*)(w + k * 8));
            first = _mm512_cvtepu8_epi16(_mm256_and_si256(both, half));
            second = _mm512_cvtepu8_epi16(_mm256_and_si256(_mm256_srli_epi16(both, 4), half));
        }
        for (int r = 0; r < R; r++) {
            sums[r].v = _mm512_dpwssd_epi32(sums[r].v, first, pair(x + r * x_stride + k));
            sums[r].v = _mm512_dpwssd_epi32(sums[r].v, second, pair(x + r * x_stride + k + 2));
        }
    }
}

#elif defined(TR_AVX2)

struct i32x16 { __m256i lo, hi; };
TR_INLINE f32x16 to_float(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
TR_INLINE __m256i pair(const int16_t* x) {
    int32_t both;
    __builtin_memcpy(&both, x, 4);
    return _mm256_set1_epi32(both);
}

template <int R>
TR_INLINE void add_step(i32x16 (&sums)[R], __m256i lo, __m256i hi, const int16_t* x, size_t x_stride) {
    for (int r = 0; r < R; r++) {
        __m256i value = pair(x + r * x_stride);
        sums[r].lo = _mm256_add_epi32(sums[r].lo, _mm256_madd_epi16(lo, value));
        sums[r].hi = _mm256_add_epi32(sums[r].hi, _mm256_madd_epi16(hi, value));
    }
}

template <int BITS, int R>
TR_INLINE void sum_group(const uint8_t* w, const int16_t* x, size_t x_stride, i32x16 (&sums)[R]) {
    for (int r = 0; r < R; r++) sums[r] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    const __m128i* from = (const __m128i*)w;
    if constexpr (BITS == 8) {
        for (size_t k = 0; k < GROUP; k += 2, from += 2)
            add_step(sums, _mm256_cvtepi8_epi16(_mm_loadu_si128(from)), _mm256_cvtepi8_epi16(_mm_loadu_si128(from + 1)),
                     x + k, x_stride);
    } else {
        const __m256i half = _mm256_set1_epi16(15);
        for (size_t k = 0; k < GROUP; k += 4, from += 2) {
            __m256i lo = _mm256_cvtepu8_epi16(_mm_loadu_si128(from)), hi = _mm256_cvtepu8_epi16(_mm_loadu_si128(from + 1));
            add_step(sums, _mm256_and_si256(lo, half), _mm256_and_si256(hi, half), x + k, x_stride);
            add_step(sums, _mm256_srli_epi16(lo, 4), _mm256_srli_epi16(hi, 4), x + k + 2, x_stride);
        }
    }
}

#else

struct i32x16 { int32_t v[16]; };
TR_INLINE f32x16 to_float(const i32x16& a) { return each([&](int i) { return float(a.v[i]); }); }

template <int BITS, int R>
TR_INLINE void sum_group(const uint8_t* w, const int16_t* x, size_t x_stride, i32x16 (&sums)[R]) {
    for (int r = 0; r < R; r++) {
        const int16_t* row = x + r * x_stride;
        for (int c = 0; c < 16; c++) {
            int32_t sum = 0;
            for (size_t k = 0; k < GROUP; k++) {
                size_t at = ((BITS == 8 ? k / 2 : k / 4) * 16 + c) * 2 + k % 2;
                int32_t weight = BITS == 8 ? int32_t(int8_t(w[at])) : k / 2 % 2 ? w[at] >> 4 : w[at] & 15;
                sum += weight * row[k];
            }
            sums[r].v[c] = sum;
        }
    }
}

#endif

struct Quantized {
    const QuantizedLinear& a;
    size_t groups;
    int16_t* x;     // [T, K]
    float* scales;  // [T, groups]
    float* totals;  // [T, groups]: scale times the sum of the integers

    explicit Quantized(const QuantizedLinear& params)
        : a(params), groups(a.in_features / GROUP), x((int16_t*)a.scratch), scales((float*)(x + a.rows * a.in_features)),
          totals(scales + a.rows * groups) {}

    // scale = max |x| / 32767, integers x * (32767 / max) rounded to even. A NaN or an infinity lives on in the scale.
    void quantize_group(size_t row, size_t group) const {
        const float* from = a.x + row * a.in_features + group * GROUP;
        int16_t* to = x + row * a.in_features + group * GROUP;
        float highest = 0.0f;
        for (size_t i = 0; i < GROUP; i++) {
            float size = __builtin_fabsf(from[i]);
            if (size > highest || size != size) highest = size;
        }
        const bool usable = highest > 0.0f && highest < __builtin_inff();
        const float factor = usable ? LARGEST / highest : 0.0f, scale = highest / LARGEST;
        int32_t sum = 0;
        for (size_t i = 0; i < GROUP; i++) {
            float steps = usable ? from[i] * factor : 0.0f;
            int32_t integer = int32_t(bits_of(steps + EXP_MAGIC) - bits_of(EXP_MAGIC));  // rounded to even
            integer = integer > 32767 ? 32767 : integer < -32767 ? -32767 : integer;
            to[i] = int16_t(integer);
            sum += integer;
        }
        scales[row * groups + group] = scale;
        totals[row * groups + group] = scale * float(sum);
    }

    void quantize() const {
        parallel_rows(a.rows, a.in_features, [&](size_t row) {
            for (size_t group = 0; group < groups; group++) quantize_group(row, group);
        });
    }

    template <int BITS, int R> void tile(size_t row, size_t panel) const {
        constexpr size_t GROUP_BYTES = GROUP * 16 * BITS / 8;
        const uint8_t* w = a.panels + panel * groups * GROUP_BYTES;
        const f16* w_scale = a.scales + panel * groups * 16;
        const f16* minimum = a.minima ? a.minima + panel * groups * 16 : nullptr;
        f32x16 acc[R];
        for (int r = 0; r < R; r++) acc[r] = broadcast(0.0f);
        for (size_t g = 0; g < groups; g++, w += GROUP_BYTES, w_scale += 16) {
            i32x16 sums[R];
            sum_group<BITS, R>(w, x + row * a.in_features + g * GROUP, a.in_features, sums);
            f32x16 scale = load_f16(w_scale);
            for (int r = 0; r < R; r++)
                acc[r] = fma(to_float(sums[r]), mul(broadcast(scales[(row + r) * groups + g]), scale), acc[r]);
            if (minimum) {
                f32x16 lowest = load_f16(minimum + g * 16);
                for (int r = 0; r < R; r++) acc[r] = fma(broadcast(totals[(row + r) * groups + g]), lowest, acc[r]);
            }
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
        parallel_for(panel_groups * row_blocks, [&](size_t task) {
            size_t first = task / row_blocks * PANEL_GROUP, last = least(first + PANEL_GROUP, panel_count);
            size_t row_begin = task % row_blocks * ROW_BLOCK, row_end = least(row_begin + ROW_BLOCK, size_t(a.rows));
            for (size_t panel = first; panel < last; panel++)
                for_row_groups<QUANTIZED_ROWS>(row_begin, row_end, [&](size_t row, auto count) {
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
