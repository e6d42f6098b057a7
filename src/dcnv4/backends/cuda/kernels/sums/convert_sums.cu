// The value's gradient, in its own type, from sums in float32 or of integers; where COLUMNS is not 0,
// what it has in each of so many columns, too.
//
// Work: a thread VECTOR numbers, or as many of every row that it comes to. Limit: device memory,
// which is read and written once.
#include <common/numbers.cuh>

using namespace dcnv4;

using Index = INDEX;

constexpr int WIDTH = COLUMNS ? COLUMNS : 1;
static_assert(MAX_THREADS * VECTOR % WIDTH == 0, "a thread stays in its columns");

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
    const Index step = Index(MAX_THREADS * VECTOR);
    float column[VECTOR] = {};
#pragma unroll 2
    for (Index in_image = (blockIdx.x - image * a.blocks) * step + threadIdx.x * VECTOR;
         in_image < a.count; in_image += a.blocks * step) {
        const Index first = image * a.count + in_image;
        const Sums held = *(const Sums*)(a.sums + first);
        Vector<VALUE, VECTOR> out;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            out.set(i, number(held.number[i], a.fixed_point_scale + image));
            if (COLUMNS) column[i] += held.number[i];
        }
        // The result lies in one piece or, where ROW is not 0, in pixels of so many numbers.
        const Index row = ROW ? first / (ROW ? ROW : 1) : 0;
        out.store(a.result + row * a.result_row + (first - row * ROW));
    }
    if (!COLUMNS) return;
    __shared__ float columns[WIDTH];
    for (int c = threadIdx.x; c < WIDTH; c += MAX_THREADS) columns[c] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
        atomicAdd(columns + (threadIdx.x * VECTOR + i) % WIDTH, column[i]);
    __syncthreads();
    for (int c = threadIdx.x; c < WIDTH; c += MAX_THREADS) ptx::red_add(a.columns + c, columns[c]);
}
