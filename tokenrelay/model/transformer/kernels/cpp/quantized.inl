// quantized_linear: weights of 8 or 4 bits, activations of 8, in groups of 32 along K. Included by kernels.inl.
//
// Within a group the products are summed as integers, which is exact in any order; then, groups ascending,
//   acc = fma(sum, x_scale * w_scale, acc), and acc = fma(x_scale * sum of x, minimum, acc) where weights have one,
// and + bias at the end. So a row's bits depend on nothing but the row, whatever instructions do the sums.
namespace {

constexpr size_t GROUP = 32;

// The integer sums of 16 columns over one group, for R rows. Weights of a group: 8 bits [8][16][4], signed, steps of four k
// after each other; 4 bits [4][16][4], unsigned, the low nibbles four k and the high nibbles the next four.
// Activations are in -127 … 127: so no pair of products overflows 16 bits in maddubs (8 bits: 2 * 128 * 127; 4 bits: all
// eight steps together 8 * 2 * 15 * 127).
#if defined(TR_AVX512)

struct i32x16 { __m512i v; };
TR_INLINE f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
TR_INLINE __m512i four(const int8_t* x) {
    int32_t bytes;
    __builtin_memcpy(&bytes, x, 4);
    return _mm512_set1_epi32(bytes);
}

template <int BITS, int R>
TR_INLINE void sum_group(const uint8_t* w, const int8_t* x, size_t x_stride, i32x16 (&sums)[R]) {
    for (int r = 0; r < R; r++) sums[r].v = _mm512_setzero_si512();
    if constexpr (BITS == 8) {  // the instruction multiplies unsigned with signed: x + 128 with w, less 128 times w
        const __m512i offset = _mm512_set1_epi8(-128);
        __m512i excess = _mm512_setzero_si512();
        for (size_t k = 0; k < GROUP; k += 4) {
            __m512i c = _mm512_loadu_si512(w + k * 16);
            excess = _mm512_dpbusd_epi32(excess, offset, c);
            for (int r = 0; r < R; r++)
                sums[r].v = _mm512_dpbusd_epi32(sums[r].v, _mm512_xor_si512(four(x + r * x_stride + k), offset), c);
        }
        for (int r = 0; r < R; r++) sums[r].v = _mm512_sub_epi32(sums[r].v, excess);
    } else {
        const __m512i nibble = _mm512_set1_epi8(15);
        for (size_t k = 0; k < GROUP; k += 8) {
            __m512i both = _mm512_loadu_si512(w + k * 8);
            __m512i low = _mm512_and_si512(both, nibble), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
            for (int r = 0; r < R; r++) {
                sums[r].v = _mm512_dpbusd_epi32(sums[r].v, low, four(x + r * x_stride + k));
                sums[r].v = _mm512_dpbusd_epi32(sums[r].v, high, four(x + r * x_stride + k + 4));
            }
        }
    }
}

#elif defined(TR_AVX2)

struct i32x16 { __m256i lo, hi; };
TR_INLINE f32x16 to_float(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
TR_INLINE __m256i four(const int8_t* x) {
    int32_t bytes;
    __builtin_memcpy(&bytes, x, 4);
    return _mm256_set1_epi32(bytes);
}
TR_INLINE __m256i half_of(const uint8_t* w, int half) { return _mm256_loadu_si256((const __m256i*)w + half); }

// 8 columns.
template <int R>
TR_INLINE void sum_half_8(const uint8_t* w, const int8_t* x, size_t x_stride, __m256i (&sums)[R], int half) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int r = 0; r < R; r++) sums[r] = _mm256_setzero_si256();
    for (size_t k = 0; k < GROUP; k += 4) {
        __m256i c = half_of(w + k * 16, half), size = _mm256_abs_epi8(c);
        for (int r = 0; r < R; r++) {
            __m256i turned = _mm256_sign_epi8(four(x + r * x_stride + k), c);
            sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(_mm256_maddubs_epi16(size, turned), ones));
        }
    }
}

