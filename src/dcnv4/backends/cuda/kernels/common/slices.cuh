// Points -> bilinear weighted sum, and its gradients: what both operators do once they know where
// their points lie.
//
// A slice is the DEPTH channels of one (output pixel, group). LANES neighbouring threads of a warp
// share it: each holds VECTOR channels, and each works out every LANES-th point, whose corners and
// coefficients it then hands to the others by shuffles. So coordinates, bounds and coefficients are
// computed once a slice, and nothing is staged in shared memory.
//
// A corner outside the image is read from the legal corner beside it and counts 0, so that every
// load is legal and none is conditional. A point outside is read at some pixel and not added.
//
// `Points`, the operator's part, offers
//     Place locate(int k)      where point k lies
//     Sum logit(int k)         its weight, or the logit of it
#pragma once

#include <common/numbers.cuh>
#include <sampling.h>

namespace dcnv4 {

using Index = INDEX;  // of pixels and slices
using Sum = SUM;
using Total = TOTAL;  // what the value's gradient is summed in
using Channels = Vector<VALUE, VECTOR>;

// The n-th piece of work of a backward, which goes from the last to the first: the zeros to which
// it adds were written from the first on, as the sums will be read, and of more than L2 can hold
// it holds what was written last.
DCNV4_DEVICE Index from_last(Index n, Index count) { return count - 1 - n; }

constexpr int ROUNDS = (POINTS + LANES - 1) / LANES;
// Rounds laid out one after another, so that loads of several points are under way at once.
constexpr int UNROLLED = POINTS <= 16 ? ROUNDS : LANES < 8 ? 8 / LANES : 1;

struct Place {
    Corners<Sum> corners;
    Index first;  // pixel of the image that this point lies in
    int width;    // of that image
};

// The threads of a slice, and which slice that is.
struct Slice {
    bool active;  // or one past the last, which repeats it and stores nothing
    Index pixel;  // of all output pixels of the batch
    int group, lane;

    DCNV4_DEVICE Slice(bool active, Index pixel, int group, int lane)
        : active(active), pixel(pixel), group(group), lane(lane) {}
    explicit DCNV4_DEVICE Slice(Index slices) {
        const Index slice = blockIdx.x * Index(blockDim.x / LANES) + threadIdx.x / LANES;
        active = slice < slices;
        const Index legal = active ? slice : slices - 1;
        pixel = legal / GROUPS;
        group = int(legal - pixel * GROUPS);
        lane = threadIdx.x % LANES;
    }
};

template <typename T>
DCNV4_DEVICE T from_lane(T number, int lane) {
    return LANES == 1 ? number : __shfl_sync(~0u, number, lane, LANES);
}

template <typename T>
DCNV4_DEVICE T add_lanes(T number) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) number += __shfl_xor_sync(~0u, number, step);
    return number;
}

template <typename T>
DCNV4_DEVICE T largest_of_lanes(T number) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) {
        const T other = __shfl_xor_sync(~0u, number, step);
        number = other > number ? other : number;
    }
    return number;
}

// The weights of a slice's points: what is stored, or its softmax.
template <typename Points>
struct Weights {
    const Points& points;
    Sum peak = 0, share = 1;

    DCNV4_DEVICE Weights(const Points& points, int lane) : points(points) {
        if constexpr (SOFTMAX) {
            peak = points.logit(lane < POINTS ? lane : 0);
#pragma unroll UNROLLED
            for (int k = lane + LANES; k < POINTS; k += LANES) {
                const Sum logit = points.logit(k);
                peak = logit > peak ? logit : peak;
            }
            peak = largest_of_lanes(peak);
            Sum total = 0;
#pragma unroll UNROLLED
            for (int k = lane; k < POINTS; k += LANES) total += exp(points.logit(k) - peak);
            share = 1 / add_lanes(total);
        }
    }
    DCNV4_DEVICE Sum operator[](int k) const {
        const Sum logit = points.logit(k);
        return SOFTMAX ? exp(logit - peak) * share : logit;
    }
};

// The four pixels that a point reads: top left, and the steps to the right and to the bottom ones,
// 0 where those lie outside.
struct Pixels {
    Index top_left, steps;  // `steps` packs the row step, the column step and `inside`

    DCNV4_DEVICE Pixels() {}
    explicit DCNV4_DEVICE Pixels(const Place& place) {
        const Corners<Sum>& c = place.corners;
        const Index row = max(c.row, 0), column = max(c.column, 0);
        top_left = place.first + row * place.width + column;
        steps = (c.top && c.bottom ? Index(place.width) << 2 : 0) | (c.left && c.right ? 2 : 0) |
                (c.inside ? 1 : 0);
    }
    DCNV4_DEVICE Pixels from(int lane) const {
        Pixels out;
        out.top_left = from_lane(top_left, lane);
        out.steps = from_lane(steps, lane);
        return out;
    }
    DCNV4_DEVICE bool inside() const { return steps & 1; }
    DCNV4_DEVICE void each(Index (&out)[4]) const {
        const Index right = steps >> 1 & 1, bottom = top_left + (steps >> 2);
        out[0] = top_left, out[1] = top_left + right;
        out[2] = bottom, out[3] = bottom + right;
    }
};

// What each corner of a point inside the image counts: 0 for a corner outside.
DCNV4_DEVICE void legal_coefficients(const Corners<Sum>& c, Sum weight, Sum (&out)[4]) {
    coefficients(weight, c.fraction_x, c.fraction_y, out);
    out[0] = c.left && c.top ? out[0] : Sum(0);
    out[1] = c.right && c.top ? out[1] : Sum(0);
    out[2] = c.left && c.bottom ? out[2] : Sum(0);
    out[3] = c.right && c.bottom ? out[3] : Sum(0);
}

// The address of the same channels of another pixel; `bytes` lie from pixel to pixel.
template <typename T>
DCNV4_DEVICE T* at(T* first, Index pixel, Index bytes) {
    return (T*)((size_t)first + (unsigned long long)pixel * bytes);
}

}  // namespace dcnv4
