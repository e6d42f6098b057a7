// deform_conv by tiles: see tile.cuh.
#include "conv_forward.cuh"
#include "conv_tile.cuh"

using namespace dcnv4;

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
    __syncwarp();
    Slots s = locate_all(c, tile, shared.fields);
    const Box box = enclose(s);
    if (__reduce_add_sync(~0u, __popc(s.far)) > MOST_FAR) {
        compute_directly(a, tile);
        return;
    }
    const Sum unit = unit_of(largest_weight(s));
    fill(shared.matrix, s, box, unit, lane);

    // S' V: sums of pixels 16m + g and 8 more.
    float sum[2][WORDS][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int j = 0; j < WORDS; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[m][j][i] = 0;
    const int block_row = lane % 8 + lane / 16 * 8, block_pixel = lane / 8 % 2 * 8;
#pragma unroll 2
    for (int first = 0; first < box.positions(); first += 16) {
        Words corner[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int pixel = box.pixel(first + 8 * half + g, c.height, c.width);
            corner[half] = pixel < 0 ? Words::zero() : Words::load(at(image, pixel, c.stride), t);
        }
        unsigned pixels[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
            ptx::load_blocks<true>(pixels[m],
                              shared.matrix.bytes + Matrix::half_at(first + block_row, 16 * m + block_pixel));
#pragma unroll
        for (int j = 0; j < WORDS; ++j) {
            const unsigned upper = ptx::transpose(corner[0].word[j]);
            const unsigned lower = ptx::transpose(corner[1].word[j]);
#pragma unroll
            for (int m = 0; m < 2; ++m) Number<VALUE>::mma(sum[m][j], pixels[m], upper, lower);
        }
    }
    bool odd = false;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        const Sum scale = __shfl_sync(~0u, unit, 8 * q + g);
#pragma unroll
        for (int j = 0; j < WORDS; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                Sum& number = sum[q / 2][j][q % 2 * 2 + i];
                number *= scale;
                odd |= !(abs(number) <= 3e38f);
            }
    }
    // What is not finite in the window has spoilt pixels that do not sample it.
    if (__any_sync(~0u, odd)) {
        compute_directly(a, tile);
        return;
    }
    each_far(s, lane, [&](int octet, int k, Sum weight) {
        if (octet < 0) return;
        const int pixel = 8 * octet + g;
        const Corners<Sum> at = locate(c, tile, shared.fields.of(tile, pixel), pixel, k);
        Sum share[4], term[2 * WORDS] = {};
        legal_coefficients(at, weight, share);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (!(at.legal >> i & 1)) continue;
            const int where = (at.row + i / 2) * c.width + at.column + i % 2;
            const Words corner = Words::load(dcnv4::at(image, where, c.stride), t);
#pragma unroll
            for (int v = 0; v < 2 * WORDS; ++v)
                term[v] += share[i] * Number<VALUE>::get(corner.word, v);
        }
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
            for (int v = 0; v < 2 * WORDS; ++v)
                if (octet == q) sum[q / 2][v / 2][q % 2 * 2 + v % 2] += term[v];
    });
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        if (!tile.has(8 * q + g)) continue;
        VALUE* output = a.output + (((long long)tile.image * c.out_height * c.out_width +
                                     tile.pixel(8 * q + g, c.out_width)) *
                                        GROUPS +
                                    tile.group) *
                                       DEPTH;
#pragma unroll
        for (int j = 0; j < WORDS; j += RUN) {
            Vector<VALUE, 2 * RUN> run;
#pragma unroll
            for (int v = 0; v < 2 * RUN; ++v)
                run.set(v, sum[q / 2][j + v / 2][q % 2 * 2 + v % 2]);
            run.store(output + Words::channel(t, j));
        }
    }
}
