// What tiles keep in shared memory of offset_mask and of the value, copied while they compute the
// tile before.
#pragma once

#include <tiles/tile.cuh>

namespace dcnv4 {

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

    // SHARE lanes move a pixel's numbers together, then another's. Calls `visit(at, number, there)`
    // for what a lane moves: where it is here, where in memory, and whether there is any. The lane
    // begins at `number`, whose pixel and those to its right are `columns` of the image.
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
        const OFFSET_MASK* number;  // the first of the next tile
        int columns;                // of the image, from its pixel on; none if it copies nothing

        // `image` is the image's first number, `stride` leads from pixel to pixel.
        DCNV4_DEVICE Source(const Tile& tile, int group, const OFFSET_MASK* image,
                            long long stride) {
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
                         [&](int at, const OFFSET_MASK* number, bool there) {
                             ptx::cp_async<8>(bytes + at + 8 * piece, number, there);
                         });
        source.number += TILE_H * tile.width * stride;
    }
    // Reads the numbers of the lane's own pixel.
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
    // Reads one of the numbers of any pixel.
    DCNV4_DEVICE Sum read(int c, int r, int group, int which) const {
        const OFFSET_MASK* of_pixel = (const OFFSET_MASK*)(bytes + at(c, r));
        const unsigned word = *(const unsigned short*)(of_pixel + shift(group) + which);
        return Number<OFFSET_MASK>::get(&word, 0);
    }
    // Writes `words`, the numbers of the lane's own pixel, to memory, with the warp.
    DCNV4_DEVICE void store(const Tile& tile, int group, const unsigned (&words)[WORDS],
                            OFFSET_MASK* image, long long stride) {
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
        OFFSET_MASK* first = image + tile.pixel(0, 0) * stride + group * COUNT / 2 * 2;
        const int word = tile.lane % SHARE, pixel = tile.lane / SHARE;
        each<SHARE>(tile, first + pixel * stride + 2 * word, stride,
                    word >= before && word < end ? tile.width - tile.column - pixel : 0,
                    [&](int at, OFFSET_MASK* number, bool there) {
                        ptx::st_if(there, number, *(const unsigned*)(bytes + at + 4 * word));
                    });
        const int c = tile.lane / 4, r = tile.lane % 4, half = before ? 1 : COUNT - 1;
        if (COUNT % 2 && tile.has(c, r))
            first[(r * tile.width + c) * stride + half] = ((const OFFSET_MASK*)own)[half];
    }
};

// The window of the value in shared memory, zeros outside the image: [WINDOW_H, WINDOW_W, COUNT]
// halves, in pieces of 8, swizzled so that 8 positions' blocks lie in different banks. The rows are
// a ring.
template <int COUNT>
struct HaloWindow {
    static constexpr int PIECES = COUNT / 8, ROW = WINDOW_W * COUNT * 2;
    static constexpr int SLOTS = (WINDOW_H + 1) / 2 * 2, AT_ONCE = 32 * WARPS / PIECES;
    // Copies of a row, and one more where columns that are sampled are left.
    static constexpr int COPIES = WINDOW_W / AT_ONCE;
    static constexpr int REST = COPIES * AT_ONCE < SAMPLED_W;
    unsigned char bytes[SLOTS * ROW];

    static DCNV4_DEVICE int at(int column, int piece) {
        int other = 0;
        if (PIECES == 2) other = column >> 2 & 1;
        if (PIECES == 4) other = (column >> 1 & 1) * 2 + (column >> 2 & 1);
        if (PIECES == 8) other = (column & 1) * 2 + (column >> 1 & 1) * 4 + (column >> 2 & 1);
        return column * (COUNT * 2) + (piece ^ other) * 16;
    }
    // Where a row of the window lies, whose first row lies at `first`, in an even slot.
    static DCNV4_DEVICE int row(int first, int row) {
        const int even = first + row / 2 * 2 * ROW;
        return (even < SLOTS * ROW ? even : even - SLOTS * ROW) + row % 2 * ROW;
    }
    // What a thread of the block copies first of a window. `image` is the image's first channel of
    // these, `stride` the bytes from pixel to pixel.
    static DCNV4_DEVICE const char* first(int left, int top, int width, const VALUE* image,
                                          Index stride) {
        const int column = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
        return (const char*)(image + 8 * piece) +
               ((long long)top * width + left + column) * (long long)stride;
    }
    // Copies COUNT_ROWS rows of the window from row `begin` on, which is row `top` of the image.
    // `from` is what a thread copies first of them, and then of the rows below.
    template <int COUNT_ROWS>
    DCNV4_DEVICE void load(int first, int begin, int left, int top, int height, int width,
                           const char*& from, Index stride) {
#pragma unroll
        for (int r = 0; r < COUNT_ROWS; ++r) {
            const bool legal = unsigned(top + r) < unsigned(height);
#pragma unroll
            for (int i = 0; i < COPIES + REST; ++i) {
                const int column = i * AT_ONCE + threadIdx.x / PIECES;
                if (i == COPIES && column >= WINDOW_W) continue;
                const bool there = unsigned(left + column) < unsigned(width) && column < SAMPLED_W;
                const int slot = at(column, threadIdx.x % PIECES) + row(first, begin + r);
                ptx::cp_async<16>(bytes + slot, from + i * AT_ONCE * (long long)stride,
                                  there && legal);
            }
            from += width * (long long)stride;
        }
    }
};

}  // namespace dcnv4
