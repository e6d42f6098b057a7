// deform_conv by tiles: see tile.cuh.
//
// Work: a warp a strip, WIDE channels of a group; those of a block end together.
// Memory: every offset and weight once, every output once, the value once and what neighbouring
// strips share, WINDOW_W / TILE_W times in all.
// Limit: shared memory and L1 do 67 % of what they can on an H100, L2 62 %, issue slots 60 %, with
// 15 warps a multiprocessor.
#include "conv.cuh"
#include "conv_tile.cuh"

using namespace dcnv4;

using Arguments = ForwardArguments;
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the structure must be what Python packs");

constexpr int MOST_FAR = 14;

// What a block keeps in shared memory; its warps have neighbouring channels, all in the window.
using Rows = Window<WIDE * WARPS>;
struct __align__(128) Shared {
    Rows window;
    struct {
        Patches patches;
        Fields fields;
    } of_warp[WARPS];
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, (WIDE == 16 ? 16 : 12) / WARPS)
    conv_tile_forward(Arguments a) {
    __shared__ Shared shared;
    const Convolution& c = a.c;
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Patches& patches = shared.of_warp[warp].patches;
    Fields& staged = shared.of_warp[warp].fields;
    // A row of a patch, four words, lies in the first or in the second half of the window: a lane's
    // word is in the first.
    const bool in_first = t >= g / 2;
    int own_word = Patches::at(g, 0) + (t - g / 2 & 3) * 4, values[WIDE / 16];
    ptx::hold(own_word);
#pragma unroll
    for (int i = 0; i < WIDE / 16; ++i) {
        values[i] = Rows::at(lane % 16, warp * (WIDE / 8) + 2 * i + lane / 16);
        ptx::hold(values[i]);
    }
    // Blocks stride over strips, one a warp at once. A tile's offsets and weights are on their way
    // while the one before is computed, in the next strip too.
    const unsigned strips = c.images * c.strips * TileArea::across(c) * TILE_PARTS;
    const auto source_of = [&](const Tile& of) {
        return Fields::Source(of, of.part / PARTS, a.fields + of.image * c.fields_image,
                              c.fields_pixel);
    };
    const unsigned step = gridDim.x * WARPS;
    unsigned strip = blockIdx.x * WARPS + warp, skipped = 0;
    Tile tile(c, strip);
    Fields::Source fields = source_of(tile);
    staged.load(tile, fields, c.fields_pixel);
    ptx::end_group();
#pragma unroll 1
    while (strip < strips) {
        const int group = tile.part / PARTS;
        const VALUE* image = a.value + tile.image * c.value_image;
        const int left = tile.column - PADDING_W - REACH, above = PADDING_H + REACH;
        // What the thread copies or stores first of the next tile.
        const char* window = Rows::first(left, tile.row - above, c.width,
                                         image + (tile.part - warp) * WIDE, c.stride);
        const long long pixel =
            (long long)tile.image * c.out_height * c.out_width + tile.pixel(g, 0);
        VALUE* output =
            a.output + (pixel * TILE_PARTS + tile.part) * WIDE + t % 2 * 8 + t / 2 * 4;
        int limit = tile.last;  // of the rows that this kernel computes
        int first = 0;          // where the window begins in the ring
        bool ends = false;      // before its last row
        Tile next = tile;
#pragma unroll 1
        for (; tile.row < tile.last; tile.row += TILE_H) {
            ptx::wait_for_groups<0>();
            __syncwarp();
            const Own own(staged, lane, group);
            // All warps of the block have read the window before.
            ends = any_of_block(limit != tile.last || !own.fits || own.count > MOST_FAR);
            if (ends) break;
            if (tile.row == tile.begin) {
                shared.window.load<WINDOW_H>(0, 0, left, tile.row - above, c.height, c.width,
                                             window, c.stride);
            } else {
                first = Rows::row(first, TILE_H);
                shared.window.load<TILE_H>(first, WINDOW_H - TILE_H, left,
                                           tile.row - above + WINDOW_H - TILE_H, c.height, c.width,
                                           window, c.stride);
            }
            ptx::end_group();
            // S' V: sums of the pixels of column g, in rows 2m and 2m + 1.
            float sum[2][WIDE / 8][4] = {};
            if (own.count) {
                const auto visit = [&](bool some, int r, int, Sum weight, const Corners<Sum>& at) {
                    if (!some) return;
                    Sum share[4], term[WIDE / 8][2] = {};
                    legal_coefficients(at, weight, share);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (!(at.legal >> i & 1)) continue;
                        const int where = (at.row + i / 2) * c.width + at.column + i % 2;
                        const VALUE* corner =
                            dcnv4::at(image + tile.part * WIDE + 2 * t, where, c.stride);
#pragma unroll
                        for (int n = 0; n < WIDE / 8; ++n) {
                            const auto pair = Vector<VALUE, 2>::load(corner + 8 * n);
#pragma unroll
                            for (int v = 0; v < 2; ++v) term[n][v] += share[i] * pair[v];
                        }
                    }
#pragma unroll
                    for (int n = 0; n < WIDE / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 8; ++i)
                            if (r == i / 2) sum[i / 4][n][i % 4] += term[n][i % 2];
                };
                each_far(c, own, tile, group, staged, visit);
                __syncwarp();
            }
            next.row += TILE_H;
            if (next.row >= tile.last) {
                strip += step, skipped = 0;
                next = Tile(c, strip);
                fields = source_of(next);
            }
            if (strip < strips) staged.load(next, fields, c.fields_pixel);
            build(patches, own, lane);
            ptx::end_group();
            ptx::wait_for_groups<1>();
            meet_block();
#pragma unroll
            for (int row = 0; row < WINDOW_H; ++row) {
                const unsigned char* of_row = shared.window.bytes + Rows::row(first, row);
                unsigned value[WIDE / 16][4];
#pragma unroll
                for (int i = 0; i < WIDE / 16; ++i)
                    ptx::load_blocks<true>(value[i], of_row + values[i]);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    if (!reaches(row, m)) continue;
                    unsigned shares[4];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int r = 2 * m + i, plane = row - r;
                        const unsigned word =
                            plane < 0 || plane >= PATCH_H
                                ? 0
                                : *(const unsigned*)(patches.bytes + (own_word ^ r * 16) +
                                                     plane * Patches::PLANE);
                        shares[i] = in_first ? word : 0, shares[2 + i] = in_first ? 0 : word;
                    }
#pragma unroll
                    for (int n = 0; n < WIDE / 8; ++n)
                        Number<VALUE>::mma(sum[m][n], shares, value[n / 2][n % 2 * 2],
                                           value[n / 2][n % 2 * 2 + 1]);
                }
            }
            // What is not finite in the window has spoilt pixels that do not sample it.
            unsigned pairs[TILE_H][WIDE / 8], odd = 0;
