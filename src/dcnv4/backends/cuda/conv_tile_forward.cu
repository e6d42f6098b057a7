// deform_conv by tiles: see tile.cuh.
#include "conv_forward.cuh"
#include "conv_tile.cuh"

using namespace dcnv4;

constexpr int WIDE = DEPTH % 32 ? 16 : 32;  // channels at a time

// What a warp keeps in shared memory.
struct __align__(128) Shared {
    Window<WIDE> window;
    Patches patches;
    Fields fields;
};

extern "C" __global__ void __launch_bounds__(TILE_THREADS) conv_tile_forward(Arguments a) {
    __shared__ Shared all[TILE_THREADS / 32];
    const Index index = blockIdx.x * (TILE_THREADS / 32) + threadIdx.x / 32;
    if (index >= a.c.tiles) return;
    Shared& shared = all[threadIdx.x / 32];
    const Convolution& c = a.c;
    const Tile tile(index, c.out_height, c.out_width);
    const int lane = tile.lane, g = lane / 4, t = lane % 4;
    const VALUE* image = a.value + tile.image * c.value_image + tile.group * DEPTH;

    shared.fields.load(tile, c.out_width, a.fields + tile.image * c.fields_image, c.fields_pixel);
    ptx::wait_for_copies();
    __syncwarp();
    const Own own(shared.fields, tile);
    if (own.odd || __reduce_add_sync(~0u, __popc(own.far)) > MOST_FAR) {
        compute_directly(a, tile);
        return;
    }
    const int left = tile.column - PADDING_W - REACH, top = tile.row - PADDING_H - REACH;
    shared.window.load(left, top, c.height, c.width, lane, image, c.stride);
    build(shared.patches, own, lane);

#pragma unroll 1
    for (int first = 0; first < DEPTH; first += WIDE) {
        ptx::wait_for_copies();
        __syncwarp();
        // S' V: sums of the pixels of column g, in rows 2m and 2m + 1.
        float sum[2][WIDE / 8][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < WIDE / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[m][n][i] = 0;
#pragma unroll
        for (int row = 0; row < WINDOW_H; ++row) {
            unsigned value[WIDE / 16][4];
#pragma unroll
            for (int i = 0; i < WIDE / 16; ++i)
                ptx::load_blocks<true>(value[i], shared.window.bytes + row * Window<WIDE>::ROW +
                                                     Window<WIDE>::at(lane % 16, 2 * i + lane / 16));
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                if (!Patches::reaches(row, m)) continue;
                unsigned shares[4];
                shared.patches.read<false>(row, m, lane, shares);
#pragma unroll
                for (int n = 0; n < WIDE / 8; ++n)
                    Number<VALUE>::mma(sum[m][n], shares, value[n / 2][n % 2 * 2],
                                       value[n / 2][n % 2 * 2 + 1]);
            }
        }
        if (first + WIDE < DEPTH) {
            __syncwarp();
            shared.window.load(left, top, c.height, c.width, lane, image + first + WIDE, c.stride);
        }
        float odd = 0;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < WIDE / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    odd += 0 * sum[m][n][i];
                    sum[m][n][i] *= own.unit;
                }
        // What is not finite in the window has spoilt pixels that do not sample it.
        if (__any_sync(~0u, odd != 0)) {
            ptx::wait_for_copies();
            compute_directly(a, tile);
            return;
        }
        each_far(own, tile, shared.fields, [&](int r, int k, Sum weight) {
            if (r < 0) return;
            const Corners<Sum> at = locate(c, tile, shared.fields.of(tile, g, r), g, r, k);
            Sum share[4], term[WIDE / 8][2] = {};
            legal_coefficients(at, weight, share);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (!(at.legal >> i & 1)) continue;
                const int where = (at.row + i / 2) * c.width + at.column + i % 2;
                const VALUE* corner = dcnv4::at(image + first + 2 * t, where, c.stride);
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
        });
#pragma unroll
        for (int r = 0; r < TILE_H; ++r) {
            if (!tile.has(g, r)) continue;
            const long long pixel = (long long)tile.image * c.out_height * c.out_width +
                                    tile.pixel(g, r, c.out_width);
            VALUE* output = a.output + (pixel * GROUPS + tile.group) * DEPTH + first + 2 * t;
#pragma unroll
            for (int n = 0; n < WIDE / 8; ++n) {
                Vector<VALUE, 2> pair;
                pair.set(0, sum[r / 2][n][r % 2 * 2]);
                pair.set(1, sum[r / 2][n][r % 2 * 2 + 1]);
                pair.store(output + 8 * n);
            }
        }
    }
}
