// Gradients of deform_conv by tiles: see tile.cuh.
#include "conv_backward.cuh"
#include "conv_tile.cuh"

using namespace dcnv4;

extern "C" __global__ void __launch_bounds__(TILE_THREADS) conv_tile_backward(Arguments a) {
    __shared__ Shared all[TILE_THREADS / 32];
    const Index index = blockIdx.x * (TILE_THREADS / 32) + threadIdx.x / 32;
    if (index >= a.c.tiles) return;
    Shared& shared = all[threadIdx.x / 32];
    const Convolution& c = a.c;
    const Tile tile(index, c.out_height, c.out_width);
    const int lane = tile.lane, g = lane / 4, t = lane % 4;
    const VALUE* image = a.value + tile.image * c.value_image + tile.group * DEPTH;
    Sum* grad_image = a.grad_value + (long long)tile.image * c.height * c.width * (GROUPS * DEPTH) +
                      tile.group * DEPTH;
    FIELDS* grad_fields =
        a.grad_fields + (long long)tile.image * c.out_height * c.out_width * a.channels;

    Words out[4];  // the output's gradient: of pixels 8q + g
#pragma unroll
    for (int q = 0; q < 4; ++q)
        out[q] = tile.has(8 * q + g)
                     ? Words::load(a.grad + tile.image * a.grad_image +
                                       tile.pixel(8 * q + g, c.out_width) * a.grad_pixel +
                                       tile.group * DEPTH,
                                   t)
                     : Words::zero();
    shared.fields.load(tile, c.out_width, a.fields + tile.image * c.fields_image, c.fields_pixel);
    __syncwarp();
    Slots s = locate_all(c, tile, shared.fields);
    const Box box = enclose(s);

    bool odd = false;
#pragma unroll
    for (int q = 0; q < 4; ++q) odd |= not_finite(out[q].word);
    if (__any_sync(~0u, odd) || __reduce_add_sync(~0u, __popc(s.far)) > MOST_FAR) {
        compute_directly(a, tile);
        return;
    }
    if (tile.group == GROUPS - 1 && tile.has(lane))  // channels that no group owns
        for (long long i = 3 * GROUPS * POINTS; i < a.channels; ++i)
            store(grad_fields + tile.pixel(lane, c.out_width) * a.channels + i, Sum(0));

    // Gradients of far points, added to memory and, of offsets and weight, left in `far`.
    Sum(*far)[POINTS][3] = (Sum(*)[POINTS][3])shared.matrix.bytes;
    static_assert(sizeof(Sum) * PIXELS * POINTS * 3 <= sizeof(shared.matrix), "must fit");
    Sum slope[SOFTMAX ? POINTS : 1];
    each_far(s, lane, [&](int octet, int k, Sum weight) {
        Sum dot[4] = {0, 0, 0, 0};
        const int pixel = 8 * octet + g;
        Corners<Sum> at;
        if (octet >= 0) {
            at = locate(c, tile, shared.fields.of(tile, pixel), pixel, k);
            Words here = out[0];
#pragma unroll
            for (int q = 1; q < 4; ++q)
                if (octet == q) here = out[q];
            Sum share[4];
            legal_coefficients(at, weight, share);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (!(at.legal >> i & 1)) continue;
                const int where = (at.row + i / 2) * c.width + at.column + i % 2;
                const Words corner = Words::load(dcnv4::at(image, where, c.stride), t);
                Sum* to = grad_image + (long long)where * (GROUPS * DEPTH);
#pragma unroll
                for (int j = 0; j < WORDS; j += 2) {
                    Sum term[4];
#pragma unroll
                    for (int v = 0; v < 4; ++v) {
                        const Sum grad = Number<VALUE>::get(here.word, 2 * j + v);
                        dot[i] += grad * Number<VALUE>::get(corner.word, 2 * j + v);
                        term[v] = share[i] * grad;
                    }
                    add(to + Words::channel(t, j), term);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            dot[i] += __shfl_xor_sync(~0u, dot[i], 1);
            dot[i] += __shfl_xor_sync(~0u, dot[i], 2);
        }
        if (octet >= 0 && t == 0) {
            const PointGradient<Sum> gradient =
                coefficients_backward(dot, weight, at.fraction_x, at.fraction_y);
            far[pixel][k][0] = gradient.x, far[pixel][k][1] = gradient.y;
            far[pixel][k][2] = gradient.weight;
        }
    });
    __syncwarp();
    FIELDS* gradients = shared.fields.of(tile, lane);
    const auto keep = [&](int k, const PointGradient<Sum>& gradient) {
        store(gradients + 2 * k, gradient.x * c.offset_scale);
        store(gradients + 2 * k + 1, gradient.y * c.offset_scale);
        if constexpr (SOFTMAX)
            slope[k] = gradient.weight;
        else
            store(gradients + 2 * POINTS + k, gradient.weight);
    };
#pragma unroll
    for (int k = 0; k < POINTS; ++k) {
        PointGradient<Sum> gradient = {0, 0, 0};
        if (s.far >> k & 1)
            gradient = {far[lane][k][0], far[lane][k][1], far[lane][k][2]};
        keep(k, gradient);
    }
    __syncwarp();

    // The value's gradient, S T.
    Sum most = largest_weight(s);
#pragma unroll
    for (int step = 16; step; step /= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
    const Sum unit = unit_of(most);
    fill(shared.matrix, s, box, unit, lane);
    {
        unsigned turned[4][WORDS];
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
            for (int j = 0; j < WORDS; ++j) turned[q][j] = ptx::transpose(out[q].word[j]);
        const int block_row = lane % 16;
#pragma unroll 1
        for (int first = 0; first < box.positions(); first += 16) {
            unsigned left[4], right[4];
            ptx::load_blocks<false>(left, shared.matrix.bytes + Matrix::half_at(first + block_row, lane / 16 * 8));
            ptx::load_blocks<false>(right, shared.matrix.bytes + Matrix::half_at(first + block_row, 16 + lane / 16 * 8));
            float sum[WORDS][4];
#pragma unroll
            for (int j = 0; j < WORDS; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[j][i] = 0;
                Number<VALUE>::mma(sum[j], left, turned[0][j], turned[1][j]);
                Number<VALUE>::mma(sum[j], right, turned[2][j], turned[3][j]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int pixel = box.pixel(first + 8 * half + g, c.height, c.width);
                if (pixel < 0) continue;
                Sum* to = grad_image + (long long)pixel * (GROUPS * DEPTH);
#pragma unroll
                for (int j = 0; j < WORDS; j += 2) {
                    const Sum term[4] = {sum[j][2 * half] * unit, sum[j][2 * half + 1] * unit,
                                         sum[j + 1][2 * half] * unit,
                                         sum[j + 1][2 * half + 1] * unit};
                    if (term[0] != 0 || term[1] != 0 || term[2] != 0 || term[3] != 0)
                        add(to + Words::channel(t, j), term);
                }
            }
        }
    }
    __syncwarp();

    // Those of offsets and weights, from V T', ROWS window positions at a time.
    const int reach = box.width + 1, step = (ROWS - reach) & ~15;
    const unsigned near = s.inside & ~s.far;
#pragma unroll 1
    for (int start = 0; start + reach < box.positions(); start += step) {
#pragma unroll 1
        for (int first = start; first < min(start + ROWS, box.positions()); first += 16) {
            Words corner[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int pixel = box.pixel(first + 8 * half + g, c.height, c.width);
                corner[half] = pixel < 0 ? Words::zero() : Words::load(at(image, pixel, c.stride), t);
            }
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                float dot[4] = {0, 0, 0, 0};
#pragma unroll
                for (int j = 0; j < WORDS; j += 2) {
                    const unsigned rows[4] = {corner[0].word[j], corner[1].word[j],
                                              corner[0].word[j + 1], corner[1].word[j + 1]};
                    Number<VALUE>::mma(dot, rows, out[q].word[j], out[q].word[j + 1]);
                }
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    *(float2*)(shared.matrix.bytes +
                               Matrix::float_at(first - start + 8 * half + g, 8 * q + 2 * t)) =
                        make_float2(dot[2 * half], dot[2 * half + 1]);
            }
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < POINTS; ++k) {
            const int row = s.position[k] - start;
            if (!(near >> k & 1) || row < 0 || row >= step) continue;
            const Sum dot[4] = {
                *(const float*)(shared.matrix.bytes + Matrix::float_at(row, lane)),
                *(const float*)(shared.matrix.bytes + Matrix::float_at(row + 1, lane)),
                *(const float*)(shared.matrix.bytes + Matrix::float_at(row + reach - 1, lane)),
                *(const float*)(shared.matrix.bytes + Matrix::float_at(row + reach, lane))};
            keep(k, coefficients_backward(dot, s.weight[k], s.x[k], s.y[k]));
        }
        __syncwarp();
    }
    if constexpr (SOFTMAX) {
        Sum mean = 0;
#pragma unroll
        for (int k = 0; k < POINTS; ++k) mean += slope[k] * s.weight[k];
#pragma unroll
        for (int k = 0; k < POINTS; ++k)
            store(gradients + 2 * POINTS + k, softmax_backward(slope[k], s.weight[k], mean));
    }
    __syncwarp();
    shared.fields.store(tile, c.out_width, grad_fields, a.channels);
}
