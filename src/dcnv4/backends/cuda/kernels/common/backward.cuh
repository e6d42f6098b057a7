// What all backward kernels share.
//
// The operator's `Points` of a slice offer, besides what slices.cuh wants of them,
//     Operands operands
//     int level(int k)      which of LEVELS images point k lies in
//     void store_gradient(int k, Sum grad_x, Sum grad_y)      of a position, in pixels
//     void store_weight_gradient(int k, Sum grad)             of a weight, or of its logit
#pragma once

#include <common/slices.cuh>

namespace dcnv4 {

// What an image's sums are multiplied by where they are made of integers. `share` is the most that
// a weight of a softmax can be, NaN if its logits are not finite: then the image has no scale.
DCNV4_DEVICE Sum scale_of_sums(const Arguments& a, Index image, Sum share = 1) {
    if (!DETERMINISTIC) return 1;
    if (SOFTMAX && !(share <= 1)) a.fixed_point_scale[image] = share;
    return a.fixed_point_scale[image];
}

// The DEPTH channels of a slice's group: what its gradients are made of, and where the value's is
// summed.
struct Operands {
    const VALUE* value;  // the image's first pixel
    const VALUE* grad;   // the output's gradient
    Total* sums;         // of the value's gradient, at the image's first pixel
    Index image;
    static constexpr Index sums_bytes = SUMS_PIXEL * sizeof(Total);  // from pixel to pixel
};

// Gives `points` the gradients of point k from the dot products of its corners with the output's
// gradient; what is in `dot` for an illegal corner does not matter. With a softmax, the gradient of
// a logit needs those of all weights: the weight's is kept in `slope` and adds to `mean`.
template <typename Points>
DCNV4_DEVICE void point_gradients(const Points& points, int k, const Place& place, Sum weight,
                                  Sum (&dot)[4], Sum& slope, Sum& mean) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dot[i] = place.corners.legal >> i & 1 ? dot[i] : Sum(0);
    const PointGradient<Sum> gradient =
        coefficients_backward(dot, weight, place.corners.fraction_x, place.corners.fraction_y);
    points.store_gradient(k, gradient.x, gradient.y);
    if constexpr (SOFTMAX) {
        slope = gradient.weight;
        mean += gradient.weight * weight;
    } else {
        points.store_weight_gradient(k, gradient.weight);
    }
}

// Gives `points` the gradients of all logits, where there is a softmax. `slope` holds those of the
// weights, `mean` a lane's part of their sum.
template <typename Points>
DCNV4_DEVICE void logit_gradients(const Points& points, const Weights<Points>& weights,
                                  const Sum (&slope)[ROUNDS], Sum mean, const Slice& slice) {
    if constexpr (SOFTMAX) {
        mean = add_lanes(mean);
#pragma unroll UNROLLED
        for (int round = 0; round < ROUNDS; ++round) {
            const int k = round * LANES + slice.lane;
            if (slice.active && k < POINTS)
                points.store_weight_gradient(k, softmax_backward(slope[round], weights[k], mean));
        }
    }
}

}  // namespace dcnv4
