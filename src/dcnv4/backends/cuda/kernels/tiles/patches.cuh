// S, as its nonzero patches, and what builds them.
#pragma once

#include <tiles/tile.cuh>

namespace dcnv4 {

// S as the patches of the pixels, four words a row of each, and of wide ones a fifth behind all.
struct Patches {
    static constexpr int FIFTHS = PIXELS * 16, PLANE = FIFTHS + (PAIRS > 4 ? PIXELS * 4 : 0);
    unsigned char bytes[PATCH_H * PLANE];

    // Where the words of a pixel lie. Without the XOR, columns two apart, of 64 bytes each, would
    // share banks.
    static DCNV4_DEVICE int at(int c, int r) { return (4 * c + (r ^ (c / 2))) * 16; }

    DCNV4_DEVICE void store(int lane, const unsigned (&patch)[PATCH_H][PAIRS]) {
        unsigned char* to = bytes + at(lane / 4, lane % 4);
#pragma unroll
        for (int row = 0; row < PATCH_H; ++row) {
            *(uint4*)(to + row * PLANE) = make_uint4(patch[row][0], patch[row][1], patch[row][2],
                                                     PAIRS > 3 ? patch[row][PAIRS > 3 ? 3 : 0] : 0);
            if (PAIRS > 4)
                *(unsigned*)(bytes + row * PLANE + FIFTHS + lane * 4) = patch[row][PAIRS - 1];
        }
    }
};
static_assert(PAIRS >= 3 && PAIRS <= 5, "a patch must fit");

// S as it is, for every row of the patches and every pixel the WINDOW_W halves of the window's row
// in two blocks of 8: for products that sum over pixels.
struct Spread {
    static constexpr int PLANE = PIXELS * WINDOW_W * 2;
    unsigned char bytes[PATCH_H * PLANE];
    uint4 zeros;

