// What the native library offers to Python (ctypes) and what each instruction set implements. Plain C: no torch, no Python.
//
// Activations are float; weights are bf16 if `is_bf16`, else float. All arrays are dense, row-major.
#pragma once
#include <cstdint>

using f16 = uint16_t;  // IEEE half precision, as GGUF's scales

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2, SWIGLU_OAI };
enum CacheType { FLOAT32, INT16, INT8 };

// K lies with keys as the lanes of a score vector, V with rows of whole vectors. A vector of integers stands for its elements
// times its scale; floats have no scales.
struct KVCache {
    void* keys;           // [blocks, KV, D, block_size]; of integers [blocks, KV, D / 2 rounded up, block_size, 2]
    void* values;         // [blocks, KV, block_size, D rounded up to 16]; of integers [.., block_size / 2, .., 2]
    float* key_scales;    // [blocks, KV, block_size], of integers
    float* value_scales;  // the same
    int64_t key_stride, value_stride;  // elements from block to block
    int64_t num_kv_heads, head_dim, block_size, type;
};

// RMS norm in place of every q_width elements of q and every k_width of k: a head each, or all of them.
struct HeadNormParams {
    float* qkv;             // [T, q_size + 2 kv_size]
    const float* q_weight;  // [q_width]
    const float* k_weight;  // [k_width]
    int64_t num_tokens, q_size, kv_size, q_width, k_width;
    float eps;
};

struct RotateParams {
    KVCache cache;
    const float* qkv;          // [T, (H + 2 KV) D]
    const int64_t* positions;  // [T], rows of cos_sin
    const float* cos_sin;      // [rows, rotary_dim]
    const int64_t* slots;      // [T], negative: not written
    float* q;                  // [T, H, D]
    int64_t num_tokens, num_heads, rotary_dim;  // so many elements of a head turn; 0: none
};

// A query at position p sees the keys 0 … p. From p = num_sinks + window on, if there is a window, it sees the first
// num_sinks keys, with its vector in q_sink instead of q, and the last `window` ones. Scaled scores s become
// softcap * tanh(s / softcap), unless softcap is 0; a head's sink logit is one more score, of no key.
struct AttentionParams {
    KVCache cache;
    const float* q;               // [T, H, D]
    const float* q_sink;          // the same, or null: q
    const int32_t* block_tables;  // [B, max_blocks]; entries of blocks that no query of the step sees are not read
    const int32_t* query_start;   // [B + 1]
    const int32_t* seq_lens;      // [B], context including the tokens of this step
    const float* sink_logits;     // [H], or null
    float* out;                   // [T, H, D]
    int64_t num_requests, max_blocks, num_heads, window, num_sinks;
    float scale, softcap;
};

// out = x W^T + bias, W[n, k] = integer * scale (+ minimum) of its group of 32 k. Panels of 16 columns, the last one padded;
// 8 bits: integer + 128, [panels][K / 4][16][4]; 4 bits: [panels][K / 8][16][4], k + 4 in the high halves.
struct QuantizedLinear {
    const float* x;         // [T, K]
    const uint8_t* panels;
    const f16* scales;      // [panels][K / 32][16]
    const f16* minima;      // the same, or null
    const float* bias;      // [N], or null
    float* out;             // [T, N]
    void* scratch;          // T (K + 32 K / 32) bytes
    int64_t rows, in_features, out_features, bits;
};

// out[i] = row ids[i] of W, stored as above.
struct QuantizedRows {
    const uint8_t* panels;
    const f16* scales;
    const f16* minima;   // null: 8 bits
    const int64_t* ids;  // [T]
    float* out;          // [T, K]
    int64_t rows, in_features;
};

// A linear layer. bits: 4 or 8 as in QuantizedLinear, or as in `linear`: 16 for bf16, 32 for float, 8 if weight_only.
struct Matrix {
    const void* panels;
    const f16* scales;
    const f16* minima;
    const float* bias;
    int64_t in_features, out_features, bits, weight_only;
};

struct Norm {
    const float* weight;
    const float* bias;
};

enum Rotation { UNROTATED, ROTATED, ROTATED_LOCALLY };

enum MatrixOfLayer { QKV, OUT, UP, DOWN, MATRICES };