#pragma unroll
            for (int r = 0; r < TILE_H; ++r)
#pragma unroll
                for (int n = 0; n < WIDE / 8; ++n) {
                    Number<VALUE>::set(&pairs[r][n], 0, sum[r / 2][n][r % 2 * 2]);
                    Number<VALUE>::set(&pairs[r][n], 1, sum[r / 2][n][r % 2 * 2 + 1]);
                    odd = Number<VALUE>::multiply_add(0, pairs[r][n], odd);
                }
            if (__any_sync(~0u, odd & 0x7fff7fff)) {
                limit = tile.row;
            } else {
#pragma unroll
                for (int r = 0; r < TILE_H; ++r) {
#pragma unroll
                    for (int n = 0; n < WIDE / 8; n += 2) {
                        // Of two eights of channels, neighbours take one each: four side by side.
                        const unsigned first = pairs[r][n], second = pairs[r][n + 1];
                        const unsigned other = __shfl_xor_sync(~0u, t % 2 ? first : second, 1);
                        Vector<VALUE, 4> four;
                        four.word[0] = t % 2 ? other : first, four.word[1] = t % 2 ? second : other;
                        if (tile.has(g, r)) four.store(output + 8 * n);
                    }
                    output += (long long)c.out_width * (GROUPS * DEPTH);
                }
            }
        }
        tile.leave(c, a.left, min(limit, tile.row));
        if (ends) {
            // Where strips end, so may others: some are left without a look, more and more.
            skipped = 2 * skipped + 1;
            strip += step;
            for (unsigned i = 0; i < skipped && strip < strips; ++i, strip += step) {
                const Tile other(c, strip);
                other.leave(c, a.left, other.begin);
            }
            next = Tile(c, strip);
            fields = source_of(next);
            if (strip < strips) staged.load(next, fields, c.fields_pixel);
            ptx::end_group();
        }
        tile = next;
    }
    ptx::let_next_launch_begin();
}
