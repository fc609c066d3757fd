// f32x16: the one unit of arithmetic, a vector of 16 floats with the same bits on every instruction set.
//
// Batch invariance by construction: every output element is one fixed order of fp32 operations on this type, so it does
// not depend on the number of rows, on tiling, on threads, or on whether 16 floats are one register, two, or an array.
// Every fma is written out and the file is compiled with -ffp-contract=off. Include after choosing TR_AVX512 / TR_AVX2.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(TR_AVX2) || defined(TR_AVX512)
#include <immintrin.h>
#endif

#define TR_INLINE inline __attribute__((always_inline))

namespace {

using bf16 = uint16_t;

TR_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

TR_INLINE float float_of(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

TR_INLINE float widen(float x) { return x; }
TR_INLINE float widen(int8_t x) { return x; }
TR_INLINE float widen(bf16 x) { return float_of(uint32_t(x) << 16); }
// Half precision, subnormals included. (the exponent is moved by a product, which is exact)
TR_INLINE float widen_f16(uint16_t x) {
    uint32_t magnitude = x & 0x7fff, sign = uint32_t(x & 0x8000) << 16;
    float value = float_of(magnitude << 13) * 0x1p112f;
    return float_of((magnitude >= 0x7c00 ? magnitude << 13 | 0x7f800000 : bits_of(value)) | sign);
}

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
constexpr int32_t MAGIC_BITS = 0x4b400000;
constexpr float EXP_MIN = -87.0f, EXP_MAX = 88.0f;

TR_INLINE int32_t round_to_even(float x) { return int32_t(bits_of(x + MAGIC)) - MAGIC_BITS; }

#if defined(TR_AVX512)

struct f32x16 { __m512 v; };
TR_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
TR_INLINE f32x16 load(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
TR_INLINE f32x16 load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
TR_INLINE f32x16 load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
TR_INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
TR_INLINE f32x16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
TR_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
TR_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
TR_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
TR_INLINE f32x16 div(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
TR_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
TR_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
TR_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TR_INLINE f32x16 times_power_of_two(f32x16 a, f32x16 rounded) {
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(rounded.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), exponent))};
}
TR_INLINE f32x16 zero_where_below(f32x16 a, f32x16 x, float limit) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_NLT_UQ), a.v)};
}
// Bit i: lane i is not below the limit.
TR_INLINE uint32_t lanes_from(f32x16 a, float limit) {
    return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_GE_OQ);
}
TR_INLINE __m256 low_half(f32x16 a) { return _mm512_castps512_ps256(a.v); }
TR_INLINE __m256 high_half(f32x16 a) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
}

#elif defined(TR_AVX2)

struct f32x16 { __m256 lo, hi; };
TR_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TR_INLINE __m256 load_half(const bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
TR_INLINE __m256 load_half(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
TR_INLINE f32x16 load(const bf16* p) { return {load_half(p), load_half(p + 8)}; }
TR_INLINE f32x16 load(const int8_t* p) { return {load_half(p), load_half(p + 8)}; }
TR_INLINE f32x16 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
TR_INLINE void store(float* p, f32x16 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
TR_INLINE f32x16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TR_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
TR_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
TR_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
TR_INLINE f32x16 div(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
TR_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
TR_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
TR_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
TR_INLINE __m256 scaled_half(__m256 a, __m256 rounded) {
    __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(rounded), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}
TR_INLINE f32x16 times_power_of_two(f32x16 a, f32x16 rounded) {
    return {scaled_half(a.lo, rounded.lo), scaled_half(a.hi, rounded.hi)};
}
TR_INLINE f32x16 zero_where_below(f32x16 a, f32x16 x, float limit) {
    __m256 bound = _mm256_set1_ps(limit);
    return {_mm256_and_ps(a.lo, _mm256_cmp_ps(x.lo, bound, _CMP_NLT_UQ)),
            _mm256_and_ps(a.hi, _mm256_cmp_ps(x.hi, bound, _CMP_NLT_UQ))};
}
TR_INLINE uint32_t lanes_from(f32x16 a, float limit) {
    const __m256 bound = _mm256_set1_ps(limit);
    const uint32_t lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, bound, _CMP_GE_OQ));
    return lo | uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.hi, bound, _CMP_GE_OQ))) << 8;
}
TR_INLINE __m256 low_half(f32x16 a) { return a.lo; }
TR_INLINE __m256 high_half(f32x16 a) { return a.hi; }

