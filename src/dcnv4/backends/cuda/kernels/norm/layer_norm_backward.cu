// The gradient of rows that layer_norm_forward normalises, with what is to be added to it, and of
// each block the sums that make those of weight and bias.
//
// Work: LANES threads a row. Limit: device memory, which is read and written once.
#include <norm/rows.cuh>

using namespace dcnv4;

// Over the rows of a block, [2, CHANNELS]. One warp after another, so that the bits are the same on
// every run.
DCNV4_DEVICE void sum_of_block(float* sums, Part& weight, Part& bias) {
#pragma unroll
    for (int i = 0; i < OWN * VECTOR; ++i) {
        float &w = weight.number[i / VECTOR][i % VECTOR], &b = bias.number[i / VECTOR][i % VECTOR];
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) {
            w += __shfl_xor_sync(~0u, w, step);
            b += __shfl_xor_sync(~0u, b, step);
        }
    }
    for (int warp = 0; warp < MAX_THREADS / 32; ++warp) {
        if (threadIdx.x / 32 == warp && threadIdx.x % 32 < LANES)
            for_each([&](int i, int j, int c) {
                const float before[] = {warp ? sums[c] : 0, warp ? sums[CHANNELS + c] : 0};
                sums[c] = before[0] + weight.number[i][j];
                sums[CHANNELS + c] = before[1] + bias.number[i][j];
            });
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) layer_norm_backward(Arguments a) {
    Part of_weight = {}, of_bias = {};
    const long long step = gridDim.x * (long long)ROWS;
    for (long long first = blockIdx.x * (long long)ROWS; first < a.rows; first += step) {
        const long long row = first + threadIdx.x / LANES;
        const bool held = row < a.rows;
        Part x = {}, grad = {};
        if (held) x = load_part(a.x + row * CHANNELS), grad = load_part(a.grad + row * CHANNELS);
        const float scale = normalize(x, a.eps);
        float sum = 0, along = 0;
        if (held) {
            const Part weight = load_part(a.weight);
            for_each([&](int i, int j, int) {
                float& g = grad.number[i][j];
                of_weight.number[i][j] += g * x.number[i][j];
                of_bias.number[i][j] += g;
                g *= weight.number[i][j];
                sum += g;
                along += g * x.number[i][j];
            });
        }
        const float mean = sum_of_row(sum) / CHANNELS, part = sum_of_row(along) / CHANNELS;
        if (!held) continue;
        Part added = {};
        if (a.added) added = load_part(a.added + row * CHANNELS);
        for_each([&](int i, int j, int) {
            const float straight = grad.number[i][j] - mean - x.number[i][j] * part;
            added.number[i][j] += scale * straight;
        });
        store_part(a.grad_x + row * CHANNELS, added);
    }
    __shared__ float sums[2 * CHANNELS];
    sum_of_block(sums, of_weight, of_bias);
    float* result = a.sums + blockIdx.x * 2LL * CHANNELS;
    for (int i = threadIdx.x; i < 2 * CHANNELS; i += MAX_THREADS) result[i] = sums[i];
}
