// Gradients of deform_conv for one slice, the value's added straight to memory.
#pragma once

#include "conv.cuh"

namespace dcnv4 {

struct Arguments {
    const VALUE* value;
    const FIELDS* fields;
    const VALUE* grad;
    Total* grad_value;    // zeros, [B, H, W, C]
    FIELDS* grad_fields;  // [B, Ho, Wo, fields]
    const Sum* units;     // [B], see unit_of_total
    long long grad_image, grad_pixel;  // strides
    long long channels;                // of offset_mask, padding included
    Convolution c;
};

static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the structure must be what Python packs");

DCNV4_DEVICE void compute(const Arguments& a, const Slice& slice) {
    const OutputPixel at(a.c, slice.pixel);
    const FIELDS* fields = a.fields + at.image * a.c.fields_image +
                           at.in_image * a.c.fields_pixel + slice.group * (3 * POINTS);
    FIELDS* grad_fields = a.grad_fields + slice.pixel * a.channels;
    const ConvPoints points(a.c, fields, grad_fields + slice.group * (3 * POINTS), at.row,
                            at.column);
    const Weights<ConvPoints> weights(points, slice.lane);
    const long long first = at.image * (a.c.height * (long long)a.c.width) * (GROUPS * DEPTH);
    scatter(points, weights, a.value + at.image * a.c.value_image + slice.group * DEPTH,
            a.c.stride,
            a.grad + at.image * a.grad_image + at.in_image * a.grad_pixel + slice.group * DEPTH,
            a.grad_value + first + slice.group * DEPTH, Index(GROUPS * DEPTH * sizeof(Total)),
            unit_of_total(a.units, at.image), slice);

    if (slice.active && slice.group == GROUPS - 1)  // channels that no group owns
        for (long long c = 3 * GROUPS * POINTS + slice.lane; c < a.channels; c += LANES)
            store(grad_fields + c, Sum(0));
}

}  // namespace dcnv4
