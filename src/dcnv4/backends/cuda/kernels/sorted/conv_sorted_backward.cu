// Gradients of deform_conv, what neighbouring pixels add to one of the value's summed first.
//
// Work: a block a tile of BLOCK_COLUMNS x BLOCK_ROWS output pixels, and a group: sorted.cuh. After
// the tile kernel, its leftover, by as many blocks as run at once.
// Memory: as the direct kernel, but a pixel's channels are read, and its gradient is added to, once
// for every run of corners at it: 4.4 times a slice of 3 x 3 points half a pixel off the grid, not
// 36.
// Limit: shared memory, 81 % busy for 16 channels in float32 on an H100, more than half of it with
// bank conflicts where corners read their slices' output gradients; then instructions.
#include <common/conv_backward.cuh>
#include <sorted/sorted.cuh>

using namespace dcnv4;

using BlockArea = Rectangle<BLOCK_COLUMNS, BLOCK_ROWS>;
static_assert(BLOCK_COLUMNS % TILE_W == 0 && BLOCK_ROWS % TILE_H == 0, "whole tiles");

DCNV4_DEVICE void compute(const Arguments& a, Sorted& sorted, unsigned index) {
    const BlockArea area(a, index / GROUPS);
    const int group = index % GROUPS, own = threadIdx.x / LANES;
    int row = area.row + own / BLOCK_COLUMNS, column = area.column + own % BLOCK_COLUMNS;
    bool active = row < a.out_height && column < a.out_width;
    if (AFTER_TILES && active) active = is_leftover(a, area.image, row, column, group);
    if (!active) row = area.row, column = area.column;
    const OutputPixel at(a, area.image, row, column);
    const Slice slice(active, at.pixel(a), group, threadIdx.x % LANES);
    const ConvGradients points(a, slice, at);
    scatter_sorted(a, sorted, points, slice);
    points.fill_up(a, slice);
}

// Whether the tile kernel left any of a block's area, in a group.
DCNV4_DEVICE bool any_leftover(const Arguments& a, const BlockArea& area, int group) {
    bool any = false;
#pragma unroll
    for (int y = area.row; y < area.row + BLOCK_ROWS; y += TILE_H)
#pragma unroll
        for (int x = area.column; x < area.column + BLOCK_COLUMNS; x += TILE_W)
            if (y < a.out_height && x < a.out_width) any |= is_leftover(a, area.image, y, x, group);
    return any;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_THREADS / THREADS)
    conv_sorted_backward(Arguments a) {
    __shared__ Sorted sorted;
    sorted.clear();
    __syncthreads();
    if constexpr (AFTER_TILES) {
        ptx::griddepcontrol_wait();
        const unsigned count = BlockArea::count(a) * GROUPS;
        const auto wanted = [&](unsigned n) {
            const unsigned index = from_last(n, count);
            return any_leftover(a, BlockArea(a, index / GROUPS), index % GROUPS);
        };
        each_wanted(count, wanted, [&](unsigned n) { compute(a, sorted, from_last(n, count)); });
    } else {
        compute(a, sorted, from_last(blockIdx.x, gridDim.x));
    }
}
