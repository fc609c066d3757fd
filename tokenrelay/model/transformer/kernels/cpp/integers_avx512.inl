// Sixteen integers, and what products of integers are made of, for AVX-512 with VNNI. Included by products.inl.
namespace {

struct i32x16 { __m512i v; };
TR_INLINE i32x16 all(int32_t x) { return {_mm512_set1_epi32(x)}; }
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
// Of 32 numbers.
TR_INLINE void store_rounded(int16_t* to, f32x16 a, f32x16 b) {
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __m512i both = _mm512_packs_epi32(_mm512_cvtps_epi32(a.v), _mm512_cvtps_epi32(b.v));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, both));
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

TR_INLINE __m512i rounded(const float* x, float factor) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(factor)));
}

TR_INLINE __m512i larger(__m512i a, __m512i b) { return _mm512_max_epi32(a, b); }

// max |x| of each of `count` groups, 0 in the other lanes; the sums of squares of group g are added to squares[g % 4].
TR_INLINE f32x16 largest_of_sixteen(const float* x, size_t count, f32x16 (&squares)[4]) {
    const __m512i size = _mm512_set1_epi32(0x7fffffff);
    __m512i fours[4];
    for (size_t four = 0; four < 4; four++) {
        __m512i of[4];
        for (size_t i = 0; i < 4; i++) {
            of[i] = _mm512_setzero_si512();
            if (four * 4 + i >= count) continue;
            const float* group = x + (four * 4 + i) * GROUP;
            const f32x16 left = load(group), right = load(group + 16);
            squares[i] = fma(right, right, fma(left, left, squares[i]));
            // sizes of floats are ordered as their bits
            of[i] = _mm512_max_epi32(_mm512_and_si512(bits_of(left).v, size), _mm512_and_si512(bits_of(right).v, size));
        }
        fours[four] = fold_lanes(of, larger);
    }
    return float_of({quarters(fours, larger)});
}

// Each group times its factor, rounded to even; a group's integers begin `next` after those before. sums are written in eights:
// what is read next is not wider than what was written, which the processor would wait for.
TR_INLINE void round_groups(const float* x, size_t groups, const float* factors, int8_t* to, size_t next, int32_t* sums) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), one = _mm512_set1_epi8(1);
    const __m512i in_turn = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
    for (size_t eight = 0; eight < groups; eight += 8) {
        __m512i of[4];
        for (size_t i = 0; i < 4; i++) {
            const size_t g = eight + 2 * i;
            of[i] = _mm512_setzero_si512();
            if (g >= groups) continue;
            const bool has_second = g + 1 < groups;
            const float *first = x + g * GROUP, *second = first + has_second * GROUP;
            const __m512i a = _mm512_packs_epi32(rounded(first, factors[g]), rounded(first + 16, factors[g]));
            const __m512i b = _mm512_packs_epi32(rounded(second, factors[g + 1]), rounded(second + 16, factors[g + 1]));
            const __m512i both = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(a, b));
            _mm256_storeu_si256((__m256i*)(to + g * next), _mm512_castsi512_si256(both));
            if (has_second) _mm256_storeu_si256((__m256i*)(to + (g + 1) * next), _mm512_extracti64x4_epi64(both, 1));
            of[i] = _mm512_dpbusd_epi32(of[i], one, both);
        }
        const __m512i parts = fold_lanes(of, [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
        const __m512i all = _mm512_add_epi32(parts, _mm512_shuffle_i64x2(parts, parts, 0b10110001));
        _mm256_storeu_si256((__m256i*)(sums + eight), _mm512_castsi512_si256(_mm512_permutexvar_epi32(in_turn, all)));
    }
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

template <int BITS> TR_INLINE i32x16 four_products(const uint8_t* w, size_t k, int32_t x, int32_t start) {
    __m512i columns = _mm512_loadu_si512(w + k / (32 / BITS) * 64);
    if (BITS == 4) columns = _mm512_and_si512(_mm512_srli_epi16(columns, k % 8), _mm512_set1_epi8(15));
    return {_mm512_dpbusd_epi32(_mm512_set1_epi32(start), columns, _mm512_set1_epi32(x))};
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

}  // namespace
