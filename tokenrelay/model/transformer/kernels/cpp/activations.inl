// Activations of a quantized product: integers of 8 bits with a step per group of 32 along K, and what sticks out of them.
//
// An activation is 255 * high + low. The largest of a group makes its step, but none counts as more than six times the row's
// root mean square: the few beyond, which would drown the others in their rounding, have a high part, and are multiplied once
// more. (the outliers of LLM.int8(), by element instead of by column)
namespace {

constexpr float LARGEST = 127.0f;
constexpr float OUTLIER = 6.0f;  // times the root mean square: a row of K has less than K / 36 beyond
constexpr int32_t HIGH = 255;    // a unit of the high parts: the low ones are within 127 of 0
constexpr float TINY = 1e-24f;   // below, a group counts as zero: its factor would overflow, its products lose bits

// Of K at a time: two panels spread out take 24 KiB, in the first cache with the rows' activations.
constexpr size_t BLOCK_GROUPS = 24;

// So many rows lie interleaved, as their tile reads them: a group of each row, or its scale, after each other.
constexpr size_t INTERLEAVED = QUANTIZED_PANELS > 1 ? QUANTIZED_ROWS : 1;

struct Range { size_t begin, end; };

// Four activations with a high part: integers side by side, and their step times HIGH.
struct Outlier {
    uint32_t high;
    float scale;
    uint32_t k, row;  // within the matrix, and once they are sorted within a block of K; within the tile
};

struct Activations {
    const QuantizedLinear& a;
    size_t groups, blocks;
    float* scales;      // [T, groups] interleaved: a step
    float* totals;      // the same: the group's sum, high parts included, as a number
    int32_t* sums;      // the same: of the low parts
    Outlier* outliers;  // [T, K / 32]: as many as a tile has, groups ascending
    uint32_t* ends;     // [T, blocks of K]: of the tile that begins there, where in outliers a block's end
    int8_t* low;        // [T, K] interleaved

    explicit Activations(const QuantizedLinear& params)
        : a(params), groups(a.in_features / GROUP),
          blocks((groups + BLOCK_GROUPS - 1) / BLOCK_GROUPS), scales((float*)a.scratch), totals(scales + a.rows * groups),
          sums((int32_t*)(totals + a.rows * groups)), outliers((Outlier*)(sums + a.rows * groups)),
          ends((uint32_t*)(outliers + a.rows * groups)), low((int8_t*)(ends + a.rows * blocks)) {}

    // Rows that lie interleaved are a tile: all of INTERLEAVED, or what is left at the end.
    size_t tile_begin(size_t row) const { return row / INTERLEAVED * INTERLEAVED; }
    size_t tile_rows(size_t row) const { return INTERLEAVED == 1 ? 1 : least(INTERLEAVED, a.rows - tile_begin(row)); }

    // Of a group with elements beyond LARGEST, whose integers are not right yet: replaces them, adds to the group's sum what that
    // changes, and returns the sum of the high parts.
    int32_t split_outliers(const float* from, size_t row, size_t g, float factor, float step, int8_t* integers,
                           int32_t& sum, uint32_t& count) const {
        const size_t first = tile_begin(row);
        Outlier* of_tile = outliers + first * groups;
        uint32_t beyond = 0;
        int32_t high_sum = 0;
        for (size_t i = 0; i < GROUP; i += 16) {
            const f32x16 x = mul(load(from + i), broadcast(factor));
            beyond |= lanes_from(max(x, sub(broadcast(0.0f), x)), LARGEST + 0.5f) << i;
        }
        for (uint32_t k = ~0u; beyond; beyond &= beyond - 1) {
            const uint32_t i = __builtin_ctz(beyond), four = g * GROUP + i / 4 * 4;
            const int32_t integer = round_to_even(from[i] * factor);
            const int32_t above = int32_t(uint32_t(integer + 127 + (HIGH << 12)) / HIGH) - (1 << 12);
            sum += integer - above * HIGH - integers[i], high_sum += above;
            integers[i] = int8_t(integer - above * HIGH);
            if (four != k) of_tile[count++] = {0, step * float(HIGH), k = four, uint32_t(row - first)};
            of_tile[count - 1].high |= uint32_t(uint8_t(above)) << i % 4 * 8;
        }
        return high_sum;
    }

