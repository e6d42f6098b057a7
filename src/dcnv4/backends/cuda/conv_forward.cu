// deform_conv, gathered straight from memory.
//
// Work: LANES threads a slice; slices of a block lie side by side, group after group, then pixel
// after pixel, so that the windows of a block overlap. After the tile kernel, what that one left.
// Memory: every offset and weight once, every output once, and 4*K vectors of channels a slice out
// of L1 mostly, since the windows of neighbouring pixels overlap.
// Limit: L1, which serves rows shorter than its 128-byte lines at about half its rate: its data
// pipe is 87 % busy for 16 channels in float16 on an H200, the issue slots 63 %. Not device memory.
#include "conv.cuh"

using namespace dcnv4;

using Arguments = ForwardArguments;
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the structure must be what Python packs");

DCNV4_DEVICE void compute(const Arguments& a, const Slice& slice, const OutputPixel& at) {
    const FIELDS* fields = a.fields + at.image * a.c.fields_image + at.in_image * a.c.fields_pixel +
                           slice.group * (3 * POINTS);
    const ConvPoints points(a.c, fields, nullptr, at.row, at.column);
    const Weights<ConvPoints> weights(points, slice.lane);
    const VALUE* image = a.value + at.image * a.c.value_image + slice.group * DEPTH;
    VALUE* output = a.output + (slice.pixel * (long long)GROUPS + slice.group) * DEPTH;

#pragma unroll 1
    for (int start = 0; start < DEPTH; start += LANES * VECTOR) {
        const int channel = start + slice.lane * VECTOR;
        const bool idle = channel >= DEPTH;
        Sum sum[VECTOR] = {};
        gather(points, weights, image + (idle ? 0 : channel), a.c.stride, slice.lane, sum);
        Channels out;
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) out.set(c, sum[c]);
        if (slice.active && !idle) out.store(output + channel);
    }
}

// Blocks for which a processor must have registers: as many as there are after tiles, where points
// may lie far apart, and more would spoil each other's L1.
constexpr int RESIDENT = AFTER_TILES          ? GATHERING_THREADS / MAX_THREADS
                         : sizeof(VALUE) == 2 ? 4
                                              : 0;

extern "C" __global__ void __launch_bounds__(MAX_THREADS, RESIDENT) conv_forward(Arguments a) {
    each_slice(a.c, a.left,
               [&](const Slice& slice, const OutputPixel& at) { compute(a, slice, at); });
}