#else  // portable: loops of fixed length, which the compiler turns into NEON on arm64

struct f32x16 { float v[16]; };
template <class F> TR_INLINE f32x16 each(F f) {
    f32x16 out;
    for (int i = 0; i < 16; i++) out.v[i] = f(i);
    return out;
}
template <class W> TR_INLINE f32x16 load(const W* p) { return each([=](int i) { return widen(p[i]); }); }
TR_INLINE f32x16 load_f16(const uint16_t* p) { return each([=](int i) { return widen_f16(p[i]); }); }
TR_INLINE void store(float* p, const f32x16& a) { __builtin_memcpy(p, a.v, sizeof a.v); }
TR_INLINE f32x16 broadcast(float x) { return each([=](int) { return x; }); }
TR_INLINE f32x16 add(const f32x16& a, const f32x16& b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
TR_INLINE f32x16 sub(const f32x16& a, const f32x16& b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
TR_INLINE f32x16 mul(const f32x16& a, const f32x16& b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
TR_INLINE f32x16 div(const f32x16& a, const f32x16& b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
TR_INLINE f32x16 max(const f32x16& a, const f32x16& b) {  // the second one if either is NaN, as x86 does
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
TR_INLINE f32x16 min(const f32x16& a, const f32x16& b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
TR_INLINE f32x16 fma(const f32x16& a, const f32x16& b, const f32x16& c) {
    return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
TR_INLINE f32x16 times_power_of_two(const f32x16& a, const f32x16& rounded) {
    return each([&](int i) { return float_of(bits_of(a.v[i]) + (bits_of(rounded.v[i]) << 23)); });
}
TR_INLINE f32x16 zero_where_below(const f32x16& a, const f32x16& x, float limit) {
    return each([&](int i) { return x.v[i] < limit ? 0.0f : a.v[i]; });
}
TR_INLINE uint32_t lanes_from(const f32x16& a, float limit) {
    uint32_t lanes = 0;
    for (int i = 0; i < 16; i++) lanes |= uint32_t(a.v[i] >= limit) << i;
    return lanes;
}

#endif

// Horizontal reductions: one tree, lane i with i+8, then i+4, i+2, i+1.
#if defined(TR_AVX2) || defined(TR_AVX512)
TR_INLINE float sum(f32x16 a) {
    __m256 eight = _mm256_add_ps(low_half(a), high_half(a));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
TR_INLINE float maximum(f32x16 a) {
    __m256 eight = _mm256_max_ps(low_half(a), high_half(a));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#else
TR_INLINE float sum(f32x16 a) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a.v[i] = a.v[i] + a.v[i + half];
    return a.v[0];
}
TR_INLINE float maximum(f32x16 a) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
    return a.v[0];
}
#endif

#if defined(TR_AVX512)
// What 16 lanes hold of four vectors each, brought together: lane i of a 128-bit part is of vector i.
TR_INLINE __m512i lanes(__m512i a, __m512i b, bool high) { return high ? _mm512_unpackhi_epi32(a, b) : _mm512_unpacklo_epi32(a, b); }
TR_INLINE __m512i pairs(__m512i a, __m512i b, bool high) { return high ? _mm512_unpackhi_epi64(a, b) : _mm512_unpacklo_epi64(a, b); }
template <class F> TR_INLINE __m512i fold_lanes(const __m512i* of, F f) {
    const __m512i left = f(lanes(of[0], of[1], false), lanes(of[0], of[1], true));
    const __m512i right = f(lanes(of[2], of[3], false), lanes(of[2], of[3], true));
    return f(pairs(left, right, false), pairs(left, right, true));
}

// The four 128-bit parts of each of four vectors, folded: part i is of vector i.
template <class F> TR_INLINE __m512i quarters(const __m512i* of, F f) {
    auto halves = [f](__m512i a, __m512i b) {
        return f(_mm512_shuffle_i64x2(a, b, 0b01000100), _mm512_shuffle_i64x2(a, b, 0b11101110));
    };
    const __m512i left = halves(of[0], of[1]), right = halves(of[2], of[3]);
    return f(_mm512_shuffle_i64x2(left, right, 0b10001000), _mm512_shuffle_i64x2(left, right, 0b11011101));
}

#endif

// Lane r: the largest of x[r].
#if defined(TR_AVX512)
TR_INLINE __m512 greater(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
template <int R> TR_INLINE f32x16 maxima(const f32x16 (&x)[R]) {
    static_assert(R <= 8);
    auto of_four = [&](int begin) {
        __m512i of[4];
        for (int r = 0; r < 4; r++) of[r] = _mm512_castps_si512(x[begin + r < R ? begin + r : 0].v);
        return _mm512_castsi512_ps(fold_lanes(of, [](__m512i a, __m512i b) {
            return _mm512_castps_si512(greater(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
        }));
    };
    const __m512 first = of_four(0), second = R > 4 ? of_four(4) : first;
    const __m512 halves = greater(_mm512_shuffle_f32x4(first, second, 0b01000100), _mm512_shuffle_f32x4(first, second, 0b11101110));
    const __m512 all = greater(halves, _mm512_shuffle_f32x4(halves, halves, 0b10110001));
    return {_mm512_shuffle_f32x4(all, all, 0b11011000)};
}
#else
template <int R> TR_INLINE f32x16 maxima(const f32x16 (&x)[R]) {
    alignas(64) float largest[16] = {};
    for (int r = 0; r < R; r++) largest[r] = maximum(x[r]);
    return load(largest);
}
#endif

template <class W> TR_INLINE f32x16 load_part(const W* p, size_t n, float fill = 0.0f) {
    if (n >= 16) return load(p);
    float lanes[16];
    for (size_t i = 0; i < 16; i++) lanes[i] = i < n ? widen(p[i]) : fill;
    return load(lanes);
}

TR_INLINE void store_part(float* p, f32x16 a, size_t n) {
    if (n >= 16) return store(p, a);
    float lanes[16];
    store(lanes, a);
    for (size_t i = 0; i < n; i++) p[i] = lanes[i];
}

constexpr float LOG2_E = 1.44269504f, LOG2_E_REST = 1.92596299e-8f;

// 2^r * 2^n for r within 0.5 of 0, within 2 ulp, exactly 1 at 0; n as its low bits. (a minimax polynomial)
TR_INLINE f32x16 power_of_two(f32x16 r, f32x16 n) {
    f32x16 p = broadcast(1.32647272e-3f);
    p = fma(p, r, broadcast(9.67151264e-3f));
    p = fma(p, r, broadcast(5.55073374e-2f));
    p = fma(p, r, broadcast(2.40222421e-1f));
    p = fma(p, r, broadcast(6.93146977e-1f));
    return times_power_of_two(fma(p, r, broadcast(1.0f)), n);
}

// 2^x, exactly 0 below -126.
TR_INLINE f32x16 exp2_below_0(f32x16 x) {
    const f32x16 rounded = add(x, broadcast(MAGIC)), r = sub(x, sub(rounded, broadcast(MAGIC)));
    return zero_where_below(power_of_two(r, rounded), x, -126.0f);
}

// e^x up to 88, capped above; exactly 0 below -87.
TR_INLINE f32x16 exp(f32x16 x) {
    const f32x16 capped = min(broadcast(EXP_MAX), x), rounded = fma(capped, broadcast(LOG2_E), broadcast(MAGIC));
    const f32x16 n = sub(rounded, broadcast(MAGIC)), r = fma(capped, broadcast(LOG2_E), sub(broadcast(0.0f), n));
    return zero_where_below(power_of_two(fma(capped, broadcast(LOG2_E_REST), r), rounded), capped, EXP_MIN);
}

// Within 2^-22 of the true value, exactly 1 and -1 far from 0.
TR_INLINE f32x16 tanh(f32x16 x) {
    return sub(broadcast(1.0f), div(broadcast(2.0f), add(exp(add(x, x)), broadcast(1.0f))));
}

}  // namespace
