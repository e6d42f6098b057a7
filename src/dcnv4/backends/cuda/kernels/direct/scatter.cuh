// A slice's gradients, the value's added straight to memory.
#pragma once

#include <common/backward.cuh>

namespace dcnv4 {

// Rounds laid out one after another: few, as the backward waits for additions in L2, not for loads.
constexpr int UNROLLED_BACKWARD = SOFTMAX && ROUNDS <= 4 ? ROUNDS : LANES < 4 ? 4 / LANES : 1;

// The gradients of a slice: adds to the value's, and gives `points` those of its points.
template <typename Points>
DCNV4_DEVICE void scatter(const Arguments& a, const Points& points, const Slice& slice) {
    const Operands& o = points.operands;
    const Weights<Points> weights(points, slice.lane);
    const Sum fixed_point_scale = scale_of_sums(a, o.image, weights.share);
    const Index pixel_bytes = a.pixel_bytes;
    ptx::griddepcontrol_wait();  // for zeros to add to
    Sum slope[ROUNDS], mean = 0;
#pragma unroll UNROLLED_BACKWARD
    for (int round = 0; round < ROUNDS; ++round) {
        const int first = round * LANES, k = first + slice.lane;
        const int own = k < POINTS ? k : POINTS - 1;
        const Place place = points.locate(own);
        const Sum weight = weights[own];
        const Pixels pixels(place);
        Sum coefficient[4], dot[4];
        legal_coefficients(place.corners, weight, coefficient);
        const bool adds = slice.active && place.corners.inside;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            coefficient[i] = adds ? coefficient[i] * fixed_point_scale : Sum(0);
#pragma unroll
        for (int j = 0; j < (LANES < POINTS ? LANES : POINTS); ++j) {
            if (first + j >= POINTS) break;
            Index pixel[4];
            pixels.from(j).each(pixel);
            Sum share[4], partial[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < 4; ++i) share[i] = from_lane(coefficient[i], j);
            for (int c = slice.lane * VECTOR; c < DEPTH; c += LANES * VECTOR) {
                const Channels grad = Channels::load(o.grad + c);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const Channels corner = Channels::load(at(o.value + c, pixel[i], pixel_bytes));
                    Sum term[VECTOR];
#pragma unroll
                    for (int v = 0; v < VECTOR; ++v) {
                        partial[i] += corner[v] * grad[v];
                        term[v] = share[i] * grad[v];
                    }
                    // A corner outside, or one that a point on a pixel's centre does not reach.
                    if (share[i] != 0) red_add(at(o.sums + c, pixel[i], o.sums_bytes), term);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                partial[i] = add_lanes(partial[i]);
                if (j == slice.lane || LANES == 1) dot[i] = partial[i];
            }
        }
        if (!(slice.active && k < POINTS)) continue;
        point_gradients(points, k, place, weight, dot, slope[round], mean);
    }
    logit_gradients(points, weights, slope, mean, slice);
}

}  // namespace dcnv4
