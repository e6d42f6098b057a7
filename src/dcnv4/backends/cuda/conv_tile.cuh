// The points of deform_conv in a tile of output pixels. Follows conv_forward.cuh or
// conv_backward.cuh, which say how a tile is computed that is none.
#pragma once

#include "tile.cuh"

namespace dcnv4 {

using Fields = Staged<3 * POINTS>;
constexpr int COUPLES = (POINTS + 1) / 2;  // words that hold a half for each point

// A lane's pixel.
struct Own {
    unsigned offsets[POINTS];   // pairs of float16
    unsigned weights[COUPLES];  // as they are in memory
    unsigned scaled[COUPLES];   // what the points count, over `unit`, as float16
    Sum peak, share;            // of the softmax
    Sum unit;                   // of the tile
    unsigned far;               // a bit a point
    bool odd;                   // whether one of the tile's weights is infinite or NaN

    DCNV4_DEVICE Own(const Fields& fields, const Tile& tile) {
        unsigned words[Fields::WORDS];
        fields.read(tile, words);
        far = 0;
#pragma unroll
        for (int k = 0; k < POINTS; ++k) {
            offsets[k] = Number<FIELDS>::as_f16(words[k]);
            far |= (is_near(offsets[k]) ? 0u : 1u) << k;
        }
#pragma unroll
        for (int i = 0; i < COUPLES; ++i) weights[i] = words[POINTS + i];
        if (POINTS % 2) weights[COUPLES - 1] &= 0xffff;
        scale();
    }

    DCNV4_DEVICE Sum weight(int k) const {
        const Sum logit = Number<FIELDS>::get(weights, k);
        return SOFTMAX ? exp(logit - peak) * share : logit;
    }

  private:
    DCNV4_DEVICE void scale() {
        Sum count[2 * COUPLES];
#pragma unroll
        for (int k = 0; k < 2 * COUPLES; ++k) count[k] = Number<FIELDS>::get(weights, k);
        unit = 1, peak = 0, share = 1;
        if constexpr (SOFTMAX) {
            peak = count[0];
            Sum total = 0;
#pragma unroll
            for (int k = 1; k < POINTS; ++k) peak = max(peak, count[k]);
#pragma unroll
            for (int k = 0; k < POINTS; ++k) total += count[k] = exp(count[k] - peak);
            share = 1 / total;
            odd = __any_sync(~0u, !(share <= 1));
#pragma unroll
            for (int k = 0; k < POINTS; ++k) count[k] *= share;
        } else {
            int most = 0;
#pragma unroll
            for (int k = 0; k < POINTS; ++k)
                most = max(most, int(__float_as_uint(count[k]) & 0x7fffffff));
            most = __reduce_max_sync(~0u, most);
            odd = most >= 0x7f800000;
            unit = unit_of(__uint_as_float(most));
            const Sum inverse = 1 / unit;
#pragma unroll
            for (int k = 0; k < POINTS; ++k) count[k] *= inverse;
        }
#pragma unroll
        for (int i = 0; i < COUPLES; ++i) scaled[i] = ptx::pack_f16(count[2 * i], count[2 * i + 1]);
    }
};

// Where point k of a pixel lies, as ConvPoints says, from the tile's staged offsets.
DCNV4_DEVICE Corners<Sum> locate(const Convolution& c, const Tile& tile, const FIELDS* fields,
                                 int column, int row, int k) {
    const OwnWindow window(c, tile.row + row, tile.column + column);
    return window.point(k, read(fields + 2 * k), read(fields + 2 * k + 1));
}

// Calls `visit(row, k, weight)` for the far points of the pixels of column g, one by one, in quad g;
// by all lanes, with row -1 where a quad has none left.
template <typename Visit>
DCNV4_DEVICE void each_far(const Own& own, const Tile& tile, Fields& fields, Visit visit) {
    const int quad = tile.lane & ~3;
    unsigned mask[TILE_H];
#pragma unroll
    for (int r = 0; r < TILE_H; ++r) mask[r] = __shfl_sync(~0u, own.far, quad + r);
    while (__any_sync(~0u, mask[0] | mask[1] | mask[2] | mask[3])) {
        int row = -1, k = 0;
#pragma unroll
        for (int r = 0; r < TILE_H; ++r)
            if (row < 0 && mask[r]) {
                row = r, k = __ffs(mask[r]) - 1;
                mask[r] &= mask[r] - 1;
            }
        Sum weight = read(fields.of(tile, quad / 4, max(row, 0)) + 2 * POINTS + k);
        if constexpr (SOFTMAX) {
            const Sum peak = __shfl_sync(~0u, own.peak, quad + max(row, 0));
            const Sum share = __shfl_sync(~0u, own.share, quad + max(row, 0));
            weight = exp(weight - peak) * share;
        }
        visit(row, k, weight);
    }
}

// S of the lane's pixel to shared memory.
DCNV4_DEVICE void build(Patches& patches, const Own& own, int lane) {
    unsigned patch[PATCH_H][PAIRS];
    fill(patch, lane / 4, own.offsets, own.scaled);
#pragma unroll
    for (int row = 0; row < PATCH_H; ++row)
#pragma unroll
        for (int q = 0; q < PAIRS; ++q) patch[row][q] = Number<VALUE>::of_f16(patch[row][q]);
    patches.store(lane, patch);
}

// The tile's slices, LANES lanes each, as the direct kernels compute them.
DCNV4_DEVICE void compute_directly(const Arguments& a, const Tile& tile) {
    const Index first = Index(tile.image) * a.c.out_height * a.c.out_width;
#pragma unroll 1
    for (int pixel = tile.lane / LANES; pixel < PIXELS; pixel += 32 / LANES) {
        const int c = pixel % TILE_W, r = pixel / TILE_W;
        const bool active = tile.has(c, r);
        const int legal = active ? tile.pixel(c, r, a.c.out_width) : tile.pixel(0, 0, a.c.out_width);
        compute(a, Slice(active, first + legal, tile.group, tile.lane % LANES));
    }
}

}  // namespace dcnv4
