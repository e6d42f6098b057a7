// Tiles of output pixels as small dense products on tensor cores.
//
// A warp goes down a strip of tiles, each TILE_W x TILE_H output pixels of one group: pixel
// (column, row) in lane 4 * column + row. Offsets are small: where both numbers of one are less
// than REACH pixels, its point is NEAR, and all corners that near points sample lie in a window of
// WINDOW_W x WINDOW_H pixels. Let S, of [window positions, pixels], hold at every corner its share
// of the point's weight. Then
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
// the strip: `left` says so, and the kernel launched next computes the rest.
//
// The fragments of mma.m16n8k16: lane 4g+t holds rows g and g+8, columns 2t, 2t+1 and 8 more. So a
// quad of lanes owns the pixels of a column, and holds products of the same pixels.
#pragma once

#include "conv.cuh"

namespace dcnv4 {

constexpr int PIXELS = TILE_W * TILE_H;
constexpr int REACH = 2;
constexpr int PATCH_H = KERNEL_H + 2 * REACH;
constexpr int PAIRS = (KERNEL_W + 2 * REACH) / 2 + 1;
constexpr int WINDOW_W = 16, WINDOW_H = PATCH_H + TILE_H - 1;
constexpr int SAMPLED_W = TILE_W - 1 + KERNEL_W + 2 * REACH;  // columns of them that are sampled

static_assert(KERNEL_H <= 3 && KERNEL_W <= 3 && STRIDE_H * STRIDE_W * DILATION_H * DILATION_W == 1,
              "a patch must fit");
static_assert(DEPTH % 16 == 0 && sizeof(VALUE) == 2 && sizeof(FIELDS) == 2, "halves alone");

// Of the warps of a block, that share a window.
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

// Whether either half of any word is infinite or NaN.
template <int N>
DCNV4_DEVICE bool not_finite(const unsigned (&words)[N]) {
    constexpr unsigned exponents = Number<VALUE>::exponents, carry = 0x80008000u - exponents;
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) found |= (words[i] & exponents) + carry;
    return found & 0x80008000u;
}

// Where a strip lies, and the tile of it that its warp is at.
struct Tile {
    int image, row, column;  // of the tile's first output pixel
    int part, lane;          // part: of all channels, WIDE
    int height, width;       // of the output
    int begin, last;         // the strip's first row, and one past its last

    DCNV4_DEVICE Tile(const Convolution& c, unsigned strip)
        : lane(threadIdx.x % 32), height(c.out_height), width(c.out_width) {
        part = strip % TILE_PARTS;
        strip /= TILE_PARTS;
        column = strip % TileArea::across(c) * TILE_W;
        strip /= TileArea::across(c);
        row = begin = strip % c.strips * c.tiles * TILE_H;
        image = strip / c.strips;
        last = min(height, row + c.tiles * TILE_H);
    }
    // Notes that the tiles from row `end` on are left.
    DCNV4_DEVICE void leave(const Convolution& c, unsigned char* left, int end) const {
        for (int y = begin + lane * TILE_H; y < last; y += 32 * TILE_H)
            left[TileArea::number(c, image, y, column) * TILE_PARTS + part] = y >= end;
    }
    DCNV4_DEVICE bool has(int c, int r) const { return column + c < width && row + r < height; }
    // Of all pixels of the image.
    DCNV4_DEVICE int pixel(int c, int r) const { return (row + r) * width + column + c; }
};

// COUNT halves of every pixel of a tile, in shared memory: read and written coalesced. In memory
// pixels begin on whole 8 bytes, a group's numbers on any half. 0 for pixels outside the image.
template <int COUNT>
struct Staged {
    static constexpr int WORDS = (COUNT + 1) / 2;
    static constexpr int LEAST = (2 * COUNT + 6 + 7) / 8;  // pieces of 8 bytes
    static constexpr int PIECES = LEAST <= 4 ? 4 : LEAST <= 8 ? 8 : 16, PITCH = 8 * (LEAST | 1);
    unsigned char bytes[PIXELS * PITCH];

    // Halves of the first piece that come before the group's.
    static DCNV4_DEVICE int shift(int group) { return group * COUNT % 4; }

    // Where a pixel's numbers are, in the order of the lanes that own them.
    static DCNV4_DEVICE int at(int c, int r) { return (4 * c + r) * PITCH; }

