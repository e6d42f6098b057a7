// Where the points of deform_conv lie: the mirror of `conv_points` in geometry.py.
#pragma once

#include "points.cuh"

namespace dcnv4 {

// Tiles of output pixels, which the tile kernels compute where they can: see tile.cuh. A warp takes
// a part of a tile's channels, WIDE of one group.
constexpr int TILE_W = 8, TILE_H = 4;
constexpr int PARTS = DEPTH / WIDE, TILE_PARTS = GROUPS * PARTS;  // of a group, and of a tile

// What all kernels are told. Strides are in elements but for `stride`; channels lie side by side.
struct Convolution {
    long long value_image;
    long long fields_image, fields_pixel;  // of offset_mask
    Index stride;                          // bytes from pixel to pixel of the value
    Index slices, images;                  // B * Ho * Wo * G, and B
    Sum offset_scale;
    int height, width, out_height, out_width;
    int tiles, strips;  // tiles of a strip, and strips of a column of tiles
};

struct ForwardArguments {
    const VALUE* value;
    const FIELDS* fields;
    VALUE* output;
    unsigned char* left;  // see `any_left`
    Convolution c;
};

struct BackwardArguments {
    const VALUE* value;
    const FIELDS* fields;
    const VALUE* grad;
    Total* grad_value;    // [B, H, W, C], to be added to
    FIELDS* grad_fields;  // [B, Ho, Wo, fields]
    const Sum* units;     // [B], see unit_of_total
    unsigned char* left;
    long long grad_image, grad_pixel;  // strides
    long long channels;                // of offset_mask, padding included
    Convolution c;
};

// The cells of the undeformed window, from its centre: columns outermost. Tabulated, as a division
// for every point costs more; but constant memory is small.
constexpr int CELLS = KERNEL_H * KERNEL_W;
constexpr bool TABULATED = CELLS <= 2048;

// The cell of point k.
constexpr DCNV4_DEVICE int cell_of(int k) {
    return k + (REMOVE_CENTER && k >= KERNEL_W / 2 * KERNEL_H + KERNEL_H / 2);
}
constexpr DCNV4_DEVICE Sum grid_x(int cell) { return cell / KERNEL_H * DILATION_W - CENTER_W; }
constexpr DCNV4_DEVICE Sum grid_y(int cell) { return cell % KERNEL_H * DILATION_H - CENTER_H; }

struct Grid {
    Sum x[TABULATED ? CELLS : 1], y[TABULATED ? CELLS : 1];

    constexpr __device__ Grid() : x(), y() {
        for (int cell = 0; TABULATED && cell < CELLS; ++cell) {
            x[cell] = grid_x(cell);
            y[cell] = grid_y(cell);
        }
    }
};
__constant__ constexpr Grid grid;

// The window of an output pixel, on an input image.
struct OwnWindow {
    Sum x, y, scale;  // of its centre
    int height, width;

    DCNV4_DEVICE OwnWindow(const Convolution& c, int row, int column)
        : x(Sum(column * STRIDE_W - PADDING_W + CENTER_W)),
          y(Sum(row * STRIDE_H - PADDING_H + CENTER_H)),
          scale(c.offset_scale),
          height(c.height),
          width(c.width) {}

    DCNV4_DEVICE Corners<Sum> point(int k, Sum offset_x, Sum offset_y) const {
        const int cell = cell_of(k);
        const Sum at_x = x + scale * ((TABULATED ? grid.x[cell] : grid_x(cell)) + offset_x);
        const Sum at_y = y + scale * ((TABULATED ? grid.y[cell] : grid_y(cell)) + offset_y);
        return corners(at_x, at_y, height, width);
    }
};

struct ConvPoints {
    const FIELDS* fields;  // 2K offsets, K weights
    FIELDS* gradient;      // as fields
    OwnWindow window;

    DCNV4_DEVICE ConvPoints(const Convolution& c, const FIELDS* at, FIELDS* gradient, int row,
                            int column)
        : fields(at), gradient(gradient), window(c, row, column) {}

    DCNV4_DEVICE int level(int) const { return 0; }
    DCNV4_DEVICE Place locate(int k) const {
        const FIELDS* offset = fields + 2 * k;
        return {window.point(k, load(offset), load(offset + 1)), 0, window.width};
    }
    DCNV4_DEVICE Sum logit(int k) const { return load(fields + 2 * POINTS + k); }

