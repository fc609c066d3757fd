// The kernels for x86-64 with AVX2 and FMA: 16 floats are two registers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define TR_AVX2
#define TR_KERNELS tr_avx2_kernels
#include "kernels.inl"
#endif