    // SHARE lanes move a pixel's numbers together, then another's. `visit(at, number, there)`
    // for what a lane moves: where it is, where in memory, and whether there is any. `number`: the
    // first of these; `columns`: of the image, from its pixel on.
    template <int SHARE, typename T, typename Visit>
    static DCNV4_DEVICE void each(const Tile& tile, T* number, long long stride, int columns,
                                  Visit visit) {
        constexpr int AT_ONCE = 32 / SHARE;
        static_assert(AT_ONCE <= TILE_W, "rows begin together");
#pragma unroll
        for (int r = 0; r < TILE_H; ++r) {
            const bool has = tile.row + r < tile.height;
#pragma unroll
            for (int c = 0; c < TILE_W; c += AT_ONCE)
                visit(at(c, r) + at(tile.lane / SHARE, 0), number + c * stride, has && c < columns);
            number += tile.width * stride;
        }
    }

    // What a lane copies of tile after tile of a strip.
    struct Source {
        const FIELDS* number;  // the first of the next tile
        int columns;           // of the image, from its pixel on; none if it copies nothing

        // `image`: the image's first number; `stride`: from pixel to pixel.
        DCNV4_DEVICE Source(const Tile& tile, int group, const FIELDS* image, long long stride) {
            const int own = tile.lane / PIECES, piece = tile.lane % PIECES;
            number = image + tile.pixel(own, 0) * stride + group * COUNT / 4 * 4 + 4 * piece;
            columns = piece <= (shift(group) + COUNT - 1) / 4 ? tile.width - tile.column - own : 0;
            ptx::hold(columns);
        }
    };
    DCNV4_DEVICE void load(const Tile& tile, Source& source, long long stride) {
        const int piece = tile.lane % PIECES;
        if (LEAST == PIECES || piece < LEAST)
            each<PIECES>(tile, source.number, stride, source.columns,
                         [&](int at, const FIELDS* number, bool there) {
                             ptx::copy_async<8>(bytes + at + 8 * piece, number, there);
                         });
        source.number += TILE_H * tile.width * stride;
    }
    // Of the lane's own pixel.
    DCNV4_DEVICE void read(int lane, int group, unsigned (&words)[WORDS]) const {
        const int before = shift(group);
        const uint2* from = (const uint2*)(bytes + lane * PITCH);
        unsigned raw[2 * LEAST];
#pragma unroll
        for (int i = 0; i < LEAST; ++i) {
            const uint2 two = from[i];
            raw[2 * i] = two.x, raw[2 * i + 1] = two.y;
        }
#pragma unroll
        for (int i = 0; COUNT % 4 != 0 && i + 1 < 2 * LEAST; ++i)
            raw[i] = before / 2 ? raw[i + 1] : raw[i];
#pragma unroll
        for (int i = 0; i < WORDS; ++i)
            words[i] = COUNT % 2 ? __funnelshift_r(raw[i], raw[i + 1], before % 2 * 16) : raw[i];
    }
    // One of the numbers of any pixel.
    DCNV4_DEVICE Sum read(int c, int r, int group, int which) const {
        const FIELDS* of_pixel = (const FIELDS*)(bytes + at(c, r));
        const unsigned word = *(const unsigned short*)(of_pixel + shift(group) + which);
        return Number<FIELDS>::get(&word, 0);
    }
    // Writes those of the lane's own pixel to memory, with the warp.
    DCNV4_DEVICE void store(const Tile& tile, int group, const unsigned (&words)[WORDS],
                            FIELDS* image, long long stride) {
        constexpr int SHARE = WORDS < 16 ? 16 : 32;
        // In memory too the words are whole, but for a half shared with the group before or after.
        const int before = group * COUNT % 2, end = (before + COUNT) / 2;
        uint2* own = (uint2*)(bytes + tile.lane * PITCH);
        static_assert((WORDS + 2) / 2 * 8 <= PITCH, "with a half before");
#pragma unroll
        for (int i = 0; i <= WORDS; i += 2) {
            const unsigned first = i ? words[i ? i - 1 : 0] : 0;
            const unsigned second = i < WORDS ? words[i < WORDS ? i : 0] : 0;
            const unsigned third = i + 1 < WORDS ? words[i + 1 < WORDS ? i + 1 : 0] : 0;
            own[i / 2] = COUNT % 2 ? make_uint2(__funnelshift_l(first, second, before * 16),
                                                __funnelshift_l(second, third, before * 16))
                                   : make_uint2(second, third);
        }
        __syncwarp();
        FIELDS* first = image + tile.pixel(0, 0) * stride + group * COUNT / 2 * 2;
        const int word = tile.lane % SHARE, pixel = tile.lane / SHARE;
        each<SHARE>(tile, first + pixel * stride + 2 * word, stride,
                    word >= before && word < end ? tile.width - tile.column - pixel : 0,
                    [&](int at, FIELDS* number, bool there) {
                        ptx::store_if(there, number, *(const unsigned*)(bytes + at + 4 * word));
                    });
        const int c = tile.lane / 4, r = tile.lane % 4, half = before ? 1 : COUNT - 1;
        if (COUNT % 2 && tile.has(c, r))
            first[(r * tile.width + c) * stride + half] = ((const FIELDS*)own)[half];
    }
};

