// What the native library offers to Python (ctypes) and what each instruction set implements. Plain C: no torch, no Python.
//
// Activations are float; weights and the KV cache are bf16 if `is_bf16`, else float. All arrays are dense, row-major.
#pragma once
#include <cstdint>

enum Activation { SILU, GELU, GELU_TANH, RELU };

struct AttentionParams {
    const float* q;               // [T, H, D]
    const void* k_cache;          // [blocks, KV, D, block_size]: keys are the lanes of a score vector
    const void* v_cache;          // [blocks, KV, block_size, D rounded up to 16]
    const int32_t* block_tables;  // [B, max_blocks]
    const int32_t* query_start;   // [B + 1]
    const int32_t* seq_lens;      // [B], context including the tokens of this step
    float* out;                   // [T, H, D]
    int64_t num_requests, max_blocks, num_heads, num_kv_heads, head_dim, block_size, is_bf16;
    float scale;
    float soft_cap;          // reserved, 0
    int64_t sliding_window;  // reserved, 0
    const float* sinks;      // reserved, null
};

struct Kernels {
    // out[T, N] = x[T, K] @ panels[ceil(N / 16)][K][16] + bias[N]
    void (*linear)(const float* x, const void* panels, const float* bias, float* out, int64_t rows,
                   int64_t in_features, int64_t out_features, int64_t is_bf16);
    // residual null: out = norm(x). Otherwise residual += x first and out = norm(residual). bias null is allowed.
    void (*rms_norm)(const float* x, float* residual, const void* weight, const void* bias, float* out, int64_t rows,
                     int64_t columns, float eps, int64_t is_bf16);
    void (*layer_norm)(const float* x, float* residual, const void* weight, const void* bias, float* out, int64_t rows,
                       int64_t columns, float eps, int64_t is_bf16);
    // qkv[T, (H + 2 KV) * D]; cos_sin[max_pos, D] or null; slots[T], negative: not written; q[T, H, D]
    void (*rotate_and_cache)(const float* qkv, const int64_t* positions, const float* cos_sin, void* k_cache,
                             void* v_cache, const int64_t* slots, float* q, int64_t rows, int64_t num_heads,
                             int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t is_bf16);
    void (*paged_attention)(const AttentionParams* params);
    // gated: x[T, 2C], out = act(x[:, :C]) * x[:, C:]; otherwise x[T, C], out = act(x)
    void (*activation)(const float* x, float* out, int64_t rows, int64_t columns, int64_t kind, int64_t gated);
};

extern const Kernels tr_portable_kernels, tr_avx2_kernels, tr_avx512_kernels;

// Runs task(context, i) for every i in [0, count), on the pool; the caller takes part. Defined in dispatch.cpp.
void tr_parallel_for(int64_t count, void (*task)(void*, int64_t), void* context);
