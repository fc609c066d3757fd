// Integer products of weights of 8 or 4 bits with activations of 8, by instruction set. All are exact.
namespace {

#if defined(TR_AVX2) || defined(TR_AVX512)
TR_INLINE int32_t sum(__m128i a) {
    const __m128i two = _mm_add_epi32(a, _mm_unpackhi_epi64(a, a));
    return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}
#endif

// add_products: sums += products of 16 columns over one group, for R rows, whose activations from k on are at x(row, k). Weights
// are unsigned and lie as [16][4] bytes: 8 bits, four k after each other; 4 bits, four k in the low halves and the next four in
// the high ones.
#if defined(TR_AVX512)

struct i32x16 { __m512i v; };
TR_INLINE i32x16 all(int32_t x) { return {_mm512_set1_epi32(x)}; }
TR_INLINE i32x16 minus(i32x16 a, int32_t b) { return {_mm512_sub_epi32(a.v, _mm512_set1_epi32(b))}; }
TR_INLINE i32x16 plus(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
TR_INLINE i32x16 times_256(i32x16 a) { return {_mm512_slli_epi32(a.v, 8)}; }
TR_INLINE f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
TR_INLINE f32x16 float_of(i32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
TR_INLINE i32x16 bits_of(f32x16 a) { return {_mm512_castps_si512(a.v)}; }
TR_INLINE __m512i four(const int8_t* x) {
    int32_t all;
    __builtin_memcpy(&all, x, 4);
    return _mm512_set1_epi32(all);
}

TR_INLINE void store_rounded(int16_t* to, f32x16 a) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
TR_INLINE __m512i load_pairs(const int16_t* w) { return _mm512_loadu_si512(w); }
TR_INLINE __m512i load_pairs(const int8_t* w) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w)); }

// In assembly: compilers would copy every sum before and after.
TR_INLINE void add_pair(i32x16& sum, __m512i w, __m512i x) {
    asm("vpdpwssd %[x], %[w], %[sum]" : [sum] "+v"(sum.v) : [w] "v"(w), [x] "v"(x));
}

// As `multiply` of floats, two k at a time.
template <int R, int P, class W>
TR_INLINE void multiply(i32x16 (&sums)[R][P], const int16_t* x, size_t x_stride, const W* const (&w)[P], size_t w_stride,
                        size_t steps) {
    for (size_t k = 0; k < steps; k++) {
        __m512i column[P];
        for (int p = 0; p < P; p++) column[p] = load_pairs(w[p] + k * w_stride);
        for (int r = 0; r < R; r++) {
            const __m512i all = four((const int8_t*)(x + r * x_stride + 2 * k));
            for (int p = 0; p < P; p++) add_pair(sums[r][p], column[p], all);
        }
    }
}

// to [GROUP] = from * factor, rounded to even; returns their sum.
TR_INLINE int32_t round_group(const float* from, float factor, int8_t* to) {
    const __m512 scale = _mm512_set1_ps(factor);
    const __m128i left = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from), scale)));
    const __m128i right = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + 16), scale)));
    _mm_storeu_si128((__m128i*)to, left);
    _mm_storeu_si128((__m128i*)to + 1, right);
    const __m128i one = _mm_set1_epi8(1);
    return sum(_mm_dpbusd_epi32(_mm_dpbusd_epi32(_mm_setzero_si128(), one, left), one, right));
}

// What 16 lanes hold of four groups each, brought together: lane i of a 128-bit part is of group i.
TR_INLINE __m512i lanes(__m512i a, __m512i b, bool high) { return high ? _mm512_unpackhi_epi32(a, b) : _mm512_unpacklo_epi32(a, b); }
TR_INLINE __m512i pairs(__m512i a, __m512i b, bool high) { return high ? _mm512_unpackhi_epi64(a, b) : _mm512_unpacklo_epi64(a, b); }
template <class F> TR_INLINE __m512i fold_lanes(const __m512i* of, F f) {
    const __m512i left = f(lanes(of[0], of[1], false), lanes(of[0], of[1], true));
    const __m512i right = f(lanes(of[2], of[3], false), lanes(of[2], of[3], true));
    return f(pairs(left, right, false), pairs(left, right, true));
}

