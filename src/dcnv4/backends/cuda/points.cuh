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

#include "numbers.cuh"
#include "sampling.h"

namespace dcnv4 {

using Index = INDEX;  // of pixels and slices
using Channels = Vector<VALUE, VECTOR>;
using Sum = Channels::Sum;

#if DETERMINISTIC
using Total = long long;  // of the value's gradient, times a power of two that the host chose
#else
using Total = Sum;
#endif

// What the value's gradient is multiplied by; `units` holds a number an image.
DCNV4_DEVICE Sum unit_of_total(const Sum* units, Index image) {
    return DETERMINISTIC ? units[image] : Sum(1);
}

// The n-th piece of work of a backward, which goes from the last to the first: the zeros to which
// it adds were written from the first on, as the sums will be read, and of more than L2 can hold
// it holds what was written last.
DCNV4_DEVICE Index from_last(Index n, Index count) { return count - 1 - n; }

constexpr int ROUNDS = (POINTS + LANES - 1) / LANES;
// Rounds laid out one after another, so that loads of several points are under way at once. The
// backward waits for additions in L2, not for loads.
constexpr int UNROLLED = POINTS <= 16 ? ROUNDS : LANES < 8 ? 8 / LANES : 1;
constexpr int UNROLLED_BACKWARD = SOFTMAX && ROUNDS <= 4 ? ROUNDS : LANES < 4 ? 4 / LANES : 1;

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

// What each corner of a point inside counts: 0 where it lies outside.
DCNV4_DEVICE void legal_coefficients(const Corners<Sum>& c, Sum weight, Sum (&out)[4]) {
    coefficients(weight, c.fraction_x, c.fraction_y, out);
    out[0] = c.left && c.top ? out[0] : Sum(0);
    out[1] = c.right && c.top ? out[1] : Sum(0);
    out[2] = c.left && c.bottom ? out[2] : Sum(0);
    out[3] = c.right && c.bottom ? out[3] : Sum(0);
}

// The same channels of another pixel, `stride` bytes a pixel on.
template <typename T>
DCNV4_DEVICE T* at(T* first, Index pixel, Index stride) {
    return (T*)((size_t)first + (unsigned long long)pixel * stride);
}

// What a thread adds for one point to its channels. Where two halves are multiplied at once, a
// point is interpolated in half precision, a mean that cannot overflow; its weight, and the sum
// over the points, are in float32.
template <typename T, bool PACKED>
struct Sample {
    Pixels pixels;
    Sum coefficient[4];

    DCNV4_DEVICE Sample() {}
    DCNV4_DEVICE Sample(const Place& place, Sum weight) : pixels(place) {
        legal_coefficients(place.corners, weight, coefficient);
    }
    DCNV4_DEVICE Sample from(int lane) const {
        Sample out;
        out.pixels = pixels.from(lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) out.coefficient[i] = from_lane(coefficient[i], lane);
        return out;
    }
    DCNV4_DEVICE void add_to(Sum (&sum)[VECTOR], const Channels (&corner)[4]) const {
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            Sum next = sum[c];
#pragma unroll
            for (int i = 0; i < 4; ++i) next += coefficient[i] * corner[i][c];
            sum[c] = pixels.inside() ? next : sum[c];
        }
    }
};

template <typename T>
struct Sample<T, true> {
    Pixels pixels;
    unsigned top, bottom;  // coefficients of the left corner in the lower half, of the right above
    Sum weight;

