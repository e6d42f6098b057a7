// Gradients of ms_deform_attn: what both kernels share.
#pragma once

#include <common/attn.cuh>
#include <common/backward.cuh>

namespace dcnv4 {

// The head of a slice.
struct Head {
    AttnPoints points;
    Operands operands;

    DCNV4_DEVICE Head(const Arguments& a, const Levels& levels, const Slice& slice, Index image,
                      Index query)
        : points{
              levels,
              a.locations + image * a.locations_image + query * a.locations_query +
                  slice.group * (2 * POINTS),
              a.weights + image * a.weights_image + query * a.weights_query + slice.group * POINTS,
              a.grad_locations + (slice.pixel * (long long)GROUPS + slice.group) * (2 * POINTS),
              a.grad_weights + (slice.pixel * (long long)GROUPS + slice.group) * POINTS},
          operands{a.value + image * a.value_image + slice.group * DEPTH,
                   a.grad + image * a.grad_image + query * a.grad_query + slice.group * DEPTH,
                   a.grad_value + image * a.length * (GROUPS * DEPTH) + slice.group * DEPTH,
                   image} {}
};

}  // namespace dcnv4
