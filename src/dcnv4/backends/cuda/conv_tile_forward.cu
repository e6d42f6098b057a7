// deform_conv by tiles: see tile.cuh.
//
// Work: a warp a strip, WIDE channels of a group.
// Memory: every offset and weight once, every output once, the value once and what neighbouring
// strips share, WINDOW_W / TILE_W times in all.
// Limit: the traffic of L1 and shared memory, 65 % of what they can on an H100, then L2 and
// latency: 14 warps a multiprocessor.
#include "conv.cuh"
#include "conv_tile.cuh"

using namespace dcnv4;

using Arguments = ForwardArguments;
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the structure must be what Python packs");

constexpr int MOST_FAR = 3;

// What a block keeps in shared memory; its warps have neighbouring channels, all in the window.
struct __align__(128) Shared {
    Window<WIDE * WARPS> window;
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
    Tile tile(c.strips, GROUPS * PARTS, c.out_height, c.out_width);
    const int lane = tile.lane, g = lane / 4, t = lane % 4, group = tile.part / PARTS;
    const VALUE* image = a.value + tile.image * c.value_image;
    const VALUE* window_image = image + (tile.part - warp) * WIDE;
    const FIELDS* fields = a.fields + tile.image * c.fields_image;
    Patches& patches = shared.of_warp[warp].patches;
    Fields& staged = shared.of_warp[warp].fields;
    const int left = tile.column - PADDING_W - REACH, above = PADDING_H + REACH;
    // A row of a patch, four words, lies in the first or in the second half of the window: a lane's
    // word is in the first.
    const unsigned in_first = t >= g / 2 ? ~0u : 0;
    const unsigned char *words[TILE_H], *values[WIDE / 16];
#pragma unroll
    for (int r = 0; r < TILE_H; ++r)
        words[r] = patches.bytes + Patches::at(g, r) + (t - g / 2 & 3) * 4;
#pragma unroll
    for (int i = 0; i < WIDE / 16; ++i)
        values[i] = shared.window.bytes +
                    Window<WIDE * WARPS>::at(lane % 16, warp * (WIDE / 8) + 2 * i + lane / 16);

    staged.load(tile, group, fields, c.fields_pixel);
    ptx::end_group();
    shared.window.load<WINDOW_H>(0, left, tile.row - above, c.height, c.width, window_image,
                                 c.stride);
    ptx::end_group();
    int limit = tile.last;  // of the rows that this kernel computes
    int first = 0;          // row of the ring
    for (bool begun = false;; begun = true) {
        // All warps of the block have read the window.
        if (!any_of_block(tile.row < limit)) break;
        if (begun) {
            shared.window.load<TILE_H>(first, left, tile.row - above + WINDOW_H - TILE_H, c.height,
                                       c.width, window_image, c.stride);
            ptx::end_group();
            first = Window<WIDE * WARPS>::on(first, TILE_H);
        }
        ptx::wait_for_groups<1>();
        __syncwarp();
        // S' V: sums of the pixels of column g, in rows 2m and 2m + 1.
        float sum[2][WIDE / 8][4] = {};
        if (tile.row < limit) {
            const Own own(staged, lane, group);
            if (!own.fits || own.count > MOST_FAR) limit = tile.row;
            const auto visit = [&](bool some, int r, int k, Sum weight, const Corners<Sum>& at) {
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
            if (own.count && tile.row < limit) each_far(c, own, tile, group, staged, visit);
            __syncwarp();
            Tile next = tile;
            next.row += TILE_H;
            if (next.row < limit) staged.load(next, group, fields, c.fields_pixel);
            build(patches, own, lane);
        }
        ptx::end_group();
        ptx::wait_for_groups<1>();
        meet_block();
        if (tile.row < limit) {
#pragma unroll
            for (int row = 0; row < WINDOW_H; ++row) {
                const int at_row = Window<WIDE * WARPS>::row(first, row);
                unsigned value[WIDE / 16][4];
#pragma unroll
                for (int i = 0; i < WIDE / 16; ++i)
                    ptx::load_blocks<true>(value[i], values[i] + at_row);
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
                                : *(const unsigned*)(words[r] + plane * Patches::PLANE);
                        shares[i] = word & in_first, shares[2 + i] = word & ~in_first;
                    }
#pragma unroll
                    for (int n = 0; n < WIDE / 8; ++n)
                        Number<VALUE>::mma(sum[m][n], shares, value[n / 2][n % 2 * 2],
                                           value[n / 2][n % 2 * 2 + 1]);
                }
            }
            // What is not finite in the window has spoilt pixels that do not sample it.
            float odd = 0;
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int n = 0; n < WIDE / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) odd += 0 * sum[m][n][i];
            if (__any_sync(~0u, odd != 0)) limit = tile.row;
        }
        if (tile.row < limit) {
            const long long pixel =
                (long long)tile.image * c.out_height * c.out_width + tile.pixel(g, 0);
            VALUE* output =
                a.output + (pixel * (GROUPS * PARTS) + tile.part) * WIDE + t % 2 * 8 + t / 2 * 4;
#pragma unroll
            for (int r = 0; r < TILE_H; ++r) {
#pragma unroll
                for (int n = 0; n < WIDE / 8; n += 2) {
                    // Of two eights of channels, neighbours take one each: four side by side.
                    unsigned pair[2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        Number<VALUE>::set(&pair[i], 0, sum[r / 2][n + i][r % 2 * 2]);
                        Number<VALUE>::set(&pair[i], 1, sum[r / 2][n + i][r % 2 * 2 + 1]);
                    }
                    const unsigned other = __shfl_xor_sync(~0u, t % 2 ? pair[0] : pair[1], 1);
                    Vector<VALUE, 4> four;
                    four.word[0] = t % 2 ? other : pair[0], four.word[1] = t % 2 ? pair[1] : other;
                    if (tile.has(g, r)) four.store(output + 8 * n);
                }
                output += (long long)c.out_width * (GROUPS * DEPTH);
            }
        }
        tile.row += TILE_H;
    }
    ptx::wait_for_groups<0>();
    if (lane == 0) a.limits[tile.strip] = limit;
    ptx::let_next_launch_begin();
}
