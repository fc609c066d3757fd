// Integer products of weights of 8 or 4 bits, or of 16 or 8 in pairs, with activations: all are exact.
//
// Each instruction set's file has i32x16, a vector of sixteen integers, round_group, store_rounded, and
//   four_products: with four activations, + start.
//   add_products: sums += products of 16 columns over one group, for R rows, whose activations from k on are at x(row, k). Weights
//     are unsigned and lie as [16][4] bytes: 8 bits, four k after each other; 4 bits, four k in the low halves and the next four
//     in the high ones.
//   multiply: as of floats (linear.inl), with pairs of k that lie together.
#if defined(TR_AVX2) || defined(TR_AVX512)
namespace {
TR_INLINE int32_t sum(__m128i a) {
    const __m128i two = _mm_add_epi32(a, _mm_unpackhi_epi64(a, a));
    return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}
}  // namespace
#endif

#if defined(TR_AVX512)
#include "integers_avx512.inl"
#elif defined(TR_AVX2)
#include "integers_avx2.inl"
#else
#include "integers_portable.inl"
#endif

namespace {

#if !defined(TR_AVX512)
TR_INLINE void store_rounded(int16_t* to, f32x16 a, f32x16 b) {
    store_rounded(to, a);
    store_rounded(to + 16, b);
}
#endif

#if !defined(TR_AVX512)
// max |x| of each of `count` groups, 0 in the other lanes; the sums of squares of group g are added to squares[g % 4].
TR_INLINE f32x16 largest_of_sixteen(const float* x, size_t count, f32x16 (&squares)[4]) {
    alignas(64) float largest[16] = {};
    const f32x16 zero = broadcast(0.0f);
    for (size_t g = 0; g < count; g++) {
        const f32x16 left = load(x + g * GROUP), right = load(x + g * GROUP + 16);
        squares[g % 4] = fma(right, right, fma(left, left, squares[g % 4]));
        largest[g] = maximum(max(max(left, sub(zero, left)), max(right, sub(zero, right))));
    }
    return load(largest);
}

// Each group times its factor, rounded to even; a group's integers begin `next` after those before. sums: in sixteens.
TR_INLINE void round_groups(const float* x, size_t groups, const float* factors, int8_t* to, size_t next, int32_t* sums) {
    for (size_t g = 0; g < groups; g++) sums[g] = round_group(x + g * GROUP, factors[g], to + g * next);
}
#endif

// max |x| of each group, rounded up to sixteens; returns the sums of squares.
TR_INLINE f32x16 largest_of_groups(const float* x, size_t groups, float* largest) {
    f32x16 squares[4];
    for (f32x16& some : squares) some = broadcast(0.0f);
    for (size_t g = 0; g < groups; g += 16) store(largest + g, largest_of_sixteen(x + g * GROUP, least(groups - g, 16), squares));
    return add(add(squares[0], squares[1]), add(squares[2], squares[3]));
}

template <class Sum> Sum nothing();
template <> TR_INLINE f32x16 nothing<f32x16>() { return broadcast(0.0f); }
template <> TR_INLINE i32x16 nothing<i32x16>() { return all(0); }

// Weights as they are multiplied, in tiles of at most ROWS rows and PANELS panels: as they lie, or unpacked to more bits before.
template <int PACKED_BITS, int MULTIPLIED_BITS = PACKED_BITS> struct Integers {
    static constexpr int BITS = PACKED_BITS, ROWS = QUANTIZED_ROWS, PANELS = QUANTIZED_PANELS;
    static constexpr size_t PACKED_BYTES = GROUP * 2 * BITS, GROUP_BYTES = GROUP * 2 * MULTIPLIED_BITS;
    static constexpr bool SIGNED = false, WIDE = false;  // WIDE: their scales are floats
    static const uint8_t* unpack(const uint8_t* packed, uint8_t*, size_t) { return packed; }
    template <int R, int P, class X> TR_INLINE static void add(const uint8_t* const (&w)[P], X x, i32x16 (&sums)[P][R]) {
        add_products<MULTIPLIED_BITS>(w, x, sums);
    }
    // Of 16 columns with four activations, side by side in x, from k on; + MAGIC_BITS.
    TR_INLINE static i32x16 four_products(const uint8_t* w, size_t k, int32_t x) {
        const int32_t sum = int8_t(x) + int8_t(x >> 8) + int8_t(x >> 16) + int8_t(x >> 24);
        return ::four_products<MULTIPLIED_BITS>(w, k, x, MAGIC_BITS - (BITS == 8 ? 128 * sum : 0));
    }
};
using FourBits = Integers<4>;

template <class Weights> struct Wide : Weights {
    static constexpr bool WIDE = true;
};

// ROWS_TO_SPREAD: from so many rows on 4 bits are spread out, and scales widened; fewer are done sooner with both as they lie.
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
    template <int R, class X> TR_INLINE static void add(const uint8_t* const (&w)[1], X x, i32x16 (&sums)[1][R]) {
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
    template <int R, class X> TR_INLINE static void add(const uint8_t* const (&w)[1], X x, i32x16 (&sums)[1][R]) {
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
