// What the tile kernels leave to the kernel launched next, and how that one finds it.
//
// `leftover` has a byte for every part of a tile, STRIP_CHANNELS of its channels: the byte is set
// where the next kernel must compute the part.
#pragma once

#include <common/conv.cuh>

namespace dcnv4 {

constexpr int PARTS = DEPTH / STRIP_CHANNELS;  // of a group
constexpr int TILE_PARTS = GROUPS * PARTS;     // of a tile

// Whether any of COUNT parts is left over, the first of which is number `first` of all tiles'.
template <int COUNT>
DCNV4_DEVICE bool any_leftover(const unsigned char* leftover, unsigned first) {
    bool any = false;
#pragma unroll 8
    for (int i = 0; i < COUNT; ++i) any |= leftover[first + i];
    return any;
}

// W x H output pixels, numbered over all images.
template <int W, int H>
struct Rectangle {
    int image, row, column;

    static DCNV4_DEVICE unsigned across(const Arguments& a) { return (a.out_width + W - 1) / W; }
    static DCNV4_DEVICE unsigned down(const Arguments& a) { return (a.out_height + H - 1) / H; }
    static DCNV4_DEVICE unsigned count(const Arguments& a) {
        return a.images * across(a) * down(a);
    }
    // The number of the rectangle that holds a pixel.
    static DCNV4_DEVICE unsigned number(const Arguments& a, int image, int row, int column) {
        return (image * down(a) + row / H) * across(a) + column / W;
    }
    DCNV4_DEVICE Rectangle(const Arguments& a, unsigned number) {
        column = number % across(a) * W, number /= across(a);
        row = number % down(a) * H, image = number / down(a);
    }
};
using TileArea = Rectangle<TILE_W, TILE_H>;

// Whether a group of the tile that holds a pixel is left over.
DCNV4_DEVICE bool is_leftover(const Arguments& a, int image, int row, int column, int group) {
    return any_leftover<PARTS>(a.leftover,
                               (TileArea::number(a, image, row, column) * GROUPS + group) * PARTS);
}

// Blocks stride over `count` pieces of work. Each lane of a warp looks whether one of them is
// wanted, then the block visits those.
template <typename Wanted, typename Visit>
DCNV4_DEVICE void each_wanted(unsigned count, Wanted wanted, Visit visit) {
#pragma unroll 1
    for (unsigned first = blockIdx.x; first < count; first += 32 * gridDim.x) {
        const unsigned own = first + threadIdx.x % 32 * gridDim.x;
        unsigned found = __ballot_sync(~0u, own < count && wanted(own));
#pragma unroll 1
        for (; found; found &= found - 1) visit(first + (__ffs(found) - 1) * gridDim.x);
    }
}

// Calls `visit(slice, pixel)` for what is left over.
template <typename Visit>
DCNV4_DEVICE void each_leftover(const Arguments& a, Visit visit) {
    ptx::griddepcontrol_wait();
    const auto wanted = [&](unsigned index) {
        return any_leftover<TILE_PARTS>(a.leftover, index * TILE_PARTS);
    };
    each_wanted(TileArea::count(a), wanted, [&](unsigned index) {
        const TileArea tile(a, index);
#pragma unroll 1
        for (unsigned slice = threadIdx.x / LANES; slice < TILE_W * TILE_H * GROUPS;
             slice += blockDim.x / LANES) {
            const int group = slice % GROUPS, pixel = slice / GROUPS;
            int row = tile.row + pixel / TILE_W, column = tile.column + pixel % TILE_W;
            const bool active = row < a.out_height && column < a.out_width &&
                                any_leftover<PARTS>(a.leftover, (index * GROUPS + group) * PARTS);
            if (!__any_sync(~0u, active)) continue;
            if (!active) row = tile.row, column = tile.column;
            const OutputPixel at(a, tile.image, row, column);
            visit(Slice(active, at.pixel(a), group, threadIdx.x % LANES), at);
        }
    });
}

// Calls `visit(slice, pixel)` for the thread's slice or, after tiles, for those left over.
template <typename Visit>
DCNV4_DEVICE void each_slice(const Arguments& a, Visit visit) {
    if constexpr (AFTER_TILES) {
        each_leftover(a, visit);
    } else {
        const Slice slice(a.slices);
        visit(slice, OutputPixel(a, slice.pixel));
    }
}

}  // namespace dcnv4
