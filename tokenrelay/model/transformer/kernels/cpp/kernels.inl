// All kernels for one instruction set: included once by avx2.cpp, avx512.cpp and portable.cpp, each of which defines
// TR_KERNELS, the name of its table. Everything is in anonymous namespaces and uses no inline function of a standard
// header, so that the linker cannot put this file's instructions into code that runs on a lesser machine.
#include "f32x16.h"
#include "interface.h"

namespace {

// Rows and panels of the micro-kernel: as many accumulators as the registers hold, and at least 8 to hide the latency of fma.
#if defined(TR_AVX512)
constexpr int REGISTERS = 32, MAX_ROWS = 8, QUANTIZED_ROWS = 6, QUANTIZED_PANELS = 2;
constexpr int panels_for(int rows) { return rows <= 6 ? 4 : 2; }
#elif defined(__x86_64__) && !defined(TR_AVX2)
// Portable on x86 is only the tests' yardstick: compile little.
constexpr int REGISTERS = 16, MAX_ROWS = 2, QUANTIZED_ROWS = 2, QUANTIZED_PANELS = 1;
constexpr int panels_for(int) { return 1; }
#else
constexpr int REGISTERS = 16, MAX_ROWS = 6, QUANTIZED_ROWS = 3, QUANTIZED_PANELS = 1;
constexpr int panels_for(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#endif
constexpr size_t ROW_BLOCK = 96, PANEL_GROUP = 2;  // one task of linear: whole tiles; neither changes the bits
constexpr size_t MAX_HEAD_DIM = 256;
constexpr size_t GROUP = 32;  // elements along K with one scale

constexpr size_t least(size_t a, size_t b) { return a < b ? a : b; }

template <class F> TR_INLINE void parallel_for(size_t count, F f) {
    tr_parallel_for(count, [](void* context, int64_t i) { (*static_cast<F*>(context))(size_t(i)); }, &f);
}

template <int N> struct Count { static constexpr int value = N; };

template <int N, class F> TR_INLINE void with_count(size_t count, F& f, size_t row) {
    if constexpr (N > 0) {
        if (count == N) f(row, Count<N>{});
        else with_count<N - 1>(count, f, row);
    }
}

// Calls f(row, Count<R>) for consecutive groups of at most MOST rows.
template <int MOST = MAX_ROWS, class F> TR_INLINE void for_row_groups(size_t begin, size_t end, F f) {
    for (size_t row = begin; row < end; row += MOST) with_count<MOST>(least(end - row, MOST), f, row);
}

}  // namespace

#include "linear.inl"
#include "rows.inl"
#include "products.inl"
#include "activations.inl"
#include "quantized.inl"
#include "attention.inl"
#include "forward.inl"

const Kernels TR_KERNELS = {linear,    quantized_linear, quantized_rows,  norm<false>, norm<true>,
                            head_norm, rotate_and_cache, paged_attention, activation, argmax, forward};
