// Rows of CHANNELS numbers in registers: each is held by LANES neighbouring lanes, and all of it is
// there, so that what is summed over a row is read once.
#pragma once

#include <common/numbers.cuh>

namespace dcnv4 {

constexpr int VECTOR = 16 / sizeof(VALUE), VECTORS = CHANNELS / VECTOR;
constexpr int OWN = (VECTORS + LANES - 1) / LANES;  // vectors of a lane
constexpr int ROWS = MAX_THREADS / LANES;           // of a block at a time

// A lane's numbers of a row.
struct Part {
    float number[OWN][VECTOR];
};

// The channel that a lane's i-th vector begins with; some lanes may lack their last.
DCNV4_DEVICE int channel(int i) { return (threadIdx.x % LANES + i * LANES) * VECTOR; }
DCNV4_DEVICE bool exists(int i) { return VECTORS % LANES == 0 || channel(i) < CHANNELS; }

// Calls `use(i, j, c)` for a lane's numbers, c the channel of the j-th in its i-th vector.
template <typename Use>
DCNV4_DEVICE void for_each(Use use) {
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        if (exists(i))
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) use(i, j, channel(i) + j);
}

// From an address that 16 divides.
template <typename T>
DCNV4_DEVICE Part load_part(const T* row) {
    constexpr int AT_ONCE = VECTOR * sizeof(T) > 16 ? 16 / sizeof(T) : VECTOR;
    Part part;
    for_each([&](int i, int j, int c) {
        if (j % AT_ONCE) return;
        const auto vector = Vector<T, AT_ONCE>::load(row + c);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) part.number[i][j + k] = vector[k];
    });
    return part;
}

DCNV4_DEVICE void store_part(VALUE* row, const Part& part) {
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        if (!exists(i)) continue;
        Vector<VALUE, VECTOR> vector;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) vector.set(j, part.number[i][j]);
        vector.store(row + channel(i));
    }
}

// Over the lanes of a row. All lanes come here.
DCNV4_DEVICE float sum_of_row(float number) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) number += __shfl_xor_sync(~0u, number, step);
    return number;
}

// Makes a row's mean 0 and its variance 1; returns what it was divided by, inverted.
DCNV4_DEVICE float normalize(Part& x, float eps) {
    float sum = 0, squares = 0;
    for_each([&](int i, int j, int) { sum += x.number[i][j]; });
    const float mean = sum_of_row(sum) / CHANNELS;
    for_each([&](int i, int j, int) {
        x.number[i][j] -= mean;
        squares += x.number[i][j] * x.number[i][j];
    });
    const float scale = rsqrtf(sum_of_row(squares) / CHANNELS + eps);
    for_each([&](int i, int j, int) { x.number[i][j] *= scale; });
    return scale;
}

}  // namespace dcnv4
