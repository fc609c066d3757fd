// Sixteen integers, and what products of integers are made of, for AVX2. Included by products.inl.
namespace {

struct i32x16 { __m256i lo, hi; };
TR_INLINE i32x16 all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
TR_INLINE f32x16 to_float(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
TR_INLINE f32x16 float_of(i32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
TR_INLINE __m256i four(const int8_t* x) {
    int32_t all;
    __builtin_memcpy(&all, x, 4);
    return _mm256_set1_epi32(all);
}

TR_INLINE void store_rounded(int16_t* to, f32x16 a) {
    const __m256i halves = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(halves, 0b11011000));
}
TR_INLINE __m256i load_pairs(const int16_t* w) { return _mm256_loadu_si256((const __m256i*)w); }
TR_INLINE __m256i load_pairs(const int8_t* w) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w)); }

// As `multiply` of floats, two k at a time.
template <int R, int P, class W>
TR_INLINE void multiply(i32x16 (&sums)[R][P], const int16_t* x, size_t x_stride, const W* const (&w)[P], size_t w_stride,
                        size_t steps) {
    for (size_t k = 0; k < steps; k++)
        for (int p = 0; p < P; p++) {
            const __m256i lo = load_pairs(w[p] + k * w_stride), hi = load_pairs(w[p] + k * w_stride + 16);
            for (int r = 0; r < R; r++) {
                const __m256i all = four((const int8_t*)(x + r * x_stride + 2 * k));
                sums[r][p].lo = _mm256_add_epi32(sums[r][p].lo, _mm256_madd_epi16(lo, all));
                sums[r][p].hi = _mm256_add_epi32(sums[r][p].hi, _mm256_madd_epi16(hi, all));
            }
        }
}

// to [GROUP] = from * factor, rounded to even; returns the sum of what it wrote.
TR_INLINE int32_t round_group(const float* from, float factor, int8_t* to) {
    const __m256 scale = _mm256_set1_ps(factor);
    __m256i part[4];
    for (int i = 0; i < 4; i++) part[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8 * i), scale));
    const __m256i pairs = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
    _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    const __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), pairs), _mm256_set1_epi16(1));
    return sum(_mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)));
}

// What is added per four k and 16 columns is in assembly: compilers would rather keep all products of a group than add each
// at once, and have no registers left; the 4-bit product took a quarter longer.

// 8 bits less 128: sizes times activations with the weight's sign; these must not be -128. Two products fit into 16.
TR_INLINE void add_signed_pairs(__m256i& left, __m256i& right, __m256i a, __m256i b, __m256i a_size, __m256i b_size,
                                __m256i unit, const int8_t* x) {
    __m256i value, product;
    asm("vpbroadcastd %[x], %[value]\n\t"
        "vpsignb %[a], %[value], %[product]\n\t"
        "vpsignb %[b], %[value], %[value]\n\t"
        "vpmaddubsw %[product], %[a_size], %[product]\n\t"
        "vpmaddubsw %[value], %[b_size], %[value]\n\t"
        "vpmaddwd %[unit], %[product], %[product]\n\t"
        "vpmaddwd %[unit], %[value], %[value]\n\t"
        "vpaddd %[product], %[left], %[left]\n\t"
        "vpaddd %[value], %[right], %[right]"
        : [left] "+x"(left), [right] "+x"(right), [value] "=&x"(value), [product] "=&x"(product)
        : [a] "x"(a), [b] "x"(b), [a_size] "x"(a_size), [b_size] "x"(b_size), [unit] "xm"(unit),
          [x] "m"(*(const int32_t*)x));
}

template <int R, class X>
TR_INLINE void add_signed_products(const uint8_t* w, X x, i32x16 (&sums)[R]) {
    const __m256i middle = _mm256_set1_epi8(-128), unit = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (size_t k = 0; k < GROUP; k += 4, w += 64) {
        __m256i a = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)w), middle), a_size = _mm256_abs_epi8(a);
        __m256i b = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)w + 1), middle), b_size = _mm256_abs_epi8(b);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) add_signed_pairs(sums[r].lo, sums[r].hi, a, b, a_size, b_size, unit, x(r, k));
    }
}

