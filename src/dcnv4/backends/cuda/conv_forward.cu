// deform_conv, gathered straight from memory.
//
// Work: LANES threads a slice (output pixel, group), the groups of a pixel side by side, so that
// a warp reads neighbouring channels wherever neighbouring groups agree on a pixel.
// Memory: every offset and weight once, every output once; 4*K vectors of channels a slice, out of
// L1 mostly, since the windows of neighbouring pixels overlap.
// Limit: L1, which serves rows shorter than its 128-byte lines at about half its rate: its data pipe
// is 87 % busy for 16 channels in float16 on an H200, the issue slots 63 %. Not device memory.
#include "conv_forward.cuh"

using namespace dcnv4;

extern "C" __global__ void __launch_bounds__(MAX_THREADS) conv_forward(Arguments a) {
    compute(a, Slice(a.c.slices));
}
