// Gradients of deform_conv: what the kernels share that take a slice at a time.
#pragma once

#include <common/backward.cuh>
#include <common/leftover.cuh>

namespace dcnv4 {

// The points of a slice, and what their gradients are made of.
struct ConvGradients : ConvPoints {
    Operands operands;

    DCNV4_DEVICE ConvGradients(const Arguments& a, const Slice& slice, const OutputPixel& at)
        : ConvPoints(a, at, slice.group,
                     a.grad_offset_mask + slice.pixel * a.grad_offset_mask_pixel),
          operands{
              a.value + at.image * a.value_image + slice.group * DEPTH,
              a.grad + at.image * a.grad_image + at.in_image * a.grad_pixel + slice.group * DEPTH,
              a.grad_value + at.image * (a.height * (long long)a.width) * SUMS_PIXEL +
                  slice.group * DEPTH,
              at.image} {}

    DCNV4_DEVICE int level(int) const { return 0; }
    DCNV4_DEVICE void store_gradient(int k, Sum grad_x, Sum grad_y) const {
        store(grad_offset_mask + 2 * k, grad_x * window.scale);
        store(grad_offset_mask + 2 * k + 1, grad_y * window.scale);
    }
    DCNV4_DEVICE void store_weight_gradient(int k, Sum grad) const {
        store(grad_offset_mask + 2 * POINTS + k, grad);
    }
    // Zeros to the channels that no group owns.
    DCNV4_DEVICE void fill_up(const Arguments& a, const Slice& slice) const {
        if (slice.active && slice.group == GROUPS - 1)
            for (long long c = 3 * GROUPS * POINTS + slice.lane; c < a.offset_mask_channels;
                 c += LANES)
                store(grad_pixel + c, Sum(0));
    }
};

}  // namespace dcnv4
