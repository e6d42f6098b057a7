// Tiles of output pixels as small dense products on tensor cores.
//
// A warp goes down a strip of tiles, each TILE_W x TILE_H output pixels of one group: pixel
// (column, row) in lane 4 * column + row. Offsets are small: a point is NEAR if it is less than
// REACH pixels, in x and in y, from its HOME, the pixel nearest to its cell of the undeformed
// kernel. All corners that near points sample lie in a window of WINDOW_W x WINDOW_H pixels, the
// tile and its halo. Let S, of [window positions, pixels], hold at every corner its share of the
// point's weight. Then
//
//     output of a pixel               S' V        V: the window of the value
//     gradient of the value           S T         T: the output's gradient
//     what a point's gradients need   V T'        at the point's corners
//
// A pixel's column of S is a patch of PATCH_H rows and PAIRS pairs of columns about it. A lane
// builds it in registers, without a branch or an address: every point adds to all positions that it
// can reach
//
//     weight * hat(y - row) * hat(x - column)        hat(d) = max(0, 1 - |d|)
//
// two columns at once, in float16. Patches begin at even columns of the window, so that they are
// whole words there. From tile to tile the window moves down by TILE_H rows, and only those are
// read. Points that are not near are added by four lanes each, straight from memory. A tile with
// more than MOST_FAR of them, or with numbers that float16 or a product of zeros cannot take, ends
// the strip: what remains is its leftover, which the kernel launched next computes.
//
// The fragments of mma.m16n8k16: lane 4g+t holds rows g and g+8, columns 2t, 2t+1 and 8 more. So a
// quad of lanes owns the pixels of a column, and holds products of the same pixels.
#pragma once

#include <common/leftover.cuh>

namespace dcnv4 {

// The offset's scale is a power of two, so that float16 holds a scaled offset as exactly as the
// offset. Cells lie at whole steps from the window's centre, of which a pixel has PIXEL_STEPS.
constexpr float SCALE = float(SCALE_STEPS) / PIXEL_STEPS;
constexpr DCNV4_DEVICE int steps_x(int cell) { return SCALE_STEPS * cell_x(cell); }
constexpr DCNV4_DEVICE int steps_y(int cell) { return SCALE_STEPS * cell_y(cell); }
constexpr DCNV4_DEVICE int nearest(int steps) {
    constexpr int half = PIXEL_STEPS / 2 - 1;
    return (steps + (steps < 0 ? -half : half)) / PIXEL_STEPS;
}
// The columns and rows of homes: the first of them, and how many.
constexpr int FIRST_CELL = SCALE_STEPS < 0 ? CELLS - 1 : 0, LAST_CELL = CELLS - 1 - FIRST_CELL;
constexpr int HOME_W = nearest(steps_x(FIRST_CELL)), HOME_H = nearest(steps_y(FIRST_CELL));
constexpr int HOMES_W = nearest(steps_x(LAST_CELL)) - HOME_W + 1;
constexpr int HOMES_H = nearest(steps_y(LAST_CELL)) - HOME_H + 1;
// The home of point k, counted from the first column and row, and the steps from it to the cell.
constexpr DCNV4_DEVICE int column_of(int k) { return nearest(steps_x(cell_of(k))) - HOME_W; }
constexpr DCNV4_DEVICE int row_of(int k) { return nearest(steps_y(cell_of(k))) - HOME_H; }
constexpr DCNV4_DEVICE int rest_x(int k) {
    return steps_x(cell_of(k)) - PIXEL_STEPS * (column_of(k) + HOME_W);
}
constexpr DCNV4_DEVICE int rest_y(int k) {
    return steps_y(cell_of(k)) - PIXEL_STEPS * (row_of(k) + HOME_H);
}

constexpr int PIXELS = TILE_W * TILE_H;
constexpr int REACH = 2;
constexpr int PATCH_H = HOMES_H + 2 * REACH;
constexpr int PAIRS = (HOMES_W + 2 * REACH) / 2 + 1;
constexpr int WINDOW_W = 16, WINDOW_H = PATCH_H + TILE_H - 1;
constexpr int SAMPLED_W = TILE_W - 1 + HOMES_W + 2 * REACH;  // columns that are sampled
// From the window's first column and row to those of the tile.
constexpr int LEFT = REACH - HOME_W + PADDING_W - CENTER_W;
constexpr int ABOVE = REACH - HOME_H + PADDING_H - CENTER_H;

static_assert(KERNEL_H <= 3 && KERNEL_W <= 3 && STRIDE_H * STRIDE_W == 1, "few points in order");
static_assert(SAMPLED_W <= WINDOW_W && HOMES_H <= 5, "a patch must fit");
static_assert(DEPTH % 16 == 0 && sizeof(VALUE) == 2 && sizeof(OFFSET_MASK) == 2, "halves alone");

// The warps of a block share a window, and meet where they read it or fill it.
DCNV4_DEVICE void meet_block() {
    if constexpr (WARPS == 1)
        __syncwarp();
    else
        __syncthreads();
}
DCNV4_DEVICE bool any_of_block(bool one) {
    if constexpr (WARPS == 1) {
        __syncwarp();
        return one;
    } else {
        return __syncthreads_or(one);
    }
}

// Where a strip lies, and the tile of it that its warp is at.
struct Tile {
    int image, row, column;  // of the tile's first output pixel
    int part, lane;          // part: STRIP_CHANNELS of all channels
    int height, width;       // of the output
    int begin, last;         // the strip's first row, and one past its last

    DCNV4_DEVICE Tile(const Arguments& a, unsigned strip)
        : lane(threadIdx.x % 32), height(a.out_height), width(a.out_width) {
        part = strip % TILE_PARTS;
        strip /= TILE_PARTS;
        column = strip % TileArea::across(a) * TILE_W;
        strip /= TileArea::across(a);
        row = begin = strip % a.strips * a.strip_tiles * TILE_H;
        image = strip / a.strips;
        last = min(height, row + a.strip_tiles * TILE_H);
    }
    // Says that the tiles from row `end` on are left over, and those before are not.
    DCNV4_DEVICE void leave(const Arguments& a, int end) const {
        for (int y = begin + lane * TILE_H; y < last; y += 32 * TILE_H)
            a.leftover[TileArea::number(a, image, y, column) * TILE_PARTS + part] = y >= end;
    }
    DCNV4_DEVICE bool has(int c, int r) const { return column + c < width && row + r < height; }
    // The number of an output pixel in its image.
    DCNV4_DEVICE int pixel(int c, int r) const { return (row + r) * width + column + c; }
};

}  // namespace dcnv4