// Four groups at a time; what is left, and what a lesser machine does, is below.
TR_INLINE size_t largest_of_fours(const float* x, size_t groups, float* largest, f32x16& squares) {
    const __m512i size = _mm512_set1_epi32(0x7fffffff);
    size_t g = 0;
    for (; g + 4 <= groups; g += 4) {
        __m512i of[4];
        for (int i = 0; i < 4; i++) {
            const f32x16 left = load(x + (g + i) * GROUP), right = load(x + (g + i) * GROUP + 16);
            squares = fma(right, right, fma(left, left, squares));
            // sizes of floats are ordered as their bits
            of[i] = _mm512_max_epi32(_mm512_and_si512(bits_of(left).v, size), _mm512_and_si512(bits_of(right).v, size));
        }
        const __m512i all = fold_lanes(of, [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); });
        const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
        const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        _mm_storeu_si128((__m128i*)(largest + g), four);
    }
    return g;
}

TR_INLINE __m512i rounded(const float* x, float factor) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(factor)));
}

TR_INLINE size_t round_eights(const float* x, size_t groups, const float* factors, int8_t* to, size_t next, int32_t* sums,
                              size_t next_sum) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), one = _mm512_set1_epi8(1);
    size_t g = 0;
    for (; g + 8 <= groups; g += 8) {
        __m512i of[4];
        for (int i = 0; i < 4; i++) {
            const float *first = x + (g + 2 * i) * GROUP, *second = first + GROUP, *factor = factors + g + 2 * i;
            const __m512i a = _mm512_packs_epi32(rounded(first, factor[0]), rounded(first + 16, factor[0]));
            const __m512i b = _mm512_packs_epi32(rounded(second, factor[1]), rounded(second + 16, factor[1]));
            const __m512i both = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(a, b));
            _mm256_storeu_si256((__m256i*)(to + (g + 2 * i) * next), _mm512_castsi512_si256(both));
            _mm256_storeu_si256((__m256i*)(to + (g + 2 * i + 1) * next), _mm512_extracti64x4_epi64(both, 1));
            of[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), one, both);
        }
        const __m512i quarters = fold_lanes(of, [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
        alignas(64) int32_t part[16];
        _mm512_store_si512(part, _mm512_add_epi32(quarters, _mm512_shuffle_i64x2(quarters, quarters, 0b10110001)));
        for (int i = 0; i < 4; i++) {
            sums[(g + 2 * i) * next_sum] = part[i];
            sums[(g + 2 * i + 1) * next_sum] = part[8 + i];
        }
    }
    return g;
}

// Each activation is fetched once for P panels: the loads, not the products, would be what limits it.
template <int R, int P, class X>
TR_INLINE void add_four(const __m512i (&w)[P], X x, size_t k, i32x16 (&sums)[P][R]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        const __m512i all = four(x(r, k));
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) sums[p][r].v = _mm512_dpbusd_epi32(sums[p][r].v, w[p], all);
    }
}

template <int BITS, int R, int P, class X>
TR_INLINE void add_products(const uint8_t* const (&w)[P], X x, i32x16 (&sums)[P][R]) {
    const __m512i half = _mm512_set1_epi8(15);
#pragma GCC unroll 8
    for (size_t k = 0; k < GROUP; k += 32 / BITS) {
        __m512i all[P], low[P], high[P];
        for (int p = 0; p < P; p++) all[p] = _mm512_loadu_si512(w[p] + k * 2 * BITS);
        if constexpr (BITS == 8) {
            add_four<R>(all, x, k, sums);
        } else {
            for (int p = 0; p < P; p++) low[p] = _mm512_and_si512(all[p], half);
            add_four<R>(low, x, k, sums);
            for (int p = 0; p < P; p++) high[p] = _mm512_and_si512(_mm512_srli_epi16(all[p], 4), half);
            add_four<R>(high, x, k + 4, sums);
        }
    }
}

#elif defined(TR_AVX2)

struct i32x16 { __m256i lo, hi; };
TR_INLINE i32x16 all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
TR_INLINE i32x16 minus(i32x16 a, int32_t b) {
    __m256i value = _mm256_set1_epi32(b);
    return {_mm256_sub_epi32(a.lo, value), _mm256_sub_epi32(a.hi, value)};
}
TR_INLINE i32x16 plus(i32x16 a, i32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
TR_INLINE i32x16 times_256(i32x16 a) { return {_mm256_slli_epi32(a.lo, 8), _mm256_slli_epi32(a.hi, 8)}; }
TR_INLINE f32x16 to_float(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
TR_INLINE f32x16 float_of(i32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
TR_INLINE i32x16 bits_of(f32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
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

// to [GROUP] = from * factor, rounded to even; returns their sum.
TR_INLINE int32_t round_group(const float* from, float factor, int8_t* to) {
    const __m256 scale = _mm256_set1_ps(factor);
    __m256i part[4];
    for (int i = 0; i < 4; i++) part[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8 * i), scale));
    const __m256i pairs = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
    _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    const __m256i sums = _mm256_add_epi32(_mm256_add_epi32(part[0], part[1]), _mm256_add_epi32(part[2], part[3]));
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

// 8 bits are two times 4.
template <int R, class X>
TR_INLINE void add_8_bit_products(const uint8_t* w, X x, i32x16 (&sums)[R]) {
    const __m256i half = _mm256_set1_epi8(15);
    for (int shift = 0; shift < 8; shift += 4) {
        const __m256i unit = _mm256_set1_epi16(1 << shift);
        __m256i left[R], right[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) left[r] = right[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (size_t k = 0; k < GROUP; k += 4) {
            const __m256i* from = (const __m256i*)(w + 16 * k);
            __m256i a = _mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256(from), shift), half);
            __m256i b = _mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256(from + 1), shift), half);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) add_pairs(left[r], right[r], a, b, x(r, k));
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            sums[r].lo = _mm256_add_epi32(sums[r].lo, _mm256_madd_epi16(left[r], unit));
            sums[r].hi = _mm256_add_epi32(sums[r].hi, _mm256_madd_epi16(right[r], unit));
        }
    }
}

