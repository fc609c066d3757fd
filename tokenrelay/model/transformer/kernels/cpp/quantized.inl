// quantized_linear: weights of 8 or 4 bits, activations of 8, and of more where they stick out; in groups of 32 along K.
//
// Within a group the products are summed as integers, which is exact in any order; then, groups ascending,
//   acc = fma(sum * w_scale, x_scale, acc), and acc = fma(x_scale * sum of x, minimum, acc) where weights have one;
// high parts of a block of K are summed by themselves, and added at its end; + bias. So a row's bits depend on nothing but the
// row, whatever instructions do the sums.
//
// A sum begins as the bits of the float 1.5 * 2^23 (MAGIC), so its own are those of that float plus the sum: no conversion is
// needed, and fma(1.5 * 2^23 + sum, w_scale, -1.5 * 2^23 * w_scale) is their product, rounded once.
namespace {

constexpr size_t BLOCK_ROWS = 256;  // about so many share what was spread out; their activations fit into the second cache

// Where columns go that are activated at once. Gated ones come from both halves of the matrix.
struct Activated {
    float* out;  // [T, N], or [T, N / 2] of gated ones
    int64_t kind;
    bool gated;
};

// Of a group, for 16 columns: its scale, what a sum's MAGIC is worth in it, negative, and its minimum.
struct GroupScales { f32x16 scale, magic, lowest; };
constexpr size_t WIDE_SCALES = sizeof(GroupScales) / sizeof(float);

// Some panels' part of a block of K, and where their columns go.
template <class Weights> struct Block {
    Range of;                                   // groups
    size_t panels[Weights::PANELS];
    size_t scales[Weights::PANELS];             // where they begin in those of the matrix
    const uint8_t* weights[Weights::PANELS];
    const float* wide_scales[Weights::PANELS];  // if they were widened
    float* out[Weights::PANELS];                // of the first row
    size_t next_out;                            // from row to row
};

struct Quantized : Activations {
    const Activated* activated;  // or null

    explicit Quantized(const QuantizedLinear& params, const Activated* activated = nullptr)
        : Activations(params), activated(activated) {}

    float* out_of(size_t row, size_t panel) const { return a.out + row * a.out_features + panel * 16; }
    size_t panel_count() const { return (a.out_features + 15) / 16; }

    // The panel that is multiplied as the i-th: a gate and what it lets through follow each other.
    size_t in_turn(size_t i) const { return activated && activated->gated ? i / 2 + i % 2 * (panel_count() / 2) : i; }

    template <class Weights> void widen_scales(size_t panel, Range of, float* to) const {
        for (size_t at = (panel * groups + of.begin) * 16, end = (panel * groups + of.end) * 16; at < end; at += 16) {
            const f32x16 scale = load_f16(a.scales + at);
            store(to, scale), store(to + 16, mul(scale, broadcast(-MAGIC)));
            if (Weights::BITS == 4) store(to + 32, load_f16(a.minima + at));
            to += WIDE_SCALES;
        }
    }

    // Of the g-th group of a block whose scales begin at `at`, and were widened into `wide`, if they were.
    template <class Weights> TR_INLINE GroupScales scales_of(size_t at, const float* wide, size_t g) const {
        wide += g * WIDE_SCALES, at += g * 16;
        if (Weights::WIDE) return {load(wide), load(wide + 16), load(wide + 32)};
        const f32x16 scale = load_f16(a.scales + at);
        return {scale, mul(scale, broadcast(-MAGIC)), Weights::BITS == 4 ? load_f16(a.minima + at) : scale};
    }

