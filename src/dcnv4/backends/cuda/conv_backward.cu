// Gradients of deform_conv, the value's added straight to memory.
//
// Work: as conv_forward. The dot products of a corner with the output's gradient are summed over a
// slice's threads by shuffles, so that each offset and weight gets its gradient in one store.
// Memory: as conv_forward, the output's gradient once, and 4*K additions of DEPTH channels a slice
// to the value's gradient in L2 (float32 for half-precision values; the caller rounds it).
// Limit: those additions, of which L2 took 91 sectors of 32 bytes a nanosecond on an H200, the issue
// slots being 26 % busy. Hence vectors of four (sm_90 on), neighbouring threads on neighbouring
// channels so that sectors are whole, and no addition where a corner counts nothing.
#include "conv_backward.cuh"

using namespace dcnv4;

extern "C" __global__ void __launch_bounds__(MAX_THREADS) conv_backward(Arguments a) {
    compute(a, Slice(a.c.slices));
}
