// linear: acc = 0, then acc = fma(x[k], w[k], acc) for k ascending, then + bias. Included by kernels.inl.
// Weights of 8 bits have a scale for each group of 32 k; w[k] is their product in fp32.
namespace {

// The micro-kernel of both linear and attention: R rows times P panels of 16 columns, all accumulators in registers.
// x: row r at x + r * x_stride.  w[p]: 16 columns for step k at w[p] + k * w_stride.
template <int R, int P, class W>
TR_INLINE void multiply(f32x16 (&acc)[R][P], const float* x, size_t x_stride, const W* const (&w)[P], size_t w_stride,
                        size_t steps) {
    for (size_t k = 0; k < steps; k++) {
        if constexpr (REGISTERS == 32) {  // room for a column of each panel: x is read once for all
            f32x16 column[P];
            for (int p = 0; p < P; p++) column[p] = load(w[p] + k * w_stride);
            for (int r = 0; r < R; r++) {
                const f32x16 all = broadcast(x[r * x_stride + k]);
                for (int p = 0; p < P; p++) acc[r][p] = fma(all, column[p], acc[r][p]);
            }
            continue;
        }
        for (int p = 0; p < P; p++) {
            const f32x16 column = load(w[p] + k * w_stride);
            for (int r = 0; r < R; r++) acc[r][p] = fma(broadcast(x[r * x_stride + k]), column, acc[r][p]);
            if (R > 2 && P > 1) asm("" : "+r"(x));  // read x again for the next panel: no register is left to keep it in
        }
    }
}

struct Linear {
    const float* x;
    const f16* scales;  // [panels][K / 32][16], or null
    const float* bias;
    float* out;
    size_t rows, in_features, out_features;
};

template <int R, int P, class W>
TR_INLINE void accumulate(f32x16 (&acc)[R][P], const Linear& a, const float* x, const W* const (&w)[P], size_t) {
    multiply(acc, x, a.in_features, w, 16, a.in_features);
}

template <int R, int P>
TR_INLINE void accumulate(f32x16 (&acc)[R][P], const Linear& a, const float* x, const int8_t* const (&w)[P],
                          size_t panel) {
    const size_t groups = a.in_features / GROUP;
    for (size_t g = 0; g < groups; g++) {
        f32x16 scale[P];
        for (int p = 0; p < P; p++) scale[p] = load_f16(a.scales + ((panel + p) * groups + g) * 16);
        for (size_t k = g * GROUP; k < (g + 1) * GROUP; k++)
            for (int p = 0; p < P; p++) {
                const f32x16 column = mul(load(w[p] + k * 16), scale[p]);
                for (int r = 0; r < R; r++) acc[r][p] = fma(broadcast(x[r * a.in_features + k]), column, acc[r][p]);
            }
    }
}

template <int R, int P, class W> void linear_tile(const Linear& a, const W* panels, size_t row, size_t panel) {
    f32x16 acc[R][P];
    const W* w[P];
    for (int p = 0; p < P; p++) w[p] = panels + (panel + p) * a.in_features * 16;
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) acc[r][p] = broadcast(0.0f);
    accumulate(acc, a, a.x + row * a.in_features, w, panel);
    for (int p = 0; p < P; p++) {
        size_t column = (panel + p) * 16, width = a.out_features - column;
        for (int r = 0; r < R; r++) {
            f32x16 y = acc[r][p];
            if (a.bias) y = add(y, load_part(a.bias + column, width));
            store_part(a.out + (row + r) * a.out_features + column, y, width);
        }
    }
}

template <class W> void linear_of(const Linear& a, const W* panels) {
    const size_t panel_count = (a.out_features + 15) / 16;
    const size_t row_blocks = (a.rows + ROW_BLOCK - 1) / ROW_BLOCK;
    const size_t groups = (panel_count + PANEL_GROUP - 1) / PANEL_GROUP;
    parallel_for(groups * row_blocks, [&](size_t task) {
        size_t panel_end = least((task / row_blocks + 1) * PANEL_GROUP, panel_count);
        size_t row_begin = task % row_blocks * ROW_BLOCK, row_end = least(row_begin + ROW_BLOCK, a.rows);
        size_t wide_end = task / row_blocks * PANEL_GROUP;
        for_row_groups(row_begin, row_end, [&](size_t row, auto count) {
            constexpr int R = decltype(count)::value;
            constexpr int P = least(panels_for(R), PANEL_GROUP);
            size_t panel = wide_end;
            for (; panel + P <= panel_end; panel += P) linear_tile<R, P>(a, panels, row, panel);
            for (; panel < panel_end; panel++) linear_tile<R, 1>(a, panels, row, panel);
        });
    });
}

void linear(const float* x, const void* panels, const f16* scales, const float* bias, float* out, int64_t rows,
            int64_t in_features, int64_t out_features, int64_t bits) {
    Linear a{x, scales, bias, out, size_t(rows), size_t(in_features), size_t(out_features)};
    if (bits == 8) linear_of(a, static_cast<const int8_t*>(panels));
    else if (bits == 16) linear_of(a, static_cast<const bf16*>(panels));
    else linear_of(a, static_cast<const float*>(panels));
}

}  // namespace