// The window of the value in shared memory, zeros outside the image: [WINDOW_H, WINDOW_W, COUNT]
// halves, in pieces of 8, swizzled so that 8 positions' blocks lie in different banks. The rows are
// a ring.
template <int COUNT>
struct Window {
    static constexpr int PIECES = COUNT / 8, ROW = WINDOW_W * COUNT * 2;
    static constexpr int SLOTS = (WINDOW_H + 1) / 2 * 2, AT_ONCE = 32 * WARPS / PIECES;
    unsigned char bytes[SLOTS * ROW];

    static DCNV4_DEVICE int at(int column, int piece) {
        int other = 0;
        if (PIECES == 2) other = column >> 2 & 1;
        if (PIECES == 4) other = (column >> 1 & 1) * 2 + (column >> 2 & 1);
        if (PIECES == 8) other = (column & 1) * 2 + (column >> 1 & 1) * 4 + (column >> 2 & 1);
        return column * (COUNT * 2) + (piece ^ other) * 16;
    }
    // Where a row of the window lies, from where its first does, in an even slot.
    static DCNV4_DEVICE int row(int first, int row) {
        const int even = first + row / 2 * 2 * ROW;
        return (even < SLOTS * ROW ? even : even - SLOTS * ROW) + row % 2 * ROW;
    }
    // What a thread of the block copies first of a window. `image`: the image's first such channel.
    // `stride`: bytes from pixel to pixel.
    static DCNV4_DEVICE const char* first(int left, int top, int width, const VALUE* image,
                                          Index stride) {
        const int column = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
        return (const char*)(image + 8 * piece) +
               ((long long)top * width + left + column) * (long long)stride;
    }
    // COUNT_ROWS rows of it, from `begin` on; `top`: the row of the image there. `from`: what a
    // thread copies first of them, then of those below them.
    template <int COUNT_ROWS>
    DCNV4_DEVICE void load(int first, int begin, int left, int top, int height, int width,
                           const char*& from, Index stride) {
#pragma unroll
        for (int r = 0; r < COUNT_ROWS; ++r) {
            const bool legal = unsigned(top + r) < unsigned(height);
#pragma unroll
            for (int i = 0; i < WINDOW_W / AT_ONCE; ++i) {
                const int column = i * AT_ONCE + threadIdx.x / PIECES;
                const bool there = unsigned(left + column) < unsigned(width) && column < SAMPLED_W;
                const int slot = at(column, threadIdx.x % PIECES) + row(first, begin + r);
                ptx::copy_async<16>(bytes + slot, from + i * AT_ONCE * (long long)stride,
                                    there && legal);
            }
            from += width * (long long)stride;
        }
    }
};

// S as the patches of the pixels, four words a row of each.
struct Patches {
    static constexpr int PLANE = PIXELS * 16;
    unsigned char bytes[PATCH_H * PLANE];

    // Words of a pixel: in different banks for eight columns.
    static DCNV4_DEVICE int at(int c, int r) { return (4 * c + (r ^ (c / 2))) * 16; }

