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
TR_INLINE i32x16 no_sum() { return {_mm512_setzero_si512()}; }
TR_INLINE i32x16 minus(i32x16 a, int32_t b) { return {_mm512_sub_epi32(a.v, _mm512_set1_epi32(b))}; }
TR_INLINE i32x16 plus(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
TR_INLINE i32x16 times_256(i32x16 a) { return {_mm512_slli_epi32(a.v, 8)}; }
TR_INLINE f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
TR_INLINE __m512i four(const int8_t* x) {
    int32_t all;
    __builtin_memcpy(&all, x, 4);
    return _mm512_set1_epi32(all);
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
TR_INLINE i32x16 no_sum() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
TR_INLINE i32x16 minus(i32x16 a, int32_t b) {
    __m256i value = _mm256_set1_epi32(b);
    return {_mm256_sub_epi32(a.lo, value), _mm256_sub_epi32(a.hi, value)};
}
TR_INLINE i32x16 plus(i32x16 a, i32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
TR_INLINE i32x16 times_256(i32x16 a) { return {_mm256_slli_epi32(a.lo, 8), _mm256_slli_epi32(a.hi, 8)}; }
TR_INLINE f32x16 to_float(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
TR_INLINE __m256i four(const int8_t* x) {
    int32_t all;
    __builtin_memcpy(&all, x, 4);
    return _mm256_set1_epi32(all);
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
TR_INLINE i32x16 no_sum() { return {}; }
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
TR_INLINE int32_t round_group(const float* from, float factor, int8_t* to) {
    int32_t sum = 0;
    for (size_t i = 0; i < GROUP; i++) sum += to[i] = int8_t(round_to_even(from[i] * factor));
    return sum;
}
TR_INLINE f32x16 to_float(const i32x16& a) { return each([&](int i) { return float(a.v[i]); }); }

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
    template <int R, class X> TR_INLINE static void add_low(const uint8_t* const (&w)[1], X x, i32x16 (&sums)[1][R]) {
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
