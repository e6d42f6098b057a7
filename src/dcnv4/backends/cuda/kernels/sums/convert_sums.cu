// The value's gradient, in its own type, from sums in float32 or of integers.
//
// Work: a thread VECTOR numbers. Limit: device memory, which is read and written once.
#include <common/numbers.cuh>

using namespace dcnv4;

using Index = INDEX;

struct alignas(VECTOR * sizeof(TOTAL) % 16 ? sizeof(TOTAL) : 16) Sums {
    TOTAL number[VECTOR];
};

DCNV4_DEVICE float number(float sum, const float*) { return sum; }
DCNV4_DEVICE float number(long long sum, const float* fixed_point_scale) {
    return __ll2float_rn(sum) * (1 / *fixed_point_scale);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) convert_sums(Arguments a) {
    ptx::griddepcontrol_wait();
    const int image = blockIdx.x / a.blocks;
    const Index in_image =
        (blockIdx.x - image * a.blocks) * Index(MAX_THREADS * VECTOR) + threadIdx.x * VECTOR;
    if (in_image >= a.count) return;
    const Index first = image * a.count + in_image;
    const Sums held = *(const Sums*)(a.sums + first);
    Vector<VALUE, VECTOR> out;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
        out.set(i, number(held.number[i], a.fixed_point_scale + image));
    // The result lies in one piece or, where ROW is not 0, in pixels of so many numbers.
    const Index row = ROW ? first / (ROW ? ROW : 1) : 0;
    out.store(a.result + row * a.result_row + (first - row * ROW));
}