    DCNV4_DEVICE Sample() {}
    DCNV4_DEVICE Sample(const Place& place, Sum weight) : pixels(place), weight(weight) {
        Sum share[4];
        legal_coefficients(place.corners, Sum(1), share);
        Vector<T, 2> pair;
        pair.set(0, share[0]), pair.set(1, share[1]);
        top = pair.word[0];
        pair.set(0, share[2]), pair.set(1, share[3]);
        bottom = pair.word[0];
    }
    DCNV4_DEVICE Sample from(int lane) const {
        Sample out;
        out.pixels = pixels.from(lane);
        out.top = from_lane(top, lane);
        out.bottom = from_lane(bottom, lane);
        out.weight = from_lane(weight, lane);
        return out;
    }
    DCNV4_DEVICE void add_to(Sum (&sum)[VECTOR], const Channels (&corner)[4]) const {
        using Pair = Number<T>;
        const unsigned both[4] = {ptx::lower_twice(top), ptx::upper_twice(top),
                                  ptx::lower_twice(bottom), ptx::upper_twice(bottom)};
        Channels mean;
#pragma unroll
        for (int w = 0; w < Channels::words; ++w) {
            mean.word[w] = Pair::multiply(both[0], corner[0].word[w]);
#pragma unroll
            for (int i = 1; i < 4; ++i)
                mean.word[w] = Pair::multiply_add(both[i], corner[i].word[w], mean.word[w]);
        }
#pragma unroll
        for (int c = 0; c < VECTOR; ++c)
            sum[c] = pixels.inside() ? sum[c] + weight * mean[c] : sum[c];
    }
};

// Adds the slice's points to VECTOR channels; `image` is the first pixel's such channels, `stride`
// the bytes from pixel to pixel.
template <typename Points>
DCNV4_DEVICE void gather(const Points& points, const Weights<Points>& weights, const VALUE* image,
                         Index stride, int lane, Sum (&sum)[VECTOR]) {
    ptx::hold(image);
    using Held = Sample<VALUE, Number<VALUE>::packed>;
#pragma unroll UNROLLED
    for (int round = 0; round < ROUNDS; ++round) {
        const int first = round * LANES;
        const int own = first + lane < POINTS ? first + lane : POINTS - 1;
        const Held mine(points.locate(own), weights[own]);
#pragma unroll
        for (int j = 0; j < (LANES < POINTS ? LANES : POINTS); ++j) {
            if (first + j >= POINTS) break;
            const Held sample = mine.from(j);
            Index pixel[4];
            sample.pixels.each(pixel);
            Channels corner[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) corner[i] = Channels::load(at(image, pixel[i], stride));
            sample.add_to(sum, corner);
        }
    }
}

// Gives `points` the gradients of point k from the dot products of its corners with the output's
// gradient; what is in `dot` for an illegal corner does not matter. With a softmax the weight's
// must wait for those of all points: it is kept in `slope` and adds to `mean`.
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

// The gradients of all logits; `slope` holds those of the weights, `mean` a lane's part of their
// sum.
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

// The gradients of a slice from that of its output. Adds `unit` times the value's to `grad_value`,
// the gradient at the first pixel's DEPTH channels of this group, and gives `points` those of its
// points. `image` and `grad` are DEPTH channels too.
template <typename Points>
DCNV4_DEVICE void scatter(const Points& points, const Weights<Points>& weights, const VALUE* image,
                          Index stride, const VALUE* grad, Total* grad_value, Index grad_stride,
                          Sum unit, const Slice& slice) {
    ptx::wait_for_launch_before();  // for zeros to add to
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
        for (int i = 0; i < 4; ++i) coefficient[i] = adds ? coefficient[i] * unit : Sum(0);
#pragma unroll
        for (int j = 0; j < (LANES < POINTS ? LANES : POINTS); ++j) {
            if (first + j >= POINTS) break;
            Index pixel[4];
            pixels.from(j).each(pixel);
            Sum share[4], partial[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < 4; ++i) share[i] = from_lane(coefficient[i], j);
            for (int c = slice.lane * VECTOR; c < DEPTH; c += LANES * VECTOR) {
                const Channels out = Channels::load(grad + c);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const Channels corner = Channels::load(at(image + c, pixel[i], stride));
                    Sum term[VECTOR];
#pragma unroll
                    for (int v = 0; v < VECTOR; ++v) {
                        partial[i] += corner[v] * out[v];
                        term[v] = share[i] * out[v];
                    }
                    // A corner outside, or one that a point on a pixel's centre does not reach.
                    if (share[i] != 0) add(at(grad_value + c, pixel[i], grad_stride), term);
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