    // out [R, 16] of each of P panels, or 0 at first, += a block of K, + high_products. A function of its own: whatever else is
    // here costs it registers.
    template <class Weights, int R>
    __attribute__((noinline)) void add_groups(const Block<Weights>& block, float* const (&out)[Weights::PANELS],
                                              size_t next_out, size_t row, const float* high_products) const {
        constexpr int P = Weights::PANELS;
        constexpr bool IS_TILE = INTERLEAVED > 1, IS_SHIFTED = Weights::BITS == 8 && !Weights::SIGNED;  // by 128
        static_assert(!IS_TILE || Weights::ROWS == INTERLEAVED, "rows are multiplied as they were interleaved");
        const size_t next_row = IS_TILE ? 1 : groups, next_group = IS_TILE ? R : 1;  // in scales, totals and sums
        const Range of = block.of;
        const uint8_t* w[P];
        f32x16 total[P][R];
        for (int p = 0; p < P; p++) w[p] = block.weights[p];
        for (int p = 0; p < P; p++)
            for (int r = 0; r < R; r++) total[p][r] = of.begin ? load(out[p] + r * next_out) : broadcast(0.0f);
        for (size_t g = of.begin; g < of.end; g++) {
            const size_t at = row * groups + g * next_group;
            i32x16 sum[P][R];
            for (int r = 0; r < R; r++) {
                const i32x16 first = all(IS_SHIFTED ? MAGIC_BITS - 128 * sums[at + r * next_row] : MAGIC_BITS);
                for (int p = 0; p < P; p++) sum[p][r] = first;
            }
            Weights::add(w, [x = low + at * GROUP, next = next_row * GROUP](int r, size_t k) {
                return x + r * (IS_TILE ? GROUP : next) + k;
            }, sum);
            for (int p = 0; p < P; p++) {
                w[p] += Weights::GROUP_BYTES;
                const GroupScales of_group = scales_of<Weights>(block.scales[p], block.wide_scales[p], g - of.begin);
                for (int r = 0; r < R; r++) {
                    const f32x16 x_scale = broadcast(scales[at + r * next_row]);
                    total[p][r] = fma(fma(float_of(sum[p][r]), of_group.scale, of_group.magic), x_scale, total[p][r]);
                }
                if (Weights::BITS == 8) continue;
                for (int r = 0; r < R; r++)
                    total[p][r] = fma(broadcast(totals[at + r * next_row]), of_group.lowest, total[p][r]);
            }
        }
        for (int p = 0; p < P; p++)
            for (int r = 0; r < R; r++) {
                if (high_products) total[p][r] = add(total[p][r], load(high_products + (p * R + r) * 16));
                store(out[p] + r * next_out, total[p][r]);
            }
    }

    // Products with high parts, of a block of K: to [P][R][16]. Returns whether there are any.
    template <class Weights, int R>
    __attribute__((noinline)) bool multiply_high(const Block<Weights>& block, size_t row, float* to) const {
        constexpr int P = Weights::PANELS, STEP = INTERLEAVED > 1 ? R : 1;
        const uint8_t* w[P];
        size_t scales_begin[P];
        const float* wide[P];
        for (int p = 0; p < P; p++) w[p] = block.weights[p], scales_begin[p] = block.scales[p], wide[p] = block.wide_scales[p];
        bool any = false;
        for (size_t first = row; first < row + R; first += STEP) {
            const uint32_t* end = ends + first * blocks + block.of.begin / BLOCK_GROUPS;
            const Outlier* const of_tile = outliers + first * groups;
            const Outlier *of = of_tile + (block.of.begin ? end[-1] : 0), *last = of_tile + *end;
            if (of == last) continue;
#pragma GCC unroll 16
            for (int i = 0; !any && i < P * R; i++) store(to + i * 16, broadcast(0.0f));
            any = true;
            float* const to_tile = to + (first - row) * 16;
            for (; of < last; of++)
                for (int p = 0; p < P; p++) {
                    float* to_row = to_tile + (p * R + of->row) * 16;
                    const GroupScales of_group = scales_of<Weights>(scales_begin[p], wide[p], of->k / GROUP);
                    const f32x16 sum = float_of(Weights::four_products(w[p], of->k, of->high));
                    store(to_row, fma(fma(sum, of_group.scale, of_group.magic), broadcast(of->scale), load(to_row)));
                }
        }
        return any;
    }

