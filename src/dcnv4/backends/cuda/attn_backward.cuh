// Gradients of ms_deform_attn: what both kernels are told.
#pragma once

#include "attn.cuh"

namespace dcnv4 {

struct Arguments {
    const VALUE* value;
    const LOCATIONS* locations;
    const WEIGHTS* weights;
    const VALUE* grad;
    Total* grad_value;          // zeros, [B, S, G, D]
    LOCATIONS* grad_locations;  // contiguous, as grad_weights
    WEIGHTS* grad_weights;
    const Sum* units;  // [B], see unit_of_total
    const long long* shapes;
    long long grad_image, grad_query;  // strides
    Attention a;
};

static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the structure must be what Python packs");

// A slice's points, its channels in the output's gradient, and those of its head at the first
// pixel.
struct Head {
    AttnPoints points;
    const VALUE* image;
    const VALUE* grad;
    Total* grad_image;
    static constexpr Index grad_stride = GROUPS * DEPTH * sizeof(Total);

    DCNV4_DEVICE Head(const Arguments& b, const Levels& levels, const Slice& slice, Index image,
                      Index query)
        : points{levels,
                 b.locations + image * b.a.locations_image + query * b.a.locations_query +
                     slice.group * (2 * POINTS),
                 b.weights + image * b.a.weights_image + query * b.a.weights_query +
                     slice.group * POINTS,
                 b.grad_locations + (slice.pixel * (long long)GROUPS + slice.group) * (2 * POINTS),
                 b.grad_weights + (slice.pixel * (long long)GROUPS + slice.group) * POINTS},
          image(b.value + image * b.a.value_image + slice.group * DEPTH),
          grad(b.grad + image * b.grad_image + query * b.grad_query + slice.group * DEPTH),
          grad_image(b.grad_value + image * b.a.length * (GROUPS * DEPTH) + slice.group * DEPTH) {}
};

}  // namespace dcnv4