template <int BITS, int R, class X>
TR_INLINE void add_products(const uint8_t* const (&w)[1], X x, i32x16 (&sums)[1][R]) {
    if constexpr (BITS == 4) add_4_bit_products(w[0], x, sums[0]);
    else add_8_bit_products(w[0], x, sums[0]);
}

#else

struct i32x16 { int32_t v[16]; };
TR_INLINE i32x16 all(int32_t x) {
    i32x16 out;
    for (int32_t& value : out.v) value = x;
    return out;
}
TR_INLINE i32x16 minus(i32x16 a, int32_t b) {
    for (int32_t& value : a.v) value -= b;
    return a;
}
TR_INLINE i32x16 plus(i32x16 a, const i32x16& b) {
    for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
    return a;
}
TR_INLINE i32x16 times_256(i32x16 a) {
    for (int32_t& value : a.v) value *= 256;
    return a;
}
TR_INLINE void store_rounded(int16_t* to, const f32x16& a) {
    for (int i = 0; i < 16; i++) to[i] = int16_t(round_to_even(a.v[i]));
}

// As `multiply` of floats, two k at a time.
template <int R, int P, class W>
TR_INLINE void multiply(i32x16 (&sums)[R][P], const int16_t* x, size_t x_stride, const W* const (&w)[P], size_t w_stride,
                        size_t steps) {
    for (size_t k = 0; k < steps; k++)
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++)
                for (int i = 0; i < 32; i++) sums[r][p].v[i / 2] += w[p][k * w_stride + i] * x[r * x_stride + 2 * k + i % 2];
}

TR_INLINE int32_t round_group(const float* from, float factor, int8_t* to) {
    int32_t sum = 0;
    for (size_t i = 0; i < GROUP; i++) sum += to[i] = int8_t(round_to_even(from[i] * factor));
    return sum;
}
TR_INLINE f32x16 to_float(const i32x16& a) { return each([&](int i) { return float(a.v[i]); }); }
TR_INLINE f32x16 float_of(const i32x16& a) { return each([&](int i) { return float_of(uint32_t(a.v[i])); }); }
TR_INLINE i32x16 bits_of(const f32x16& a) {
    i32x16 out;
    for (int i = 0; i < 16; i++) out.v[i] = int32_t(bits_of(a.v[i]));
    return out;
}

template <int BITS, int R, class X>
TR_INLINE void add_products(const uint8_t* const (&w)[1], X x, i32x16 (&sums)[1][R]) {
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 16; c++) {
            int32_t sum = 0;
            for (size_t k = 0; k < GROUP; k++) {
                uint8_t byte = w[0][k / (32 / BITS) * 64 + c * 4 + k % 4];
                sum += (BITS == 8 ? byte : k / 4 % 2 ? byte >> 4 : byte & 15) * x(r, k / 4 * 4)[k % 4];
            }
            sums[0][r].v[c] += sum;
        }
}

#endif

#if !defined(TR_AVX512)
TR_INLINE size_t largest_of_fours(const float*, size_t, float*, f32x16&) { return 0; }
TR_INLINE size_t round_eights(const float*, size_t, const float*, int8_t*, size_t, int32_t*, size_t) { return 0; }
#endif

// max |x| of each group; returns the sums of squares.
TR_INLINE f32x16 largest_of_groups(const float* x, size_t groups, float* largest) {
    f32x16 squares = broadcast(0.0f), zero = squares;
    for (size_t g = largest_of_fours(x, groups, largest, squares); g < groups; g++) {
        const f32x16 left = load(x + g * GROUP), right = load(x + g * GROUP + 16);
        squares = fma(right, right, fma(left, left, squares));
        largest[g] = maximum(max(max(left, sub(zero, left)), max(right, sub(zero, right))));
    }
    return squares;
}

