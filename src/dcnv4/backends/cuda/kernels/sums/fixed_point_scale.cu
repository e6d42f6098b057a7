// What sums of integers are multiples of: for each image the power of two that its largest
// gradient, its largest weight and the number of terms allow.
//
// Work: a thread some numbers; `blocks` blocks an image of either tensor. The block that is done
// last makes the scales. Limit: device memory, which is read once.
#include <common/numbers.cuh>

using namespace dcnv4;

using Index = INDEX;

constexpr int INFINITE = 0x7f800000;

// The bits of the largest magnitude, or of NaN, among the WIDTH numbers of every row: of every
// PERIOD of them those from FIRST on. N are read at once.
template <typename T, int N, int WIDTH, int PERIOD, int FIRST>
DCNV4_DEVICE unsigned largest_of(const T* image, long long stride, const Arguments& a, int block) {
    constexpr int VECTORS = WIDTH / N;
    unsigned most = 0;
#pragma unroll 4
    for (Index i = block * blockDim.x + threadIdx.x; i < a.rows * VECTORS;
         i += Index(a.blocks) * blockDim.x) {
        const Index row = i / VECTORS;
        const int column = int(i - row * VECTORS) * N;
        const auto vector = Vector<T, N>::load(image + row * stride + column);
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (FIRST == 0 || (column + j) % PERIOD >= FIRST)
                most = max(most, __float_as_uint(vector[j]) & 0x7fffffff);
    }
    return most;
}

// The least e with a number below 2**e, or somewhat more, from the bits of the finite number.
DCNV4_DEVICE int exponent(unsigned bits) { return int(bits >> 23) - 126; }

DCNV4_DEVICE float scale(unsigned grad, unsigned weight, int terms) {
    if (grad >= INFINITE || weight >= INFINITE) return __uint_as_float(0x7fc00000);
    const int of_weight = SOFTMAX ? 0 : exponent(weight);
    const int fits = 62 - terms - exponent(grad) - of_weight;
    // Neither the scale nor its product with a weight may overflow in float32.
    const int power = max(-126, min(fits, 126 - max(of_weight, 0)));
    return __uint_as_float(unsigned(power + 127) << 23);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) fixed_point_scale(Arguments a) {
    int rest = blockIdx.x;
    const int block = rest % a.blocks;
    rest /= a.blocks;
    const int image = rest % a.images;
    const bool of_weights = rest / a.images;
    unsigned most;
    if (of_weights)
        most =
            largest_of<WEIGHTS, WEIGHT_VECTOR, GROUPS * WEIGHTS_OF_GROUP, WEIGHTS_OF_GROUP,
                       FIRST_WEIGHT>(a.weights + image * a.weights_image, a.weights_row, a, block);
    else
        most = largest_of<VALUE, VECTOR, CHANNELS, 1, 0>(a.grad + image * a.grad_image, a.grad_row,
                                                         a, block);
#pragma unroll
    for (int step = 16; step; step /= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
    if (threadIdx.x % 32 == 0) atomicMax(&a.largest[2 * image + of_weights], most);

    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&a.largest[2 * a.images], 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    const volatile unsigned* largest = a.largest;
    for (int i = threadIdx.x; i < a.images; i += blockDim.x)
        a.fixed_point_scale[i] = scale(largest[2 * i], largest[2 * i + 1], a.terms);
}
