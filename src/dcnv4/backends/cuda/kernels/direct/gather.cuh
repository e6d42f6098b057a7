// A slice's output, gathered straight from memory.
#pragma once

#include <common/slices.cuh>

namespace dcnv4 {

// What a thread adds for one point to its channels. Where halves are PACKED, so that two are
// multiplied at once, a point is interpolated in half precision, a mean that cannot overflow; its
// weight, and the sum over the points, are in float32.
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
            mean.word[w] = Pair::mul(both[0], corner[0].word[w]);
#pragma unroll
            for (int i = 1; i < 4; ++i)
                mean.word[w] = Pair::fma(both[i], corner[i].word[w], mean.word[w]);
        }
#pragma unroll
        for (int c = 0; c < VECTOR; ++c)
            sum[c] = pixels.inside() ? sum[c] + weight * mean[c] : sum[c];
    }
};

// Adds the slice's points to VECTOR channels, of which `value` are those of the first pixel.
template <typename Points>
DCNV4_DEVICE void gather(const Points& points, const Weights<Points>& weights, const VALUE* value,
                         Index pixel_bytes, int lane, Sum (&sum)[VECTOR]) {
    ptx::hold(value);
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
            for (int i = 0; i < 4; ++i)
                corner[i] = Channels::load(at(value, pixel[i], pixel_bytes));
            sample.add_to(sum, corner);
        }
    }
}

// Writes the output of a slice.
template <typename Points>
DCNV4_DEVICE void gather_slice(const Arguments& a, const Points& points, Index image,
                               const Slice& slice) {
    const Weights<Points> weights(points, slice.lane);
    const VALUE* value = a.value + image * a.value_image + slice.group * DEPTH;
    VALUE* output = a.output + (slice.pixel * (long long)GROUPS + slice.group) * DEPTH;

#pragma unroll 1
    for (int start = 0; start < DEPTH; start += LANES * VECTOR) {
        const int channel = start + slice.lane * VECTOR;
        const bool idle = channel >= DEPTH;
        Sum sum[VECTOR] = {};
        gather(points, weights, value + (idle ? 0 : channel), a.pixel_bytes, slice.lane, sum);
        Channels out;
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) out.set(c, sum[c]);
        if (slice.active && !idle) out.store(output + channel);
    }
}

}  // namespace dcnv4
