// The value's gradient, in its own type, from sums in float32 or of integers.
//
// Work: a thread VECTOR numbers. Limit: device memory, which is read and written once.
#include "numbers.cuh"

using namespace dcnv4;

#if DETERMINISTIC
using Total = long long;
#else
using Total = float;
#endif

struct Arguments {
    const Total* totals;
    const float* units;  // an image, of integers
    VALUE* result;
    long long count;  // of an image
    int blocks;       // of an image
};

static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the structure must be what Python packs");

struct alignas(VECTOR * sizeof(Total) % 16 ? sizeof(Total) : 16) Totals {
    Total number[VECTOR];
};

DCNV4_DEVICE float number(float total, const float*) { return total; }
DCNV4_DEVICE float number(long long total, const float* unit) {
    return __ll2float_rn(total) * (1 / *unit);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) totals(Arguments a) {
    ptx::wait_for_launch_before();
    const int image = blockIdx.x / a.blocks;
    const long long in_image =
        (blockIdx.x - image * a.blocks) * (long long)(MAX_THREADS * VECTOR) + threadIdx.x * VECTOR;
    if (in_image >= a.count) return;
    const long long first = image * a.count + in_image;
    const Totals held = *(const Totals*)(a.totals + first);
    Vector<VALUE, VECTOR> out;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out.set(i, number(held.number[i], a.units + image));
    out.store(a.result + first);
}
