// Gradients of ms_deform_attn: what the direct and the sorting kernel share.
#pragma once

#include <common/attn.cuh>
#include <common/backward.cuh>

namespace dcnv4 {

// The points of a slice, and where their gradients go.
struct AttnGradients : AttnPoints {
    COORDINATES* grad_coordinates;
    WEIGHTS* grad_weights;
    Operands operands;

    DCNV4_DEVICE AttnGradients(const Arguments& a, const Levels& levels, const Slice& slice,
                               Index image, Index query)
        : AttnPoints(a, levels, slice.group, image, query),
          grad_coordinates(a.grad_coordinates + slice.pixel * a.grad_coordinates_row +
                           slice.group * (2 * POINTS)),
          grad_weights(a.grad_weights + slice.pixel * a.grad_weights_row + slice.group * POINTS),
          operands{a.value + image * a.value_image + slice.group * DEPTH,
                   a.grad + image * a.grad_image + query * a.grad_query + slice.group * DEPTH,
                   a.grad_value + image * a.length * (GROUPS * DEPTH) + slice.group * DEPTH,
                   image} {}

    DCNV4_DEVICE void store_gradient(int k, Sum grad_x, Sum grad_y) const {
        const Map map = this->map(level(k));
        store(grad_coordinates + 2 * k, grad_x * map.scale[0]);
        store(grad_coordinates + 2 * k + 1, grad_y * map.scale[1]);
    }
    DCNV4_DEVICE void store_weight_gradient(int k, Sum grad) const {
        store(grad_weights + k, grad);
    }
};

}  // namespace dcnv4
