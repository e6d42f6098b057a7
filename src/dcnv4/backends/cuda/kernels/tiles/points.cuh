// The points of deform_conv in a tile of output pixels.
#pragma once

#include <tiles/patches.cuh>
#include <tiles/staged.cuh>

namespace dcnv4 {

using StagedPoints = Staged<3 * POINTS>;
constexpr int COUPLES = (POINTS + 1) / 2;  // words that hold a half for each point

// Whether either half of any word is infinite or NaN.
template <int N>
DCNV4_DEVICE bool not_finite(const unsigned (&words)[N]) {
    constexpr unsigned exponents = Number<VALUE>::exponents, carry = 0x80008000u - exponents;
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) found |= (words[i] & exponents) + carry;
    return found & 0x80008000u;
}

// The points of a lane's own pixel, and what they tell of the tile.
struct OwnPixel {
    unsigned offsets[POINTS];   // scaled, pairs of float16; 0 of far points
    unsigned weights[COUPLES];  // what the points count, as float16; 0 of far points
    unsigned logits[COUPLES];   // the weights, or logits of them, as they are in memory
    Sum peak, share;            // of the softmax
    unsigned far;               // a bit a point
    int count;                  // of the tile's far points
    bool fits;                  // whether float16 holds all of the tile's weights

    DCNV4_DEVICE OwnPixel(const StagedPoints& staged, int lane, int group) {
        unsigned words[StagedPoints::WORDS];
        staged.read(lane, group, words);
        unsigned all = 0;
#pragma unroll
        for (int k = 0; k < POINTS; ++k) {
            offsets[k] = Number<OFFSET_MASK>::as_f16(words[k]);
            if (SCALE != 1)
                offsets[k] = ptx::mul_f16x2(offsets[k], steps_as_f16x2(SCALE_STEPS, SCALE_STEPS));
            all |= from_home(offsets[k], k);
        }
        unsigned any = 0;
#pragma unroll
        for (int i = 0; i < COUPLES; ++i) {
            logits[i] = words[POINTS + i];
            if (POINTS % 2 && i == COUPLES - 1) logits[i] &= 0xffff;
            weights[i] = Number<OFFSET_MASK>::as_f16(logits[i]);
            any |= logits[i];
        }
        peak = 0, share = 1;
        if constexpr (SOFTMAX) {
            Sum count[2 * COUPLES] = {}, total = 0;
            peak = Number<OFFSET_MASK>::get(logits, 0);
#pragma unroll
            for (int k = 1; k < POINTS; ++k) peak = max(peak, Number<OFFSET_MASK>::get(logits, k));
#pragma unroll
            for (int k = 0; k < POINTS; ++k)
                total += count[k] = exp(Number<OFFSET_MASK>::get(logits, k) - peak);
            share = 1 / total;
#pragma unroll
            for (int i = 0; i < COUPLES; ++i)
                weights[i] = ptx::cvt_f16x2_f32(count[2 * i] * share, count[2 * i + 1] * share);
            fits = !__any_sync(~0u, !(share <= 1));
        } else {
            // Sums of POINTS weights stay finite, and what is lost below the least float16 is
            // 2^-14 of a weight at most.
            unsigned most = 0;
#pragma unroll
            for (int i = 0; i < COUPLES; ++i) most = ptx::max_abs_f16x2(most, weights[i]);
            const int largest = __reduce_max_sync(~0u, int(max(most & 0xffff, most >> 16)));
            constexpr int LEAST = 0x1000, GREATEST = 0x6800;  // 2^-11, 2^11
            fits = largest < GREATEST && (largest >= LEAST || !__any_sync(~0u, any & 0x7fff7fffu));
        }
        far = 0, count = 0;
        if (!__any_sync(~0u, !is_near(all))) return;
#pragma unroll
        for (int k = 0; k < POINTS; ++k) {
            if (is_near(from_home(offsets[k], k))) continue;
            far |= 1u << k;
            offsets[k] = 0;
            weights[k / 2] &= k % 2 ? 0xffff : 0xffff0000u;
        }
        count = __reduce_add_sync(~0u, __popc(far));
    }

    DCNV4_DEVICE Sum weight(int k) const {
        const Sum logit = Number<OFFSET_MASK>::get(logits, k);
        return SOFTMAX ? exp(logit - peak) * share : logit;
    }
    // Where a near point is from its home.
    DCNV4_DEVICE Sum x(int k) const {
        return from_home(Number<float16>::get(&offsets[k], 0), rest_x(k));
    }
    DCNV4_DEVICE Sum y(int k) const {
        return from_home(Number<float16>::get(&offsets[k], 1), rest_y(k));
    }
};

// Calls `visit(some, row, k, weight, corners)` for the far points of the pixels of column g, one by
// one, in quad g. All lanes make all calls: `some` is false where a quad has no point left.
template <typename Visit>
DCNV4_DEVICE void each_far(const Arguments& a, const OwnPixel& own, const Tile& tile, int group,
                           const StagedPoints& staged, Visit visit) {
    const int quad = tile.lane & ~3, column = quad / 4;
    unsigned mask[TILE_H];
#pragma unroll
    for (int r = 0; r < TILE_H; ++r) mask[r] = __shfl_sync(~0u, own.far, quad + r);
    while (__any_sync(~0u, mask[0] | mask[1] | mask[2] | mask[3])) {
        bool some = false;
        int row = 0, k = 0;
#pragma unroll
        for (int r = 0; r < TILE_H; ++r)
            if (!some && mask[r]) {
                some = true, row = r, k = __ffs(mask[r]) - 1;
                mask[r] &= mask[r] - 1;
            }
        Sum weight = staged.read(column, row, group, 2 * POINTS + k);
        if constexpr (SOFTMAX) {
            const Sum peak = __shfl_sync(~0u, own.peak, quad + row);
            const Sum share = __shfl_sync(~0u, own.share, quad + row);
            weight = exp(weight - peak) * share;
        }
        const OwnWindow window(a, tile.row + row, tile.column + column);
        visit(some, row, k, weight,
              window.point(k, staged.read(column, row, group, 2 * k),
                           staged.read(column, row, group, 2 * k + 1)));
    }
}

// Writes S of the lane's pixel to shared memory.
template <typename To>
DCNV4_DEVICE void build(To& to, const OwnPixel& own, int lane) {
    unsigned patch[PATCH_H][PAIRS];
    fill(patch, lane / 4, own.offsets, own.weights);
#pragma unroll
    for (int row = 0; row < PATCH_H; ++row)
#pragma unroll
        for (int q = 0; q < PAIRS; ++q) patch[row][q] = Number<VALUE>::of_f16(patch[row][q]);
    to.store(lane, patch);
}

}  // namespace dcnv4
