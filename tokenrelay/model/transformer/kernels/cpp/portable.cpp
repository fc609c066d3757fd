// The kernels in plain C++, for arm64 and as the yardstick that the other two must equal bit by bit.
#define TR_KERNELS tr_portable_kernels
#include "kernels.inl"
