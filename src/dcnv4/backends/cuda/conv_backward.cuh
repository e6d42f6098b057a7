// Gradients of deform_conv: what the kernels share that take a slice at a time.
#pragma once

#include "conv.cuh"

namespace dcnv4 {

using Arguments = BackwardArguments;
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the structure must be what Python packs");

// A slice's points, its channels in the output's gradient, and those of its group at the first
// pixel.
struct Group {
    FIELDS* grad_fields;  // of all groups
    ConvPoints points;
    const VALUE* image;
    const VALUE* grad;
    Total* grad_image;
    static constexpr Index grad_stride = GROUPS * DEPTH * sizeof(Total);

    DCNV4_DEVICE Group(const Arguments& a, const Slice& slice, const OutputPixel& at)
        : grad_fields(a.grad_fields + slice.pixel * a.channels),
          points(a.c,
                 a.fields + at.image * a.c.fields_image + at.in_image * a.c.fields_pixel +
                     slice.group * (3 * POINTS),
                 grad_fields + slice.group * (3 * POINTS), at.row, at.column),
          image(a.value + at.image * a.c.value_image + slice.group * DEPTH),
          grad(a.grad + at.image * a.grad_image + at.in_image * a.grad_pixel +
               slice.group * DEPTH),
          grad_image(a.grad_value +
                     at.image * (a.c.height * (long long)a.c.width) * (GROUPS * DEPTH) +
                     slice.group * DEPTH) {}

    // Zeros to the channels that no group owns.
    DCNV4_DEVICE void fill_up(const Arguments& a, const Slice& slice) const {
        if (slice.active && slice.group == GROUPS - 1)
            for (long long c = 3 * GROUPS * POINTS + slice.lane; c < a.channels; c += LANES)
                store(grad_fields + c, Sum(0));
    }
};

}  // namespace dcnv4
