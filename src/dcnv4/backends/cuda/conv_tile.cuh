// The points of deform_conv in a tile of output pixels.
#pragma once

#include "conv.cuh"
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
    constexpr int removed = REMOVE_CENTER ? KERNEL_W / 2 * KERNEL_H + KERNEL_H / 2 : POINTS;
    const int cell = k + (k >= removed);
    const Sum x = Sum((tile.column + pixel % TILE_W) * STRIDE_W - PADDING_W + CENTER_W);
    const Sum y = Sum((tile.row + pixel / TILE_W) * STRIDE_H - PADDING_H + CENTER_H);
    return corners(x + c.offset_scale * (grid_x(cell) + read(fields + 2 * k)),
                   y + c.offset_scale * (grid_y(cell) + read(fields + 2 * k + 1)), c.height,
                   c.width);
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

// Calls `run(slice, at)` for all slices of the tile, LANES lanes each: the way of the direct
// kernels.
template <typename Run>
DCNV4_DEVICE void each_slice(const Convolution& c, const Tile& tile, Run run) {
    const Index first = Index(tile.image) * c.out_height * c.out_width;
#pragma unroll 1
    for (int pixel = tile.lane / LANES; pixel < PIXELS; pixel += 32 / LANES) {
        const bool active = tile.has(pixel);
        const Slice slice(active, first + tile.pixel(active ? pixel : 0, c.out_width), tile.group,
                          tile.lane % LANES);
        run(slice, OutputPixel(c, slice.pixel));
    }
}

}  // namespace dcnv4
