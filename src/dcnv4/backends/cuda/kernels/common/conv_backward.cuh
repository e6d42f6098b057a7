// Gradients of deform_conv: what the kernels share that take a slice at a time.
#pragma once

#include <common/backward.cuh>
#include <common/leftover.cuh>

namespace dcnv4 {

// The group of a slice.
struct Group {
    OFFSET_MASK* grad_offset_mask;  // of all groups
    ConvPoints points;
    Operands operands;

    DCNV4_DEVICE Group(const Arguments& a, const Slice& slice, const OutputPixel& at)
        : grad_offset_mask(a.grad_offset_mask + slice.pixel * a.grad_offset_mask_pixel),
          points(a, at,
                 a.offset_mask + at.image * a.offset_mask_image +
                     at.in_image * a.offset_mask_pixel + slice.group * (3 * POINTS),
                 grad_offset_mask + slice.group * (3 * POINTS)),
          operands{
              a.value + at.image * a.value_image + slice.group * DEPTH,
              a.grad + at.image * a.grad_image + at.in_image * a.grad_pixel + slice.group * DEPTH,
              a.grad_value + at.image * (a.height * (long long)a.width) * SUMS_PIXEL +
                  slice.group * DEPTH,
              at.image} {}

    // Zeros to the channels that no group owns.
    DCNV4_DEVICE void fill_up(const Arguments& a, const Slice& slice) const {
        if (slice.active && slice.group == GROUPS - 1)
            for (long long c = 3 * GROUPS * POINTS + slice.lane; c < a.offset_mask_channels;
                 c += LANES)
                store(grad_offset_mask + c, Sum(0));
    }
};

}  // namespace dcnv4
