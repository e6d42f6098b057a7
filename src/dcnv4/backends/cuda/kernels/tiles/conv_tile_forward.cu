// deform_conv by tiles: see tile.cuh.
//
// Work: a warp a strip, STRIP_CHANNELS channels of a group; those of a block end together.
// Memory: every offset and weight once, every output once, the value once and what neighbouring
// strips share, WINDOW_W / TILE_W times in all.
// Limit: shared memory and L1 do 67 % of what they can on an H100, L2 62 %, issue slots 60 %, with
// 15 warps an SM.
#include <tiles/points.cuh>

using namespace dcnv4;

constexpr int MOST_FAR = 14;

// What a block keeps in shared memory; its warps have neighbouring channels, all in the window.
using ValueWindow = HaloWindow<STRIP_CHANNELS * WARPS>;
struct __align__(128) Shared {
    ValueWindow window;
    struct {
        Patches patches;
        StagedPoints staged;
    } of_warp[WARPS];
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_PER_SM)
    conv_tile_forward(Arguments a) {
    __shared__ Shared shared;
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Patches& patches = shared.of_warp[warp].patches;
    StagedPoints& staged = shared.of_warp[warp].staged;
    // A row of a patch, four words, lies in the first or in the second half of the window: a lane's
    // word is in the first. A fifth is in the second.
    const bool in_first = t >= g / 2;
    int own_word = Patches::at(g, 0) + (t - g / 2 & 3) * 4, values[STRIP_CHANNELS / 16];
    ptx::hold(own_word);
#pragma unroll
    for (int i = 0; i < STRIP_CHANNELS / 16; ++i) {
        values[i] = ValueWindow::at(lane % 16, warp * (STRIP_CHANNELS / 8) + 2 * i + lane / 16);
        ptx::hold(values[i]);
    }
    // Blocks stride over strips, one a warp at once. A tile's offsets and weights are on their way
    // while the one before is computed, in the next strip too.
    const unsigned strips = a.images * a.strips * TileArea::across(a) * TILE_PARTS;
    const auto source_of = [&](const Tile& of) {
        return StagedPoints::Source(of, of.part / PARTS,
                                    a.offset_mask + of.image * a.offset_mask_image,
                                    a.offset_mask_pixel);
    };
    const unsigned step = gridDim.x * WARPS;
    unsigned strip = blockIdx.x * WARPS + warp, skipped = 0;
    Tile tile(a, strip);
    StagedPoints::Source source = source_of(tile);
    staged.load(tile, source, a.offset_mask_pixel);
    ptx::cp_async_commit();
#pragma unroll 1
    while (strip < strips) {
        const int group = tile.part / PARTS;
        const VALUE* image = a.value + tile.image * a.value_image;
        const int left = tile.column - LEFT;
        // What the thread copies or stores first of the next tile.
        const char* window =
            ValueWindow::first(left, tile.row - ABOVE, a.width,
                        image + (tile.part - warp) * STRIP_CHANNELS, a.pixel_bytes);
        const long long pixel =
            (long long)tile.image * a.out_height * a.out_width + tile.pixel(g, 0);
        VALUE* output =
            a.output + (pixel * TILE_PARTS + tile.part) * STRIP_CHANNELS + t % 2 * 8 + t / 2 * 4;
        int limit = tile.last;  // of the rows that this kernel computes
        int first = 0;          // where the window begins in the ring
        bool ends = false;      // before its last row
        Tile next = tile;
#pragma unroll 1
        for (; tile.row < tile.last; tile.row += TILE_H) {
            ptx::cp_async_wait<0>();
            __syncwarp();
            const OwnPixel own(staged, lane, group);
            // All warps of the block have read the window before.
            ends = any_of_block(limit != tile.last || !own.fits || own.count > MOST_FAR);
            if (ends) break;
            if (tile.row == tile.begin) {
                shared.window.load<WINDOW_H>(0, 0, left, tile.row - ABOVE, a.height, a.width,
                                             window, a.pixel_bytes);
            } else {
                first = ValueWindow::row(first, TILE_H);
                shared.window.load<TILE_H>(first, WINDOW_H - TILE_H, left,
                                           tile.row - ABOVE + WINDOW_H - TILE_H, a.height, a.width,
                                           window, a.pixel_bytes);
            }
            ptx::cp_async_commit();
            // S' V: sums of the pixels of column g, in rows 2m and 2m + 1.
            float sum[2][STRIP_CHANNELS / 8][4] = {};
            if (own.count) {
                // What a far point adds to its pixel's channels.
                const auto visit = [&](bool some, int r, int, Sum weight, const Corners<Sum>& at) {
                    if (!some) return;
                    Sum share[4], term[STRIP_CHANNELS / 8][2] = {};
                    legal_coefficients(at, weight, share);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (!(at.legal >> i & 1)) continue;
                        const int where = (at.row + i / 2) * a.width + at.column + i % 2;
                        const VALUE* corner = dcnv4::at(image + tile.part * STRIP_CHANNELS + 2 * t,
                                                        where, a.pixel_bytes);
#pragma unroll
                        for (int n = 0; n < STRIP_CHANNELS / 8; ++n) {
                            const auto pair = Vector<VALUE, 2>::load(corner + 8 * n);
#pragma unroll
                            for (int v = 0; v < 2; ++v) term[n][v] += share[i] * pair[v];
                        }
                    }
#pragma unroll
                    for (int n = 0; n < STRIP_CHANNELS / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 8; ++i)
                            if (r == i / 2) sum[i / 4][n][i % 4] += term[n][i % 2];
                };
                each_far(a, own, tile, group, staged, visit);
                __syncwarp();
            }
            next.row += TILE_H;
            if (next.row >= tile.last) {
                strip += step, skipped = 0;
                next = Tile(a, strip);
                source = source_of(next);
            }
            if (strip < strips) staged.load(next, source, a.offset_mask_pixel);
            build(patches, own, lane);
            ptx::cp_async_commit();
            ptx::cp_async_wait<1>();
            meet_block();
#pragma unroll
            for (int row = 0; row < WINDOW_H; ++row) {
                const unsigned char* of_row = shared.window.bytes + ValueWindow::row(first, row);
                unsigned value[STRIP_CHANNELS / 16][4];
#pragma unroll
                for (int i = 0; i < STRIP_CHANNELS / 16; ++i)
                    ptx::ldmatrix<true>(value[i], of_row + values[i]);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    if (!reaches(row, m)) continue;
                    unsigned shares[4];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int r = 2 * m + i, plane = row - r;
                        const bool there = plane >= 0 && plane < PATCH_H;
                        const unsigned char* of_plane = patches.bytes + plane * Patches::PLANE;
                        const unsigned word =
                            there ? *(const unsigned*)(of_plane + (own_word ^ r * 16)) : 0;
                        const unsigned fifth =
                            PAIRS > 4 && there && t == g / 2
                                ? *(const unsigned*)(of_plane + Patches::FIFTHS + (4 * g + r) * 4)
                                : 0;
                        shares[i] = in_first ? word : 0, shares[2 + i] = in_first ? fifth : word;
                    }
#pragma unroll
                    for (int n = 0; n < STRIP_CHANNELS / 8; ++n)
                        Number<VALUE>::mma_m16n8k16(sum[m][n], shares, value[n / 2][n % 2 * 2],
                                                    value[n / 2][n % 2 * 2 + 1]);
                }
            }
            // What is not finite in the window has spoilt pixels that do not sample it.
            unsigned pairs[TILE_H][STRIP_CHANNELS / 8], odd = 0;
