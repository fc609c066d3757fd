// The kernels for x86-64 with AVX-512: 16 floats are one register.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#define TR_AVX512
#define TR_KERNELS tr_avx512_kernels
#include "kernels.inl"
#endif