// Each group times its factor, rounded to even; a group's integers begin `next` after those before, its sum `next_sum`.
TR_INLINE void round_groups(const float* x, size_t groups, const float* factors, int8_t* to, size_t next, int32_t* sums,
                            size_t next_sum) {
    for (size_t g = round_eights(x, groups, factors, to, next, sums, next_sum); g < groups; g++)
        sums[g * next_sum] = round_group(x + g * GROUP, factors[g], to + g * next);
}

template <class Sum> Sum nothing();
template <> TR_INLINE f32x16 nothing<f32x16>() { return broadcast(0.0f); }
template <> TR_INLINE i32x16 nothing<i32x16>() { return all(0); }

// Weights as they are multiplied, in tiles of at most ROWS rows and PANELS panels: as they lie, or unpacked to more bits before.
template <int PACKED_BITS, int MULTIPLIED_BITS = PACKED_BITS> struct Integers {
    static constexpr int BITS = PACKED_BITS, ROWS = QUANTIZED_ROWS, PANELS = QUANTIZED_PANELS;
    static constexpr size_t PACKED_BYTES = GROUP * 2 * BITS, GROUP_BYTES = GROUP * 2 * MULTIPLIED_BITS;
    static constexpr bool SIGNED = false;
    static const uint8_t* unpack(const uint8_t* packed, uint8_t*, size_t) { return packed; }
    // sums += products with activations, or with their low halves.
    template <int R, int P, class X> TR_INLINE static void add_high(const uint8_t* const (&w)[P], X x, i32x16 (&sums)[P][R]) {
        add_products<MULTIPLIED_BITS>(w, x, sums);
    }
    template <int R, int P, class X> TR_INLINE static void add_low(const uint8_t* const (&w)[P], X x, i32x16 (&sums)[P][R]) {
        add_products<MULTIPLIED_BITS>(w, x, sums);
    }
};
using FourBits = Integers<4>;

// From so many rows on 4 bits are spread out; fewer are done sooner with the weights as they lie.
#if defined(TR_AVX512)

using EightBits = Integers<8>;

// 4 bits, each in a byte.
struct Spread : Integers<4, 8> {
    static const uint8_t* unpack(const uint8_t* packed, uint8_t* to, size_t bytes) {
        const __m512i half = _mm512_set1_epi8(15);
        for (size_t i = 0; i < bytes; i += 64) {
            const __m512i all = _mm512_loadu_si512(packed + i);
            _mm512_store_si512(to + 2 * i, _mm512_and_si512(all, half));
            _mm512_store_si512(to + 2 * i + 64, _mm512_and_si512(_mm512_srli_epi16(all, 4), half));
        }
        return to;
    }
};
constexpr size_t ROWS_TO_SPREAD = 25;

#elif defined(TR_AVX2)

struct EightBits : Integers<8> {
    static constexpr int ROWS = 4;
    static constexpr bool SIGNED = true;
    template <int R, class X> TR_INLINE static void add_high(const uint8_t* const (&w)[1], X x, i32x16 (&sums)[1][R]) {
        add_signed_products(w[0], x, sums[0]);
    }
};

// 4 bits, each in a byte.
struct Spread : Integers<4, 8> {
    static constexpr int ROWS = 4;
    static const uint8_t* unpack(const uint8_t* packed, uint8_t* to, size_t bytes) {
        const __m256i half = _mm256_set1_epi8(15);
        for (size_t i = 0; i < bytes; i += 32) {
            const __m256i all = _mm256_loadu_si256((const __m256i*)(packed + i));
            __m256i* steps = (__m256i*)(to + i / 64 * 128 + i % 64);
            steps[0] = _mm256_and_si256(all, half);
            steps[2] = _mm256_and_si256(_mm256_srli_epi16(all, 4), half);
        }
        return to;
    }
    template <int R, class X> TR_INLINE static void add_high(const uint8_t* const (&w)[1], X x, i32x16 (&sums)[1][R]) {
        add_spread_products(w[0], x, sums[0]);
    }
    template <int R, class X> TR_INLINE static void add_low(const uint8_t* const (&w)[1], X x, i32x16 (&sums)[1][R]) {
        add_spread_products(w[0], x, sums[0]);
    }
};
constexpr size_t ROWS_TO_SPREAD = 9;

#else

using EightBits = Integers<8>;
using Spread = FourBits;
constexpr size_t ROWS_TO_SPREAD = ~size_t(0);

#endif

}  // namespace