#pragma unroll
            for (int r = 0; r < TILE_H; ++r)
#pragma unroll
                for (int n = 0; n < STRIP_CHANNELS / 8; ++n) {
                    Number<VALUE>::set(&pairs[r][n], 0, sum[r / 2][n][r % 2 * 2]);
                    Number<VALUE>::set(&pairs[r][n], 1, sum[r / 2][n][r % 2 * 2 + 1]);
                    odd = Number<VALUE>::fma(0, pairs[r][n], odd);
                }
            if (__any_sync(~0u, odd & 0x7fff7fff)) {
                limit = tile.row;
            } else {
#pragma unroll
                for (int r = 0; r < TILE_H; ++r) {
#pragma unroll
                    for (int n = 0; n < STRIP_CHANNELS / 8; n += 2) {
                        // Of two eights of channels, neighbours take one each: four side by side.
                        const unsigned first = pairs[r][n], second = pairs[r][n + 1];
                        const unsigned other = __shfl_xor_sync(~0u, t % 2 ? first : second, 1);
                        Vector<VALUE, 4> four;
                        four.word[0] = t % 2 ? other : first, four.word[1] = t % 2 ? second : other;
                        if (tile.has(g, r)) four.store(output + 8 * n);
                    }
                    output += (long long)a.out_width * (GROUPS * DEPTH);
                }
            }
        }
        tile.leave(a, min(limit, tile.row));
        if (ends) {
            // Where strips end, so may others: some are left without a look, more and more.
            skipped = 2 * skipped + 1;
            strip += step;
            for (unsigned i = 0; i < skipped && strip < strips; ++i, strip += step) {
                const Tile other(a, strip);
                other.leave(a, other.begin);
            }
            next = Tile(a, strip);
            source = source_of(next);
            if (strip < strips) staged.load(next, source, a.offset_mask_pixel);
            ptx::cp_async_commit();
        }
        tile = next;
    }
    ptx::griddepcontrol_launch_dependents();
}