    // Integers x * (LARGEST / max |x| of the group), rounded to even. A NaN or an infinity makes all scales of its row NaN:
    // enough, for every output has a product with each.
    void quantize_row(const float* from, size_t row, uint32_t& count) const {
        const size_t step = tile_rows(row), first = tile_begin(row), begin = first * groups + row - first;
        const size_t padded = (groups + 15) / 16 * 16;
        auto* highest = static_cast<float*>(__builtin_alloca_with_align(4 * padded * sizeof(float), 512));
        float *factors = highest + padded, *steps = factors + padded;
        auto* integers = reinterpret_cast<int32_t*>(steps + padded);
        const float total = sum(largest_of_groups(from, groups, highest));
        const float bound = total > 1e-30f ? OUTLIER * __builtin_sqrtf(total / float(a.in_features)) : __builtin_inff();
        const bool finite = total < __builtin_inff();
        const f32x16 most = broadcast(LARGEST), unit = broadcast(1.0f / LARGEST);
        for (size_t g = 0; g < padded; g += 16) {
            const f32x16 top = min(load(highest + g), broadcast(bound));
            store(factors + g, finite ? zero_where_below(div(most, top), top, TINY) : broadcast(0.0f));
            store(steps + g, finite ? zero_where_below(mul(top, unit), top, TINY) : broadcast(__builtin_nanf("")));
        }
        round_groups(from, groups, factors, low + begin * GROUP, step * GROUP, integers);
        for (size_t g = 0, at = begin; g < groups; g++, at += step) {
            scales[at] = steps[g], totals[at] = steps[g] * float(integers[g]);
            if (a.bits == 8) sums[at] = integers[g];
        }
        for (size_t sixteen = 0; finite && sixteen < padded; sixteen += 16)
            for (uint32_t beyond = lanes_from(load(highest + sixteen), bound); beyond; beyond &= beyond - 1) {
                const size_t g = sixteen + __builtin_ctz(beyond), at = begin + g * step;
                int32_t sum = integers[g];
                int8_t* to = low + at * GROUP;
                const int32_t high_sum = split_outliers(from + g * GROUP, row, g, factors[g], steps[g], to, sum, count);
                sums[at] = sum, totals[at] = steps[g] * float(sum + high_sum * HIGH);
            }
    }

    // By group, so that rows take turns: a sum need not wait for the one before.
    void sort_outliers(size_t first, size_t count) const {
        Outlier* of_tile = outliers + first * groups;
        auto* sorted = static_cast<Outlier*>(__builtin_alloca(count * sizeof(Outlier)));
        auto* next = static_cast<uint32_t*>(__builtin_alloca((groups + 1) * sizeof(uint32_t)));
        __builtin_memset(next, 0, (groups + 1) * sizeof(uint32_t));
        for (size_t i = 0; i < count; i++) next[of_tile[i].k / GROUP + 1]++;
        for (size_t g = 1; g <= groups; g++) next[g] += next[g - 1];
        for (size_t i = 0; i < blocks; i++) ends[first * blocks + i] = next[least((i + 1) * BLOCK_GROUPS, groups)];
        for (size_t i = 0; i < count; i++) {
            Outlier& to = sorted[next[of_tile[i].k / GROUP]++];
            to = of_tile[i], to.k %= BLOCK_GROUPS * GROUP;
        }
        __builtin_memcpy(of_tile, sorted, count * sizeof(Outlier));
    }

    // Of the rows at prepare(row, room), which may write a row into the room, [K], while it is at hand.
    template <class F> void quantize(F prepare) const {
        const size_t tiles = (a.rows + INTERLEAVED - 1) / INTERLEAVED;  // one thread for each: their rows share cache lines
        const size_t width = INTERLEAVED * a.in_features, chunk = WORK_PER_TASK / width + (width > WORK_PER_TASK);
        parallel_chunks(tiles, chunk, [&](size_t tile) {
            const size_t first = tile * INTERLEAVED, end = least(first + INTERLEAVED, a.rows);
            uint32_t count = 0;
            auto* room = static_cast<float*>(__builtin_alloca_with_align(a.in_features * sizeof(float), 512));
            for (size_t row = first; row < end; row++) quantize_row(prepare(row, room), row, count);
            sort_outliers(first, count);
        });
    }
};

}  // namespace
