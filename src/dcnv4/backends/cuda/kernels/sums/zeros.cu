// Zeros, to which the kernel launched next adds. That one may begin meanwhile.
//
// Work: threads stride over vectors of 16 bytes, then words. Limit: L2 and device memory.
#include <common/ptx.cuh>

using namespace dcnv4;

extern "C" __global__ void __launch_bounds__(MAX_THREADS) zeros(Arguments a) {
    ptx::griddepcontrol_launch_dependents();
    const long long own = blockIdx.x * (long long)MAX_THREADS + threadIdx.x;
    const long long threads = gridDim.x * (long long)MAX_THREADS, count = a.bytes / 16;
#pragma unroll 4
    for (long long i = own; i < count; i += threads) a.sums[i] = make_uint4(0, 0, 0, 0);
    if (own < a.bytes % 16 / 4) ((unsigned*)(a.sums + count))[own] = 0;
}
