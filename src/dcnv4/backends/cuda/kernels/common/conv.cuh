// Where the points of deform_conv lie: the mirror of `conv_points` in geometry.py.
#pragma once

#include <common/slices.cuh>

namespace dcnv4 {

// The cells of the undeformed window are numbered columns outermost, and lie at whole pixels from
// its centre.
constexpr int CELLS = KERNEL_H * KERNEL_W;

// The cell of point k.
constexpr DCNV4_DEVICE int cell_of(int k) {
    return k + (REMOVE_CENTER && k >= KERNEL_W / 2 * KERNEL_H + KERNEL_H / 2);
}
constexpr DCNV4_DEVICE int cell_x(int cell) { return cell / KERNEL_H * DILATION_W - CENTER_W; }
constexpr DCNV4_DEVICE int cell_y(int cell) { return cell % KERNEL_H * DILATION_H - CENTER_H; }

// A table of cells, as a division for every point costs more; but constant memory is small.
constexpr bool TABULATED = CELLS <= 2048;
struct Grid {
    Sum x[TABULATED ? CELLS : 1], y[TABULATED ? CELLS : 1];

    constexpr __device__ Grid() : x(), y() {
        for (int cell = 0; TABULATED && cell < CELLS; ++cell) {
            x[cell] = cell_x(cell);
            y[cell] = cell_y(cell);
        }
    }
};
__constant__ constexpr Grid grid;

// An integer, or the number beside it that Sum holds.
DCNV4_DEVICE Sum round_up(int n) { return sizeof(Sum) == 8 ? Sum(n) : __int2float_ru(n); }
DCNV4_DEVICE Sum round_down(int n) { return sizeof(Sum) == 8 ? Sum(n) : __int2float_rd(n); }

// Along one axis, the pixel at the centre of a window, and the points of an image of `size` pixels
// as they are seen from there. Where Sum does not hold a bound exactly, 2^24 pixels away and more,
// the next number on the inner side takes its place.
struct Center {
    int pixel;
    Sum low, high;

    DCNV4_DEVICE Center(int pixel, int size)
        : pixel(pixel), low(round_up(-1 - pixel)), high(round_down(size - pixel)) {}
};

// The window of an output pixel, on an input image. A point lies a small number of pixels from its
// centre: what is added to an integer would lose precision.
struct OwnWindow {
    Center x, y;
    Sum scale;
    int height, width;

    DCNV4_DEVICE OwnWindow(const Arguments& a, int row, int column)
        : x(column * STRIDE_W - PADDING_W + CENTER_W, a.width),
          y(row * STRIDE_H - PADDING_H + CENTER_H, a.height),
          scale(a.offset_scale),
          height(a.height),
          width(a.width) {}

    DCNV4_DEVICE Corners<Sum> point(int k, Sum offset_x, Sum offset_y) const {
        const int cell = cell_of(k);
        const Sum from_x = scale * ((TABULATED ? grid.x[cell] : cell_x(cell)) + offset_x);
        const Sum from_y = scale * ((TABULATED ? grid.y[cell] : cell_y(cell)) + offset_y);
        const bool inside =
            (from_x > x.low) & (from_x < x.high) & (from_y > y.low) & (from_y < y.high);
        return corners(inside, x.pixel, y.pixel, from_x, from_y, height, width);
    }
};

// Image, row and column of an output pixel.
struct OutputPixel {
    Index image, in_image;
    int row, column;

    DCNV4_DEVICE OutputPixel(const Arguments& a, Index pixel) {
        const Index area = Index(a.out_height) * a.out_width;
        image = pixel / area;
        in_image = pixel - image * area;
        row = int(in_image / a.out_width);
        column = int(in_image - Index(row) * a.out_width);
    }
    DCNV4_DEVICE OutputPixel(const Arguments& a, int image, int row, int column)
        : image(image), in_image(Index(row) * a.out_width + column), row(row), column(column) {}

    // Its number among the output pixels of all images.
    DCNV4_DEVICE Index pixel(const Arguments& a) const {
        return image * a.out_height * a.out_width + in_image;
    }
};

// The points of a slice and, of a backward, where their gradients go.
struct ConvPoints {
    const OFFSET_MASK* offset_mask;  // 2K offsets, K weights
    OFFSET_MASK* grad_pixel;         // grad_offset_mask of the pixel
    OFFSET_MASK* grad_offset_mask;   // of the slice
    OwnWindow window;

    DCNV4_DEVICE ConvPoints(const Arguments& a, const OutputPixel& at, int group,
                            OFFSET_MASK* grad_pixel = nullptr)
        : offset_mask(a.offset_mask + at.image * a.offset_mask_image +
                      at.in_image * a.offset_mask_pixel + group * (3 * POINTS)),
          grad_pixel(grad_pixel),
          grad_offset_mask(grad_pixel + group * (3 * POINTS)),
          window(a, at.row, at.column) {}

    DCNV4_DEVICE Place locate(int k) const {
        const OFFSET_MASK* offset = offset_mask + 2 * k;
        return {window.point(k, load(offset), load(offset + 1)), 0, window.width};
    }
    DCNV4_DEVICE Sum logit(int k) const { return load(offset_mask + 2 * POINTS + k); }
};

}  // namespace dcnv4
