// The points of deform_conv in a tile of output pixels. Follows conv_forward.cuh or
// conv_backward.cuh, which say how a tile is computed that is none.
#pragma once

#include "tile.cuh"

namespace dcnv4 {

using Fields = Staged<3 * POINTS>;

// What a warp keeps in shared memory.
struct Shared {
    Matrix matrix;
    Fields fields;  // offsets and weights, later their gradients
};

// Where point k of a pixel lies, as ConvPoints says, from the tile's staged offsets.
DCNV4_DEVICE Corners<Sum> locate(const Convolution& c, const Tile& tile, const FIELDS* fields,
                                 int pixel, int k) {
    const OwnWindow window(c, tile.row + pixel / TILE_W, tile.column + pixel % TILE_W);
    return window.point(k, read(fields + 2 * k), read(fields + 2 * k + 1));
}

DCNV4_DEVICE Slots locate_all(const Convolution& c, const Tile& tile, Fields& staged) {
    Slots s;
    s.inside = 0;
    const FIELDS* fields = staged.of(tile, tile.lane);
    const bool active = tile.has(tile.lane);
#pragma unroll
    for (int k = 0; k < POINTS; ++k) {
        const Corners<Sum> at = locate(c, tile, fields, tile.lane, k);
        s.column[k] = at.column, s.row[k] = at.row;
        s.x[k] = at.fraction_x, s.y[k] = at.fraction_y;
        s.weight[k] = active ? read(fields + 2 * POINTS + k) : Sum(0);
        s.inside |= (active && at.inside ? 1u : 0u) << k;
    }
    if constexpr (SOFTMAX) {
        Sum peak = s.weight[0], total = 0;
#pragma unroll
        for (int k = 1; k < POINTS; ++k) peak = s.weight[k] > peak ? s.weight[k] : peak;
#pragma unroll
        for (int k = 0; k < POINTS; ++k) total += s.weight[k] = exp(s.weight[k] - peak);
#pragma unroll
        for (int k = 0; k < POINTS; ++k) s.weight[k] /= total;
    }
    return s;
}

// The tile's slices, LANES lanes each, as the direct kernels compute them.
DCNV4_DEVICE void compute_directly(const Arguments& a, const Tile& tile) {
    const Index first = Index(tile.image) * a.c.out_height * a.c.out_width;
#pragma unroll 1
    for (int pixel = tile.lane / LANES; pixel < PIXELS; pixel += 32 / LANES) {
        const bool active = tile.has(pixel);
        compute(a, Slice(active, first + tile.pixel(active ? pixel : 0, a.c.out_width), tile.group,
                         tile.lane % LANES));
    }
}

}  // namespace dcnv4
