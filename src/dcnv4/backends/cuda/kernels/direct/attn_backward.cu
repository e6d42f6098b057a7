// Gradients of ms_deform_attn, the value's added straight to memory.
//
// Work, memory and limit: as conv_backward, with slices (query, head) and 4*L*P corners each.
#include <common/attn_backward.cuh>
#include <common/queries.cuh>
#include <direct/scatter.cuh>

using namespace dcnv4;

extern "C" __global__ void __launch_bounds__(MAX_THREADS) attn_backward(Arguments a) {
    __shared__ Levels levels;
    levels.fill(a);
    each_slice(a, levels, [&](const Slice& slice, Index image, Index query) {
        scatter(a, AttnGradients(a, levels, slice, image, query), slice);
    });
}
