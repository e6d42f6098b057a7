// deform_conv of one slice, gathered straight from memory.
#pragma once

#include "conv.cuh"

namespace dcnv4 {

struct Arguments {
    const VALUE* value;
    const FIELDS* fields;
    VALUE* output;
    Convolution c;
};

static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the structure must be what Python packs");

DCNV4_DEVICE void compute(const Arguments& a, const Slice& slice) {
    const OutputPixel at(a.c, slice.pixel);
    const FIELDS* fields = a.fields + at.image * a.c.fields_image +
                           at.in_image * a.c.fields_pixel + slice.group * (3 * POINTS);
    const ConvPoints points(a.c, fields, nullptr, at.row, at.column);
    const Weights<ConvPoints> weights(points, slice.lane);
    const VALUE* image = a.value + at.image * a.c.value_image + slice.group * DEPTH;
    VALUE* output = a.output + (slice.pixel * (long long)GROUPS + slice.group) * DEPTH;

#pragma unroll 1
    for (int start = 0; start < DEPTH; start += LANES * VECTOR) {
        const int channel = start + slice.lane * VECTOR;
        const bool idle = channel >= DEPTH;
        Sum sum[VECTOR] = {};
        gather(points, weights, image + (idle ? 0 : channel),
               a.c.stride, slice.lane, sum);
        Channels out;
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) out.set(c, sum[c]);
        if (slice.active && !idle) out.store(output + channel);
    }
}

}  // namespace dcnv4
