// Gradients of ms_deform_attn, the value's added straight to memory.
//
// Work, memory and limit: as conv_backward, with slices (query, head) and 4*L*P corners each.
#include "attn_backward.cuh"

using namespace dcnv4;

extern "C" __global__ void __launch_bounds__(MAX_THREADS) attn_backward(Arguments arguments) {
    const Attention& a = arguments.a;
    __shared__ Levels levels;
    levels.fill(a, arguments.shapes);
    const Slice slice(a.slices);
    const Index image = slice.pixel / a.queries, query = slice.pixel - image * a.queries;
    const Head head(arguments, levels, slice, image, query);
    const Weights<AttnPoints> weights(head.points, slice.lane);
    scatter(head.points, weights, head.image, a.stride, head.grad, head.grad_image,
            Head::grad_stride, unit_of_total(arguments.units, image), slice);
}