    DCNV4_DEVICE void store(int lane, const unsigned (&patch)[PATCH_H][PAIRS]) {
        unsigned char* to = bytes + at(lane / 4, lane % 4);
#pragma unroll
        for (int row = 0; row < PATCH_H; ++row)
            *(uint4*)(to + row * PLANE) = make_uint4(patch[row][0], patch[row][1], patch[row][2],
                                                     PAIRS > 3 ? patch[row][PAIRS - 1] : 0);
    }
};
static_assert(PAIRS == 3 || PAIRS == 4, "a patch must fit");

// S as it is, for every row of the patches and every pixel the WINDOW_W halves of the window's row
// in two blocks of 8: for products that sum over pixels.
struct Spread {
    static constexpr int PLANE = PIXELS * WINDOW_W * 2;
    unsigned char bytes[PATCH_H * PLANE];
    uint4 zeros;

    // A block of a pixel: in different banks where eight columns' blocks are read, and where lanes
    // write a word of their own.
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
    // [positions, pixels] of one row of the window and two rows of the tile, the first 2 * m.
    DCNV4_DEVICE void read(int first, int row, int m, int lane, unsigned (&out)[4]) const {
        const void* from =
            bytes + (first ^ m * (4 * 16)) + (row - 2 * m) * PLANE + m * (4 * TILE_W * 16);
        // Of two rows of pixels, the window's row may lie in the patches of one.
        if (row == 2 * m) from = lane < 16 ? from : &zeros;
        if (row == 2 * m + PATCH_H) from = lane < 16 ? &zeros : from;
        ptx::load_blocks<true>(out, from);
    }
};

// Whether the patches of two rows of the tile, the first 2 * m, reach a row of the window.
constexpr DCNV4_DEVICE bool reaches(int row, int m) {
    return row >= 2 * m && row <= 2 * m + PATCH_H;
}

// Whether a point is near, from its offset, a pair of float16: numbers from 2 on, infinity and NaN
// have the exponent's highest bit.
DCNV4_DEVICE bool is_near(unsigned offset) { return !(offset & 0x40004000u); }
static_assert(REACH == 2, "as is_near says");

// The patch of a pixel in column c: `offsets` and `weights` are float16, those of near points.
DCNV4_DEVICE void fill(unsigned (&patch)[PATCH_H][PAIRS], int c, const unsigned (&offsets)[POINTS],
                       const unsigned (&weights)[(POINTS + 1) / 2]) {
    // The columns of a pair of the patch, from a point's undeformed one. The patch of an odd pixel
    // begins a column earlier.
    unsigned columns[2 * REACH + 3];
#pragma unroll
    for (int i = 0; i < 2 * REACH + 3; ++i)
        columns[i] = c % 2 ? ptx::two_f16(i - 2 - REACH, i - 1 - REACH)
                           : ptx::two_f16(i - 1 - REACH, i - REACH);
#pragma unroll
    for (int row = 0; row < PATCH_H; ++row)
#pragma unroll
        for (int q = 0; q < PAIRS; ++q) patch[row][q] = 0;
#pragma unroll
    for (int k = 0; k < POINTS; ++k) {
        const int i = cell_of(k) / KERNEL_H, j = cell_of(k) % KERNEL_H;
        const unsigned x = ptx::lower_twice(offsets[k]), y = ptx::upper_twice(offsets[k]);
        const unsigned weight =
            k % 2 ? ptx::upper_twice(weights[k / 2]) : ptx::lower_twice(weights[k / 2]);
        unsigned rows[REACH + 1];
#pragma unroll
        for (int r = 0; r <= REACH; ++r)
            rows[r] = ptx::multiply_f16x2(
                weight, ptx::hat_f16x2(ptx::two_f16(2 * r - REACH, 2 * r + 1 - REACH), y));
#pragma unroll
        for (int q = i / 2; q <= (i + 2 * REACH + 1) / 2; ++q) {
            const unsigned column = ptx::hat_f16x2(columns[2 * q - i + 1], x);
#pragma unroll
            for (int r = 0; r <= 2 * REACH; ++r) {
                const unsigned row =
                    r % 2 ? ptx::upper_twice(rows[r / 2]) : ptx::lower_twice(rows[r / 2]);
                patch[j + r][q] = ptx::multiply_add_f16x2(row, column, patch[j + r][q]);
            }
        }
    }
}

}  // namespace dcnv4
