// The C interface: picks the instruction set once, owns the threads, hands every call on.
#include "interface.h"
#include "thread_pool.h"

namespace {

enum Isa { PORTABLE, AVX2, AVX512 };

bool runs_here(int isa) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == AVX2) return avx2;
    if (isa == AVX512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
    return isa == PORTABLE;
}

const Kernels* table_of(int isa) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    if (isa == AVX512) return &tr_avx512_kernels;
    if (isa == AVX2) return &tr_avx2_kernels;
#endif
    return isa == PORTABLE ? &tr_portable_kernels : nullptr;
}

int active = runs_here(AVX512) ? AVX512 : runs_here(AVX2) ? AVX2 : PORTABLE;
const Kernels* kernels = table_of(active);

ThreadPool& pool() {  // never destroyed: its threads may outlive main
    static ThreadPool* instance = [] {
        auto* created = new ThreadPool;
        created->set_num_threads(int(std::thread::hardware_concurrency()));
        return created;
    }();
    return *instance;
}

}  // namespace

void tr_parallel_for(int64_t count, void (*task)(void*, int64_t), void* context) { pool().run(count, task, context); }

#pragma GCC visibility push(default)
extern "C" {

// False on an x86 without FMA, where each fma would be a call into libm.
int tr_usable() {
#if defined(__x86_64__)
    return active != PORTABLE;
#else
    return 1;
#endif
}

int tr_isa() { return active; }

// For tests. Returns 0, or -1 when this machine cannot run it.
int tr_set_isa(int isa) {
    if (!runs_here(isa)) return -1;
    active = isa;
    kernels = table_of(isa);
    return 0;
}

int tr_num_threads() { return pool().num_threads(); }
void tr_set_num_threads(int count) { pool().set_num_threads(count); }

void tr_linear(const float* x, const void* panels, const uint16_t* scales, const float* bias, float* out, int64_t rows,
               int64_t in_features, int64_t out_features, int64_t bits) {
    kernels->linear(x, panels, scales, bias, out, rows, in_features, out_features, bits);
}

void tr_quantized_linear(const QuantizedLinear* params) { kernels->quantized_linear(params); }

void tr_quantized_rows(const QuantizedRows* params) { kernels->quantized_rows(params); }

void tr_rms_norm(const float* x, float* residual, const void* weight, const void* bias, float* out, int64_t rows,
                 int64_t columns, float eps, int64_t is_bf16) {
    kernels->rms_norm(x, residual, weight, bias, out, rows, columns, eps, is_bf16);
}

void tr_layer_norm(const float* x, float* residual, const void* weight, const void* bias, float* out, int64_t rows,
                   int64_t columns, float eps, int64_t is_bf16) {
    kernels->layer_norm(x, residual, weight, bias, out, rows, columns, eps, is_bf16);
}

void tr_head_norm(const HeadNormParams* params) { kernels->head_norm(params); }

void tr_rotate_and_cache(const RotateParams* params) { kernels->rotate_and_cache(params); }

void tr_paged_attention(const AttentionParams* params) { kernels->paged_attention(params); }

void tr_activation(const float* x, float* out, int64_t rows, int64_t columns, int64_t kind, int64_t gated) {
    kernels->activation(x, out, rows, columns, kind, gated);
}

void tr_argmax(const float* x, int64_t* best, int64_t rows, int64_t columns) { kernels->argmax(x, best, rows, columns); }

void tr_forward(const Forward* params) { kernels->forward(params); }

}  // extern "C"
#pragma GCC visibility pop