    // Where a block of a pixel lies. The XOR puts blocks into different banks where those of eight
    // columns are read, and where lanes write a word of their own.
    static DCNV4_DEVICE int at(int c, int r, int half) {
        return (2 * r + half) * (TILE_W * 16) + (c ^ 2 * r) * 16;
    }
    DCNV4_DEVICE void store(int lane, const unsigned (&patch)[PATCH_H][PAIRS]) {
        const int c = lane / 4, r = lane % 4;
#pragma unroll
        for (int pair = 0; pair < WINDOW_W / 2; ++pair) {
            const int where = (c / 2 + pair) % (WINDOW_W / 2);
            unsigned char* to = bytes + at(c, r, where / 4) + where % 4 * 4;
#pragma unroll
            for (int row = 0; row < PATCH_H; ++row)
                *(unsigned*)(to + row * PLANE) =
                    pair < PAIRS ? patch[row][pair < PAIRS ? pair : 0] : 0;
        }
        if (lane == 0) zeros = make_uint4(0, 0, 0, 0);
    }
    // Where a lane's part of what `read` reads lies, in row 0 for m = 0.
    static DCNV4_DEVICE int first(int lane) {
        const int block = lane / 8, r = block / 2;
        return at(lane % 8, r, block % 2) - r * PLANE;
    }
    // Reads [positions, pixels] of one row of the window and two rows of the tile, from 2 * m on.
    DCNV4_DEVICE void read(int first, int row, int m, int lane, unsigned (&out)[4]) const {
        const void* from =
            bytes + (first ^ m * (4 * 16)) + (row - 2 * m) * PLANE + m * (4 * TILE_W * 16);
        // Of two rows of pixels, the window's row may lie in the patches of one.
        if (row == 2 * m) from = lane < 16 ? from : &zeros;
        if (row == 2 * m + PATCH_H) from = lane < 16 ? &zeros : from;
        ptx::ldmatrix<true>(out, from);
    }
};

// Whether the patches of two rows of the tile, from 2 * m on, reach a row of the window.
constexpr DCNV4_DEVICE bool reaches(int row, int m) {
    return row >= 2 * m && row <= 2 * m + PATCH_H;
}

// So many steps, in pixels, as float16.
constexpr DCNV4_DEVICE unsigned steps_as_f16(int steps) {
    const unsigned magnitude = steps < 0 ? -steps : steps;
    if (magnitude == 0) return 0;
    int exponent = 0, of_pixel = 0;
    while (magnitude >> exponent > 1) ++exponent;
    while (PIXEL_STEPS >> of_pixel > 1) ++of_pixel;
    return (steps < 0 ? 0x8000u : 0u) | (exponent - of_pixel + 15) << 10 |
           (magnitude << 10 >> exponent & 0x3ff);
}
constexpr DCNV4_DEVICE unsigned steps_as_f16x2(int lower, int upper) {
    return steps_as_f16(lower) | steps_as_f16(upper) << 16;
}

// Where a point is from its home, with steps from there to its cell; `offset` is scaled.
DCNV4_DEVICE Sum from_home(Sum offset, int steps) {
    return steps ? offset + Sum(steps) / PIXEL_STEPS : offset;
}
// The same for both coordinates of point k, a pair of float16.
DCNV4_DEVICE unsigned from_home(unsigned offset, int k) {
    if (rest_x(k) == 0 && rest_y(k) == 0) return offset;
    return ptx::add_f16x2(offset, steps_as_f16x2(rest_x(k), rest_y(k)));
}
// Whether a point is near: numbers from 2 on, infinity and NaN have the exponent's highest bit.
DCNV4_DEVICE bool is_near(unsigned from_home) { return !(from_home & 0x40004000u); }
static_assert(REACH == 2, "as is_near says");

// The numbers of a row or column and of the next, each less so many steps.
DCNV4_DEVICE unsigned pair_from(int first, int steps) {
    return steps_as_f16x2(first * PIXEL_STEPS - steps, (first + 1) * PIXEL_STEPS - steps);
}

// Two columns of the patch of a pixel in column c, the first of them so many `after` a point's own:
// the patch of an odd pixel begins a column earlier.
DCNV4_DEVICE unsigned columns_of(int c, int after, int steps) {
    return c % 2 ? pair_from(after - REACH - 1, steps) : pair_from(after - REACH, steps);
}

// Makes the patch of a pixel in column c. `offsets` and `weights` are float16, 0 of far points. The
// steps to a cell are not added to an offset but taken from columns and rows, which hold the
// difference exactly.
DCNV4_DEVICE void fill(unsigned (&patch)[PATCH_H][PAIRS], int c, const unsigned (&offsets)[POINTS],
                       const unsigned (&weights)[(POINTS + 1) / 2]) {
#pragma unroll
    for (int row = 0; row < PATCH_H; ++row)
#pragma unroll
        for (int q = 0; q < PAIRS; ++q) patch[row][q] = 0;
#pragma unroll
    for (int k = 0; k < POINTS; ++k) {
        const int i = column_of(k), j = row_of(k);
        const unsigned x = ptx::lower_twice(offsets[k]), y = ptx::upper_twice(offsets[k]);
        const unsigned weight =
            k % 2 ? ptx::upper_twice(weights[k / 2]) : ptx::lower_twice(weights[k / 2]);
        unsigned rows[REACH + 1];
#pragma unroll
        for (int r = 0; r <= REACH; ++r)
            rows[r] = ptx::mul_f16x2(
                weight, ptx::hat_f16x2(pair_from(2 * r - REACH, rest_y(k)), y));
#pragma unroll
        for (int pair = 0; pair < REACH + 2; ++pair) {
            const int q = i / 2 + pair;
            if (q > (i + 2 * REACH + 1) / 2) break;
            const unsigned column = ptx::hat_f16x2(columns_of(c, 2 * q - i, rest_x(k)), x);
#pragma unroll
            for (int r = 0; r <= 2 * REACH; ++r) {
                const unsigned row =
                    r % 2 ? ptx::upper_twice(rows[r / 2]) : ptx::lower_twice(rows[r / 2]);
                patch[j + r][q] = ptx::fma_f16x2(row, column, patch[j + r][q]);
            }
        }
    }
}

}  // namespace dcnv4
