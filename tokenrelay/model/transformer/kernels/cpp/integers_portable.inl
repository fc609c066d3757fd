// Sixteen integers, and what products of integers are made of, for any instruction set. Included by products.inl.
namespace {

struct i32x16 { int32_t v[16]; };
TR_INLINE i32x16 all(int32_t x) {
    i32x16 out;
    for (int32_t& value : out.v) value = x;
    return out;
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

template <int BITS> TR_INLINE i32x16 four_products(const uint8_t* w, size_t k, int32_t x, int32_t start) {
    i32x16 sums = all(start);
    for (int i = 0; i < 64; i++) {
        const uint8_t byte = w[k / (32 / BITS) * 64 + i];
        sums.v[i / 4] += (BITS == 8 ? byte : k / 4 % 2 ? byte >> 4 : byte & 15) * int8_t(x >> i % 4 * 8);
    }
    return sums;
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

}  // namespace
