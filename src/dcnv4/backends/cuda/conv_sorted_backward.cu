// Gradients of deform_conv, what neighbouring pixels add to one of the value's summed first.
//
// Work: a block a tile of BLOCK_COLUMNS x BLOCK_ROWS output pixels, and a group: sorted.cuh. After
// the tile kernel, what that one left, by as many blocks as run at once.
// Memory: as the direct kernel, but a pixel's channels are read, and its gradient is added to, once
// for every run of corners at it: 4.4 times a slice of 3 x 3 points half a pixel off the grid, not
// 36.
// Limit: shared memory, 81 % busy for 16 channels in float32 on an H100, more than half of it with
// bank conflicts where corners read their slices' output gradients; then instructions.
#include "conv_backward.cuh"
#include "sorted.cuh"

using namespace dcnv4;

using Tile = Rectangle<BLOCK_COLUMNS, BLOCK_ROWS>;
static_assert(BLOCK_COLUMNS % TILE_W == 0 && BLOCK_ROWS % TILE_H == 0, "whole tiles");

DCNV4_DEVICE void compute(const Arguments& a, Sorted& sorted, unsigned index) {
    const Convolution& c = a.c;
    const Tile tile(c, index / GROUPS);
    const int of_block = index % GROUPS, own = threadIdx.x / LANES;
    int row = tile.row + own / BLOCK_COLUMNS, column = tile.column + own % BLOCK_COLUMNS;
    bool active = row < c.out_height && column < c.out_width;
    if (AFTER_TILES && active) active = is_left(c, a.left, tile.image, row, column, of_block);
    if (!active) row = tile.row, column = tile.column;
    const OutputPixel at(c, tile.image, row, column);
    const Slice slice(active, at.pixel(c), of_block, threadIdx.x % LANES);
    const Group group(a, slice, at);
    const Weights<ConvPoints> weights(group.points, slice.lane);
    scatter_sorted(sorted, group.points, weights, group.image, c.stride, group.grad,
                   group.grad_image, Group::grad_stride, unit_of_total(a.units, at.image), slice);
    group.fill_up(a, slice);
}

// Whether the tile kernel left any of a block's tile, in a group.
DCNV4_DEVICE bool is_any_left(const Convolution& c, const unsigned char* left, const Tile& tile,
                              int group) {
    bool any = false;
#pragma unroll
    for (int y = tile.row; y < tile.row + BLOCK_ROWS; y += TILE_H)
#pragma unroll
        for (int x = tile.column; x < tile.column + BLOCK_COLUMNS; x += TILE_W)
            if (y < c.out_height && x < c.out_width)
                any |= is_left(c, left, tile.image, y, x, group);
    return any;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_THREADS / THREADS)
    conv_sorted_backward(Arguments a) {
    const Convolution& c = a.c;
    __shared__ Sorted sorted;
    sorted.clear();
    __syncthreads();
    if constexpr (AFTER_TILES) {
        ptx::wait_for_launch_before();
        const unsigned count = Tile::count(c) * GROUPS;
        each_wanted(
            count,
            [&](unsigned n) {
                const unsigned index = from_last(n, count);
                return is_any_left(c, a.left, Tile(c, index / GROUPS), index % GROUPS);
            },
            [&](unsigned n) { compute(a, sorted, from_last(n, count)); });
    } else {
        compute(a, sorted, from_last(blockIdx.x, gridDim.x));
    }
}