    DCNV4_DEVICE void store_gradient(int k, Sum grad_x, Sum grad_y) const {
        store(gradient + 2 * k, grad_x * window.scale);
        store(gradient + 2 * k + 1, grad_y * window.scale);
    }
    DCNV4_DEVICE void store_weight_gradient(int k, Sum grad) const {
        store(gradient + 2 * POINTS + k, grad);
    }
};

// Image, row and column of an output pixel.
struct OutputPixel {
    Index image, in_image;
    int row, column;

    DCNV4_DEVICE OutputPixel(const Convolution& c, Index pixel) {
        const Index area = Index(c.out_height) * c.out_width;
        image = pixel / area;
        in_image = pixel - image * area;
        row = int(in_image / c.out_width);
        column = int(in_image - Index(row) * c.out_width);
    }
    DCNV4_DEVICE OutputPixel(const Convolution& c, int image, int row, int column)
        : image(image), in_image(Index(row) * c.out_width + column), row(row), column(column) {}

    // Of all images'.
    DCNV4_DEVICE Index pixel(const Convolution& c) const {
        return image * c.out_height * c.out_width + in_image;
    }
};

// Whether the tile kernel left any of COUNT parts from part `first` of all tiles' on.
template <int COUNT>
DCNV4_DEVICE bool any_left(const unsigned char* left, unsigned first) {
    bool any = false;
#pragma unroll 8
    for (int i = 0; i < COUNT; ++i) any |= left[first + i];
    return any;
}

// W x H output pixels, numbered over all images.
template <int W, int H>
struct Rectangle {
    int image, row, column;

    static DCNV4_DEVICE unsigned across(const Convolution& c) { return (c.out_width + W - 1) / W; }
    static DCNV4_DEVICE unsigned down(const Convolution& c) { return (c.out_height + H - 1) / H; }
    static DCNV4_DEVICE unsigned count(const Convolution& c) {
        return c.images * across(c) * down(c);
    }
    // Of the one that holds a pixel.
    static DCNV4_DEVICE unsigned number(const Convolution& c, int image, int row, int column) {
        return (image * down(c) + row / H) * across(c) + column / W;
    }
    DCNV4_DEVICE Rectangle(const Convolution& c, unsigned number) {
        column = number % across(c) * W, number /= across(c);
        row = number % down(c) * H, image = number / down(c);
    }
};
using TileArea = Rectangle<TILE_W, TILE_H>;

// Whether the tile kernel left the group of the tile that holds a pixel.
DCNV4_DEVICE bool is_left(const Convolution& c, const unsigned char* left, int image, int row,
                          int column, int group) {
    return any_left<PARTS>(left,
                           (TileArea::number(c, image, row, column) * GROUPS + group) * PARTS);
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

// Calls `visit(slice, pixel)` for what the tile kernel left.
template <typename Visit>
DCNV4_DEVICE void each_left(const Convolution& c, const unsigned char* left, Visit visit) {
    ptx::wait_for_launch_before();
    const auto wanted = [&](unsigned index) {
        return any_left<TILE_PARTS>(left, index * TILE_PARTS);
    };
    each_wanted(TileArea::count(c), wanted, [&](unsigned index) {
        const TileArea tile(c, index);
#pragma unroll 1
        for (unsigned slice = threadIdx.x / LANES; slice < TILE_W * TILE_H * GROUPS;
             slice += blockDim.x / LANES) {
            const int group = slice % GROUPS, pixel = slice / GROUPS;
            int row = tile.row + pixel / TILE_W, column = tile.column + pixel % TILE_W;
            const bool active = row < c.out_height && column < c.out_width &&
                                any_left<PARTS>(left, (index * GROUPS + group) * PARTS);
            if (!__any_sync(~0u, active)) continue;
            if (!active) row = tile.row, column = tile.column;
            const OutputPixel at(c, tile.image, row, column);
            visit(Slice(active, at.pixel(c), group, threadIdx.x % LANES), at);
        }
    });
}

// Calls `visit(slice, pixel)` for the thread's slice or, after tiles, for those that were left.
template <typename Visit>
DCNV4_DEVICE void each_slice(const Convolution& c, const unsigned char* left, Visit visit) {
    if constexpr (AFTER_TILES) {
        each_left(c, left, visit);
    } else {
        const Slice slice(c.slices);
        visit(slice, OutputPixel(c, slice.pixel));
    }
}

}  // namespace dcnv4
