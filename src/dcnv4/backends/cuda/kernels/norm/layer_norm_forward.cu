// Rows of mean 0 and variance 1, times a weight and plus a bias for each channel.
//
// Work: LANES threads a row. Limit: device memory, which is read and written once.
#include <norm/rows.cuh>

using namespace dcnv4;

extern "C" __global__ void __launch_bounds__(MAX_THREADS) layer_norm_forward(Arguments a) {
    const long long step = gridDim.x * (long long)ROWS;
    for (long long first = blockIdx.x * (long long)ROWS; first < a.rows; first += step) {
        const long long row = first + threadIdx.x / LANES;
        Part x = {};
        if (row < a.rows) x = load_part(a.x + row * CHANNELS);
        normalize(x, a.eps);
        if (row >= a.rows) continue;
        const Part weight = load_part(a.weight), bias = load_part(a.bias);
        for_each([&](int i, int j, int) {
            x.number[i][j] = x.number[i][j] * weight.number[i][j] + bias.number[i][j];
        });
        store_part(a.output + row * CHANNELS, x);
    }
}
