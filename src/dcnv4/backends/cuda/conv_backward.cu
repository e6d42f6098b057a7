// Gradients of deform_conv, the value's added straight to memory.
//
// Work: as the forward, with fewer channels a thread. Dot products of a corner with the output's
// gradient are summed over the threads of a slice by shuffles, then each offset and weight gets its
// gradient in one store.
// Memory: as the forward, and 4*K vectors of float32 additions a slice.
// Limit: those additions, of which L2 took 91 sectors of 32 bytes a nanosecond on an H200, the
// issue slots being 26 % busy. Hence vectors of four (sm_90 on), neighbouring threads on
// neighbouring channels so that sectors are whole, and no addition where a corner counts nothing.
#include "conv.cuh"

using namespace dcnv4;

using Arguments = BackwardArguments;
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the structure must be what Python packs");

DCNV4_DEVICE void compute(const Arguments& a, const Slice& slice, const OutputPixel& at) {
    const FIELDS* fields = a.fields + at.image * a.c.fields_image + at.in_image * a.c.fields_pixel +
                           slice.group * (3 * POINTS);
    FIELDS* grad_fields = a.grad_fields + slice.pixel * a.channels;
    const ConvPoints points(a.c, fields, grad_fields + slice.group * (3 * POINTS), at.row,
                            at.column);
    const Weights<ConvPoints> weights(points, slice.lane);
    const long long first = at.image * (a.c.height * (long long)a.c.width) * (GROUPS * DEPTH);
    scatter(points, weights, a.value + at.image * a.c.value_image + slice.group * DEPTH, a.c.stride,
            a.grad + at.image * a.grad_image + at.in_image * a.grad_pixel + slice.group * DEPTH,
            a.grad_value + first + slice.group * DEPTH, Index(GROUPS * DEPTH * sizeof(Total)),
            unit_of_total(a.units, at.image), slice);

    if (slice.active && slice.group == GROUPS - 1)  // channels that no group owns
        for (long long c = 3 * GROUPS * POINTS + slice.lane; c < a.channels; c += LANES)
            store(grad_fields + c, Sum(0));
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) conv_backward(Arguments a) {
    each_slice(a.c, a.limits,
               [&](const Slice& slice, const OutputPixel& at) { compute(a, slice, at); });
}
