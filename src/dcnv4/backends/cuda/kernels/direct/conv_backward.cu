// Gradients of deform_conv, the value's added straight to memory.
//
// Work: as the forward, with fewer channels a thread. Dot products of a corner with the output's
// gradient are summed over the threads of a slice by shuffles, then each offset and weight gets its
// gradient in one store.
// Memory: as the forward, and 4*K vectors of float32 additions a slice.
// Limit: those additions, of which L2 took 91 sectors of 32 bytes a nanosecond on an H200, the
// issue slots being 26 % busy. Hence vectors of four (sm_90 on), neighbouring threads on
// neighbouring channels so that sectors are whole, and no addition where a corner counts nothing.
#include <common/conv_backward.cuh>
#include <direct/scatter.cuh>

using namespace dcnv4;

extern "C" __global__ void __launch_bounds__(MAX_THREADS) conv_backward(Arguments a) {
    each_slice(a, [&](const Slice& slice, const OutputPixel& at) {
        const ConvGradients points(a, slice, at);
        scatter(a, points, slice);
        points.fill_up(a, slice);
    });
}