template <int R>
TR_INLINE void sum_half_4(const uint8_t* w, const int8_t* x, size_t x_stride, __m256i (&sums)[R], int half) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int r = 0; r < R; r++) sums[r] = _mm256_setzero_si256();
    for (size_t k = 0; k < GROUP; k += 8) {
        __m256i both = half_of(w + k * 8, half);
        __m256i low = _mm256_and_si256(both, nibble), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        for (int r = 0; r < R; r++) {
            const int8_t* row = x + r * x_stride + k;
            sums[r] = _mm256_add_epi16(sums[r], _mm256_maddubs_epi16(low, four(row)));
            sums[r] = _mm256_add_epi16(sums[r], _mm256_maddubs_epi16(high, four(row + 4)));
        }
    }
    for (int r = 0; r < R; r++) sums[r] = _mm256_madd_epi16(sums[r], _mm256_set1_epi16(1));
}

template <int BITS, int R>
TR_INLINE void sum_group(const uint8_t* w, const int8_t* x, size_t x_stride, i32x16 (&sums)[R]) {
    __m256i lo[R], hi[R];
    if constexpr (BITS == 8) {
        sum_half_8<R>(w, x, x_stride, lo, 0);
        sum_half_8<R>(w, x, x_stride, hi, 1);
    } else {
        sum_half_4<R>(w, x, x_stride, lo, 0);
        sum_half_4<R>(w, x, x_stride, hi, 1);
    }
    for (int r = 0; r < R; r++) sums[r] = {lo[r], hi[r]};
}

#else

struct i32x16 { int32_t v[16]; };
TR_INLINE f32x16 to_float(const i32x16& a) { return each([&](int i) { return float(a.v[i]); }); }

template <int BITS, int R>
TR_INLINE void sum_group(const uint8_t* w, const int8_t* x, size_t x_stride, i32x16 (&sums)[R]) {
    for (int r = 0; r < R; r++) {
        const int8_t* row = x + r * x_stride;
        for (int c = 0; c < 16; c++) {
            int32_t sum = 0;
            for (size_t k = 0; k < GROUP; k++) {
                size_t at = BITS == 8 ? (k / 4 * 16 + c) * 4 + k % 4 : (k / 8 * 16 + c) * 4 + k % 4;
                int32_t weight = BITS == 8 ? int32_t(int8_t(w[at])) : k / 4 % 2 ? w[at] >> 4 : w[at] & 15;
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
    int8_t* x;      // [T, K]
    float* scales;  // [T, groups]
    float* totals;  // [T, groups]: scale times the sum of the integers

    explicit Quantized(const QuantizedLinear& params)
        : a(params), groups(a.in_features / GROUP), x((int8_t*)a.scratch), scales((float*)(x + a.rows * a.in_features)),
          totals(scales + a.rows * groups) {}

    // scale = max |x| / 127, integers x * (127 / max) rounded to even. A NaN or an infinity lives on in the scale.
    void quantize_group(size_t row, size_t group) const {
        const float* from = a.x + row * a.in_features + group * GROUP;
        int8_t* to = x + row * a.in_features + group * GROUP;
        float highest = 0.0f;
        for (size_t i = 0; i < GROUP; i++) {
            float size = __builtin_fabsf(from[i]);
            if (size > highest || size != size) highest = size;
        }
        const bool usable = highest > 0.0f && highest < __builtin_inff();
        const float factor = usable ? 127.0f / highest : 0.0f, scale = highest / 127.0f;
        int32_t sum = 0;
        for (size_t i = 0; i < GROUP; i++) {
            float steps = usable ? from[i] * factor : 0.0f;
            int32_t integer = int32_t(bits_of(steps + EXP_MAGIC) - bits_of(EXP_MAGIC));  // rounded to even
            integer = integer > 127 ? 127 : integer < -127 ? -127 : integer;
            to[i] = int8_t(integer);
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