// Norms without a weight are left out.
struct Layer {
    Norm attention_norm, attention_post_norm, mlp_norm, mlp_post_norm;  // of what goes in and of what comes out
    Norm q_norm, k_norm;
    Matrix matrices[MATRICES];
    KVCache cache;
    const float* sink_logits;  // [H], or null
    int64_t window, num_sinks, rotation;
    float scale;
};

// What an adapter adds to the output of one matrix, from column `first` on: b (a x), neither quantized nor with a bias.
// Of a matrix that it leaves alone a.panels is null.
struct Update {
    Matrix a, b;
    int64_t first;
};

// Rows that stand one behind the other and use the same adapter.
struct AdaptedRows {
    const Update* updates;  // [layers][MATRICES]
    int64_t start, count;
};

// What is the same in every step.
struct Network {
    const Layer* layers;
    Norm final_norm;
    const float* local_cos_sin;  // of the layers that are ROTATED_LOCALLY, or null
    int64_t num_layers, hidden_size, num_heads, activation, gated;
    int64_t centered_norms;      // layer norms instead of RMS norms
    int64_t parallel;            // attention and MLP start from the same sum; without an mlp_norm, from the same norm
    int64_t q_norm_width, k_norm_width, rotary_dim;
    float eps, softcap, residual_scale;
};

// One step through all layers. The arrays are as for the single operations; x is overwritten. The result is `normed`, or
// `residual` if there is no final norm; rows that are not asked for are left undefined, if none is adapted.
struct Forward {
    Network network;
    float* x;                       // [T, C], embedded
    float* residual;                // [T, C]
    float* normed;                  // [T, C]
    float* wide;                    // [T, the widest of qkv and up]
    float* narrow;                  // [T, the wider of H D and what down takes]
    float* q;                       // [T, H, D]
    float* q_sink;                  // the same, or null
    void* scratch;                  // for the widest quantized layer, or null
    const float* cos_sin;           // of the layers that are ROTATED, or null
    const int64_t* positions;
    const int64_t* sink_positions;  // [T], if q_sink
    const int64_t* slots;
    const int64_t* nowhere;         // [T] of -1, if q_sink
    const int32_t* block_tables;
    const int32_t* query_start;
    const int32_t* seq_lens;
    const int32_t* num_results;     // [B]: of so many of its last rows the result is asked for; null: of all
    const AdaptedRows* adapted;     // [num_adapted]
    float* low;                     // [T, the highest rank of an update], if any rows are adapted
    float* added;                   // as wide
    int64_t num_tokens, num_requests, max_blocks, num_adapted;
};

struct Kernels {
    // out[T, N] = x[T, K] @ panels[ceil(N / 16)][K][16] + bias[N]. bits: 32, 16 (bf16), or 8 with scales as above
    void (*linear)(const float* x, const void* panels, const f16* scales, const float* bias, float* out, int64_t rows,
                   int64_t in_features, int64_t out_features, int64_t bits);
    void (*quantized_linear)(const QuantizedLinear* params);
    void (*quantized_rows)(const QuantizedRows* params);
    // residual null: out = norm(x). Otherwise residual += x first and out = norm(residual). bias null is allowed.
    void (*rms_norm)(const float* x, float* residual, const void* weight, const void* bias, float* out, int64_t rows,
                     int64_t columns, float eps, int64_t is_bf16);
    void (*layer_norm)(const float* x, float* residual, const void* weight, const void* bias, float* out, int64_t rows,
                       int64_t columns, float eps, int64_t is_bf16);
    void (*head_norm)(const HeadNormParams* params);
    void (*rotate_and_cache)(const RotateParams* params);
    void (*paged_attention)(const AttentionParams* params);
    // gated: x[T, 2C], out = act(x[:, :C]) * x[:, C:]; otherwise x[T, C], out = act(x). SWIGLU_OAI is gated by definition.
    void (*activation)(const float* x, float* out, int64_t rows, int64_t columns, int64_t kind, int64_t gated);
    // best[row] = the first index of the largest of x[rows, columns]
    void (*argmax)(const float* x, int64_t* best, int64_t rows, int64_t columns);
    void (*forward)(const Forward* params);
};

extern const Kernels tr_portable_kernels, tr_avx2_kernels, tr_avx512_kernels;

// Defined in dispatch.cpp. Runs task(context, i) for every i in [0, count), on the pool; the caller takes part.
extern "C" int tr_num_threads();
void tr_parallel_for(int64_t count, void (*task)(void*, int64_t), void* context);