    // R rows from `row` on, which is so far from the first one.
    template <class Weights, int R> void tile(const Block<Weights>& block, size_t row, size_t distance) const {
        constexpr int P = Weights::PANELS;
        alignas(64) float high_products[P * R * 16];
        const float* added = multiply_high<Weights, R>(block, row, high_products) ? high_products : nullptr;
        const size_t next = block.next_out, left = a.out_features - block.panels[P - 1] * 16;
        float* out[P];
        for (int p = 0; p < P; p++) out[p] = block.out[p] + distance * next;
        if (left >= 16) {
            add_groups<Weights, R>(block, out, next, row, added);
        } else {  // of fewer than 16 columns: computed beside
            alignas(64) float room[P][R * 16];
            float* beside[P];
            for (int p = 0; p < P; p++) {
                beside[p] = room[p];
                const size_t columns = a.out_features - block.panels[p] * 16;
                for (int r = 0; block.of.begin && r < R; r++) store(room[p] + r * 16, load_part(out[p] + r * next, columns));
            }
            add_groups<Weights, R>(block, beside, 16, row, added);
            for (int p = 0; p < P; p++) {
                const size_t columns = a.out_features - block.panels[p] * 16;
                for (int r = 0; r < R; r++) store_part(out[p] + r * next, load(room[p] + r * 16), columns);
            }
        }
        if (!a.bias || block.of.end < groups) return;
        for (int p = 0; p < P; p++) {
            if (p && block.panels[p] == block.panels[p - 1]) continue;
            const float* bias = a.bias + block.panels[p] * 16;
            const size_t columns = least(a.out_features - block.panels[p] * 16, 16);
            for (int r = 0; r < R; r++)
                for (size_t n = 0; n < columns; n++) out[p][r * next + n] += bias[n];
        }
    }

    // What follows in turn is fetched beside it: outliers come first, so the processor would not foresee it.
    template <class Weights> void multiply_block(Block<Weights>& block, size_t following, Range rows) const {
        constexpr size_t P = Weights::PANELS;
        alignas(64) uint8_t room[P][BLOCK_GROUPS * Weights::GROUP_BYTES];
        alignas(64) float scale_room[P][Weights::WIDE ? BLOCK_GROUPS * WIDE_SCALES : 1];
        const Range of = block.of;
        const size_t bytes = (of.end - of.begin) * Weights::PACKED_BYTES;
        const uint8_t* ahead[P];
        for (size_t p = 0; p < P; p++) {
            const uint8_t* packed = a.panels + (block.panels[p] * groups + of.begin) * Weights::PACKED_BYTES;
            block.scales[p] = (block.panels[p] * groups + of.begin) * 16;
            block.weights[p] = Weights::unpack(packed, room[p], bytes);
            block.wide_scales[p] = scale_room[p];
            if (Weights::WIDE) widen_scales<Weights>(block.panels[p], of, scale_room[p]);
            const size_t next = following + p < panel_count() ? in_turn(following + p) : block.panels[p];
            ahead[p] = a.panels + (next * groups + of.begin) * Weights::PACKED_BYTES;
        }
        const size_t share = bytes * Weights::ROWS / (rows.end - rows.begin) + 64;
        size_t fetched = 0, wanted = following < panel_count() ? bytes : 0;
        for_row_groups<Weights::ROWS>(rows.begin, rows.end, [&](size_t row, auto count) {
            for (const size_t stop = least(fetched + share, wanted); fetched < stop; fetched += 64)
                for (size_t p = 0; p < P; p++) __builtin_prefetch(ahead[p] + fetched);
            tile<Weights, decltype(count)::value>(block, row, row - rows.begin);
        });
    }

    // Panels [first, last) in turn, to `out`, where the columns of the first one go.
    template <class Weights>
    void multiply_panels(size_t first, size_t last, size_t next, Range rows, float* out, size_t next_out) const {
        constexpr size_t P = Weights::PANELS;
        for (size_t begin = 0; begin < groups; begin += BLOCK_GROUPS)
            for (size_t turn = first; turn < last; turn += P) {
                Block<Weights> block;
                block.of = {begin, least(begin + BLOCK_GROUPS, groups)}, block.next_out = next_out;
                for (size_t p = 0; p < P; p++) {
                    const size_t of_panel = least(turn + p, last - 1);  // the last one twice, where one is missing
                    block.panels[p] = in_turn(of_panel), block.out[p] = out + (of_panel - first) * 16;
                }
                multiply_block(block, turn + P < last ? turn + P : next, rows);
            }
    }

