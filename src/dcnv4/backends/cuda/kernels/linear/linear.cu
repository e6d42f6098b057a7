// Rows times a weight, plus a bias, on tensor cores. Rows in float32 are rounded as they are read,
// and where a backward will need them so, kept.
//
// Work: blocks hold the weight in shared memory and stride over the rows, 64 for each of their
// warpgroups, so 16 for a warp. A lane of a quad has 8 neighbours of every 32 channels, of two rows,
// since a sum's terms may come in any order, and 8 neighbours of every 32 results. Some channels of
// its next rows are on their way while the tensor cores make some results.
// Limit: device memory.
#include <common/numbers.cuh>

using namespace dcnv4;

constexpr int ROWS = 64, COLUMNS = 64;  // of what is multiplied at once
constexpr int SPAN = 32, RUN = 8;       // channels or results that a quad shares, and a lane's
constexpr int RUNS = CHANNELS / SPAN, STRIPS = (WIDTH + COLUMNS - 1) / COLUMNS;
constexpr int EVENLY = (RUNS + STRIPS - 1) / STRIPS;
constexpr int AT_ONCE = EVENLY > 2 ? EVENLY : RUNS < 2 ? RUNS : 2;  // runs that are on their way
// The weight lies in blocks of 64 channels, a line for each result.
constexpr int LINE = 64, LINES = STRIPS * COLUMNS;
constexpr int BIASES = (CHANNELS + LINE - 1) / LINE * LINES * LINE;  // where they begin

using Run = Vector<VALUE, RUN>;

// A run as it is read.
struct Raw {
    static constexpr bool wide = sizeof(INPUT) > sizeof(VALUE);
    Vector<INPUT, wide ? RUN / 2 : RUN> part[wide ? 2 : 1];

    DCNV4_DEVICE void load(const INPUT* at) {
#pragma unroll
        for (int i = 0; i < sizeof(part) / 16; ++i)
            part[i] = part[i].load(at + i * RUN / 2);
    }
    DCNV4_DEVICE Run rounded() const {
        Run run;
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            if (wide)
                run.set(i, part[i / (RUN / 2)][i % (RUN / 2)]);
            else
                run.word[i / 2] = part[0].word[i / 2];
        return run;
    }
};

// Of 8 halves in shared memory.
DCNV4_DEVICE Run load_shared(const VALUE* at) {
    const uint4 w = *(const uint4*)at;
    return {{w.x, w.y, w.z, w.w}};
}

// The weight, to shared memory, as the instruction wants it: in each line the halves of 32 channels
// that belong to the same step lie together, and lines in the order that gives lanes neighbours.
// Behind it the bias, or zeros.
DCNV4_DEVICE void stage(VALUE* to, const VALUE* weight, const VALUE* bias) {
    const int lane = threadIdx.x % 4, low = threadIdx.x / 4 % 8;
#pragma unroll 8
    for (int i = threadIdx.x / 32; i < LINES / 8 * RUNS; i += MAX_THREADS / 32) {
        const int line = i / RUNS * 8 + low, run = i % RUNS;
        const int result = line / SPAN * SPAN + low / 2 * RUN + line % SPAN / 8 * 2 + low % 2;
        if (result >= WIDTH) continue;
        const Run held = Run::load(weight + result * CHANNELS + run * SPAN + lane * RUN);
        unsigned* words = (unsigned*)(to + (run / 2 * LINES + line) * LINE);
#pragma unroll
        for (int w = 0; w < 4; ++w) words[(run % 2 * 4 + w ^ low) * 4 + lane] = held.word[w];
    }
    for (int i = threadIdx.x * RUN; i < WIDTH; i += MAX_THREADS * RUN)
        (bias ? Run::load(bias + i) : Run{}).store(to + BIASES + i);
    ptx::fence_proxy_async();
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) linear(Arguments a) {
    const auto weights = (VALUE*)ptx::dynamic_shared();
    stage(weights, a.weight, a.bias);
    const int lane = threadIdx.x % 4, quad = threadIdx.x % 32 / 4;
    const long long stride = gridDim.x * (MAX_THREADS / 128LL) * ROWS;
    long long first = (blockIdx.x * (MAX_THREADS / 128LL) + threadIdx.x / 128) * ROWS;
    // The first of the lane's two, 8 apart.
    long long row = first + threadIdx.x % 128 / 32 * 16 + quad;
    const auto load = [&](long long row, int run) {
        Raw raw = {};
        if (row < a.rows) raw.load(a.x + row * CHANNELS + run * SPAN + lane * RUN);
        return raw;
    };
    const auto rounded = [&](const Raw& raw, long long row, int run) {
        const Run out = raw.rounded();
        if (a.rounded && row < a.rows)
            out.store(a.rounded + row * CHANNELS + run * SPAN + lane * RUN);
        return out;
    };
    Run x[2][RUNS], next[2][RUNS];
#pragma unroll
    for (int i = 0; i < 2 * RUNS; ++i) {
        const long long own = row + i % 2 * 8;
        x[i % 2][i / 2] = rounded(load(own, i / 2), own, i / 2);
    }
#pragma unroll 1
    for (; first < a.rows; first += stride, row += stride) {
#pragma unroll
        for (int strip = 0; strip < STRIPS; ++strip) {
            // Before the products: what is not rounded is read to where the next are made of it.
            Raw raw[2][AT_ONCE];
#pragma unroll
            for (int i = 0; i < 2 * AT_ONCE; ++i)
                if (strip * AT_ONCE + i / 2 < RUNS)
                    raw[i % 2][i / 2] = load(row + stride + i % 2 * 8, strip * AT_ONCE + i / 2);
            const int column = strip * COLUMNS + lane * RUN;  // and SPAN further on
            float sums[COLUMNS / 2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const Run bias = load_shared(weights + BIASES + column + i * SPAN);
#pragma unroll
                for (int j = 0; j < 2 * RUN; ++j) sums[i * 2 * RUN + j] = bias[j / 4 * 2 + j % 2];
            }
            ptx::wgmma_fence(sums);
#pragma unroll
            for (int k = 0; k < 2 * RUNS; ++k) {
                const auto &upper = x[0][k / 2], &lower = x[1][k / 2];
                const int pair = k % 2 * 2;
                const unsigned pairs[] = {upper.word[pair], lower.word[pair], upper.word[pair + 1],
                                          lower.word[pair + 1]};
                const VALUE* b = weights + (k / 4 * LINES + strip * COLUMNS) * LINE + k % 4 * 16;
                Number<VALUE>::wgmma_m64n64k16(sums, pairs, b);
            }
            ptx::wgmma_commit();
            ptx::wgmma_wait();
            ptx::wgmma_hold(sums);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                Run out;
#pragma unroll
                for (int j = 0; j < RUN; ++j)
                    out.set(j, sums[i / 2 * 2 * RUN + j / 2 * 4 + i % 2 * 2 + j % 2]);
                if (row + i % 2 * 8 < a.rows && column + i / 2 * SPAN < WIDTH)
                    out.store(a.output + (row + i % 2 * 8) * WIDTH + column + i / 2 * SPAN);
            }
#pragma unroll
            for (int i = 0; i < 2 * AT_ONCE; ++i) {
                const int run = strip * AT_ONCE + i / 2;
                if (run < RUNS)
                    next[i % 2][run] = rounded(raw[i % 2][i / 2], row + stride + i % 2 * 8, run);
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * RUNS; ++i) x[i % 2][i / 2] = next[i % 2][i / 2];
    }
}
