// The value's gradient from sums of integers.
//
// Work: a thread VECTOR numbers. Limit: device memory, which is read and written once.
#include "numbers.cuh"

using namespace dcnv4;

struct Arguments {
    const long long* totals;
    const float* units;  // an image
    VALUE* result;
    long long count;  // of an image
    int blocks;       // of an image
};

static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the structure must be what Python packs");

struct alignas(VECTOR % 2 ? 8 : 16) Totals {
    long long number[VECTOR];
};

extern "C" __global__ void __launch_bounds__(MAX_THREADS) totals(Arguments a) {
    const int image = blockIdx.x / a.blocks;
    const long long in_image =
        (blockIdx.x - image * a.blocks) * (long long)(MAX_THREADS * VECTOR) + threadIdx.x * VECTOR;
    if (in_image >= a.count) return;
    const long long first = image * a.count + in_image;
    const float share = 1 / a.units[image];
    const Totals held = *(const Totals*)(a.totals + first);
    Vector<VALUE, VECTOR> out;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out.set(i, __ll2float_rn(held.number[i]) * share);
    out.store(a.result + first);
}