// left += products of weights a with four activations, right += those of b: weights of 4 bits, whose sums over a group fit into 16.
TR_INLINE void add_pairs(__m256i& left, __m256i& right, __m256i a, __m256i b, const int8_t* x) {
    __m256i value, product;
    asm("vpbroadcastd %[x], %[value]\n\t"
        "vpmaddubsw %[value], %[a], %[product]\n\t"
        "vpmaddubsw %[value], %[b], %[value]\n\t"
        "vpaddw %[product], %[left], %[left]\n\t"
        "vpaddw %[value], %[right], %[right]"
        : [left] "+x"(left), [right] "+x"(right), [value] "=&x"(value), [product] "=&x"(product)
        : [a] "x"(a), [b] "x"(b), [x] "m"(*(const int32_t*)x));
}

template <int R, class X>
TR_INLINE void add_4_bit_products(const uint8_t* w, X x, i32x16 (&sums)[R]) {
    const __m256i half = _mm256_set1_epi8(15), unit = _mm256_set1_epi16(1);
    __m256i left[R], right[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) left[r] = right[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (size_t k = 0; k < GROUP; k += 8, w += 64) {
        __m256i a = _mm256_loadu_si256((const __m256i*)w), b = _mm256_loadu_si256((const __m256i*)w + 1);
        __m256i a_low = _mm256_and_si256(a, half), a_high = _mm256_and_si256(_mm256_srli_epi16(a, 4), half);
        __m256i b_low = _mm256_and_si256(b, half), b_high = _mm256_and_si256(_mm256_srli_epi16(b, 4), half);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) add_pairs(left[r], right[r], a_low, b_low, x(r, k));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) add_pairs(left[r], right[r], a_high, b_high, x(r, k + 4));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        sums[r].lo = _mm256_add_epi32(sums[r].lo, _mm256_madd_epi16(left[r], unit));
        sums[r].hi = _mm256_add_epi32(sums[r].hi, _mm256_madd_epi16(right[r], unit));
    }
}

template <int R, class X>
TR_INLINE void add_spread_products(const uint8_t* w, X x, i32x16 (&sums)[R]) {
    const __m256i unit = _mm256_set1_epi16(1);
    __m256i left[R], right[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) left[r] = right[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (size_t k = 0; k < GROUP; k += 4, w += 64) {
        const __m256i a = _mm256_load_si256((const __m256i*)w), b = _mm256_load_si256((const __m256i*)w + 1);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) add_pairs(left[r], right[r], a, b, x(r, k));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        sums[r].lo = _mm256_add_epi32(sums[r].lo, _mm256_madd_epi16(left[r], unit));
        sums[r].hi = _mm256_add_epi32(sums[r].hi, _mm256_madd_epi16(right[r], unit));
    }
}

// Two products fit into 16 bits: high parts are within 64 of 0.
template <int BITS> TR_INLINE i32x16 four_products(const uint8_t* w, size_t k, int32_t x, int32_t start) {
    const __m256i activations = _mm256_set1_epi32(x), unit = _mm256_set1_epi16(1);
    __m256i sums[2];
    for (int i = 0; i < 2; i++) {
        __m256i columns = _mm256_loadu_si256((const __m256i*)(w + k / (32 / BITS) * 64) + i);
        if (BITS == 4) columns = _mm256_and_si256(_mm256_srli_epi16(columns, k % 8), _mm256_set1_epi8(15));
        sums[i] = _mm256_madd_epi16(_mm256_maddubs_epi16(columns, activations), unit);
    }
    const __m256i first = _mm256_set1_epi32(start);
    return {_mm256_add_epi32(sums[0], first), _mm256_add_epi32(sums[1], first)};
}

template <int BITS, int R, class X>
TR_INLINE void add_products(const uint8_t* const (&w)[1], X x, i32x16 (&sums)[1][R]) {
    static_assert(BITS == 4, "8 bits are signed");
    add_4_bit_products(w[0], x, sums[0]);
}

}  // namespace