    void multiply_panels(size_t first, size_t last, size_t next, Range rows, float* out, size_t next_out) const {
        const bool few = rows.end - rows.begin < ROWS_TO_SPREAD;
        if (a.bits == 8 && few) multiply_panels<EightBits>(first, last, next, rows, out, next_out);
        else if (a.bits == 8) multiply_panels<Wide<EightBits>>(first, last, next, rows, out, next_out);
        else if (few) multiply_panels<FourBits>(first, last, next, rows, out, next_out);
        else multiply_panels<Wide<Spread>>(first, last, next, rows, out, next_out);
    }

    // Columns are activated while they are at hand, and written nowhere before. (whole panels: all of N is)
    void multiply_and_activate(size_t first, size_t last, size_t next, Range rows) const {
        const size_t width = (last - first) * 16, count = rows.end - rows.begin, inputs = activated->gated ? 2 : 1;
        auto* room = static_cast<float*>(__builtin_alloca_with_align(count * width * sizeof(float), 512));
        multiply_panels(first, last, next, rows, room, width);
        const size_t columns = a.out_features / inputs;
        float* out = activated->out + rows.begin * columns + first / inputs * 16;
        with_activation(activated->kind, [=, gated = activated->gated](auto of) {
            constexpr int KIND = decltype(of)::value;
            for (size_t row = 0; row < count; row++)
                for (size_t from = 0; from < width; from += 16 * inputs)
                    activate_row<KIND>(room + row * width + from, out + row * columns + from / inputs, 16, gated);
        });
    }

    // Each thread has rows of its own, where there are enough of them: some panels for all of its rows, then others. Tasks are
    // larger where there are more of them than threads need.
    void multiply_all() const {
        const size_t threads = tr_num_threads(), tiles = (a.rows + INTERLEAVED - 1) / INTERLEAVED;
        size_t row_blocks = (a.rows + BLOCK_ROWS - 1) / BLOCK_ROWS, parts = 1;
        if (row_blocks >= threads) parts = threads, row_blocks = (row_blocks + threads - 1) / threads * threads;
        const size_t pairs = (panel_count() + PANEL_GROUP - 1) / PANEL_GROUP * row_blocks;
        const size_t step = PANEL_GROUP * least(pairs / (16 * threads) + 1, 4);
        const size_t own_blocks = row_blocks / parts, tasks = (panel_count() + step - 1) / step * own_blocks;
        parallel_for(tasks * parts, [&](size_t task) {
            const size_t of_part = task % tasks, block = task / tasks * own_blocks + of_part % own_blocks;
            const size_t first = of_part / own_blocks * step, last = least(first + step, panel_count());
            const size_t next = (of_part + 1) / own_blocks * step;  // this thread's, if it keeps to its part
            const Range rows{tiles * block / row_blocks * INTERLEAVED,
                             least(tiles * (block + 1) / row_blocks * INTERLEAVED, size_t(a.rows))};
            if (rows.begin == rows.end) return;
            if (activated) multiply_and_activate(first, last, next, rows);
            else multiply_panels(first, last, next, rows, out_of(rows.begin, first), a.out_features);
        });
    }
};

void quantized_linear(const QuantizedLinear* params) {
    Quantized work(*params);
    work.quantize([=](size_t row, float*) { return params->x + row * params->in_features; });
    work.multiply_all();
}

void quantized_rows(const QuantizedRows* params) {
    const QuantizedRows a = *params;
    const size_t columns = a.in_features, groups = columns / GROUP;
    parallel_rows(a.rows, columns, [=](size_t row) {
        const size_t panel = a.ids[row] / 16, column = a.ids[row] % 16;
        const uint8_t* from = a.panels + panel * groups * GROUP * (a.minima ? 8 : 16) + column * 4;
        for (size_t k = 0; k < columns; k++) {
            const uint8_t byte = from[k / (a.minima ? 8 : 4) * 64 + k % 4];
            const int integer = !a.minima ? byte - 128 : k / 4 % 2 ? byte >> 4 : byte & 15;
            const size_t group = (panel * groups + k / GROUP) * 16 + column;
            const float scaled = float(integer) * widen_f16(a.scales[group]);
            a.out[row * columns + k] = a.minima ? scaled + widen_f16(a.minima[group]) : scaled;
        }
    });
}

}  // namespace
