// x + fc2(gelu(fc1(norm(x)))) of rows, on tensor cores: neither normalised nor hidden maps are in
// memory.
//
// Work: blocks stride over the rows, 64 for each of their warpgroups, which normalises them into
// shared memory. There, 64 hidden channels of both weights are at a time, while the next are on
// their way. A warpgroup's hidden numbers stay in its registers, where the first product leaves them
// as the second wants them; while it activates them, tensor cores make the next ones.
// Limit: the issue slots where channels are few, as GELU takes ten instructions a number; then the
// tensor cores.
#include <norm/rows.cuh>

using namespace dcnv4;

constexpr int TILE = 64, CHUNK = 64;  // rows of a warpgroup, hidden channels at once
constexpr int GROUPS = MAX_THREADS / 128, CHUNKS = HIDDEN / CHUNK;
constexpr int LINE = 64;              // halves of a line in shared memory
constexpr int RUN = 8, SPAN = 32;     // channels of a lane, and of a quad
constexpr int BLOCKS = CHANNELS / LINE, RUNS = 4 * BLOCKS;  // of a lane, of two rows
constexpr int COPIERS = 256, COPIES = CHUNK * CHANNELS / RUN / COPIERS;  // threads, runs of each
// Halves in shared memory: of a warpgroup's rows, of a chunk of a weight, where those begin.
constexpr int X = TILE * CHANNELS, CHUNK_SIZE = CHUNK * CHANNELS;
constexpr int FC1 = GROUPS * X, FC2 = FC1 + 2 * CHUNK_SIZE, BIASES = FC2 + 2 * CHUNK_SIZE;

using Run = Vector<VALUE, RUN>;

// Where the 16 bytes `run` of a row lie, in blocks of as many lines of 128 bytes as there are rows.
DCNV4_DEVICE int place(int row, int run, int rows) {
    return (run / 8 * rows + row) * LINE + (run % 8 ^ row % 8) * RUN;
}

// Brings chunks of the weights to shared memory, which has room for two of each.
struct Weights {
    const VALUE *fc1, *fc2;  // what the thread copies first
    VALUE *to_fc1, *to_fc2;

    DCNV4_DEVICE Weights(const Arguments& a, VALUE* shared) {
        const int line = threadIdx.x / 8, run = threadIdx.x % 8, low = line % 8;
        // Results whose lines lie so are neighbours in a lane.
        const int channel = line / SPAN * SPAN + low / 2 * RUN + line % SPAN / 8 * 2 + low % 2;
        fc1 = a.fc1_weight + threadIdx.x * RUN;
        fc2 = a.fc2_weight + channel * HIDDEN + run * RUN;
        to_fc1 = shared + FC1 + place(threadIdx.x / LANES, threadIdx.x % LANES, CHUNK);
        to_fc2 = shared + FC2 + place(line, run, 0);
    }
    DCNV4_DEVICE void copy_fc1(int chunk, int half) const {
        if (MAX_THREADS > COPIERS && threadIdx.x >= COPIERS) return;
#pragma unroll
        for (int i = 0; i < COPIES; ++i)
            ptx::cp_async<16>(to_fc1 + half * CHUNK_SIZE + i * (COPIERS / LANES) * LINE,
                              fc1 + chunk * CHUNK_SIZE + i * COPIERS * RUN, true);
    }
    DCNV4_DEVICE void copy_fc2(int chunk, int half) const {
        if (MAX_THREADS > COPIERS && threadIdx.x >= COPIERS) return;
#pragma unroll
        for (int i = 0; i < COPIES; ++i)
            ptx::cp_async<16>(to_fc2 + half * CHUNK_SIZE + i * (COPIERS / 8) * LINE,
                              fc2 + chunk * CHUNK + i * (COPIERS / 8) * HIDDEN, true);
    }
};
static_assert(COPIERS / 8 == SPAN && COPIERS / LANES % 8 == 0, "a thread's copies lie alike");

// All threads have what any of them copied, or wrote to shared memory.
DCNV4_DEVICE void meet() {
    ptx::cp_async_wait<0>();
    ptx::fence_proxy_async();
    __syncthreads();
}

// A warp's 16 rows, normalised.
DCNV4_DEVICE void store_normalized(VALUE* to, const Arguments& a, long long first) {
    constexpr int AT_ONCE = 32 / LANES, TIMES = 16 / AT_ONCE;
    const int run = threadIdx.x % LANES;
    const int own = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / LANES;
    const Part weight = load_part(a.norm_weight), bias = load_part(a.norm_bias);
    Run read[TIMES];
#pragma unroll
    for (int i = 0; i < TIMES; ++i) {
        const long long row = first + own + i * AT_ONCE;
        read[i] = row < a.rows ? Run::load(a.x + row * CHANNELS + run * RUN) : Run{};
    }
#pragma unroll
    for (int i = 0; i < TIMES; ++i) {
        Part x;
        for_each([&](int, int j, int) { x.number[0][j] = read[i][j]; });
        normalize(x, a.eps);
        Run out;
        for_each([&](int, int j, int) {
            out.set(j, x.number[0][j] * weight.number[0][j] + bias.number[0][j]);
        });
        out.store(to + place(own + i * AT_ONCE, run, TILE));
    }
}

// Begins hidden = x fc1, plus its bias.
DCNV4_DEVICE void begin_hidden(float (&hidden)[32], const VALUE* x, const VALUE* fc1,
                               const float* biases) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float2 pair = *(const float2*)(biases + i * 8 + threadIdx.x % 4 * 2);
        hidden[i * 4] = hidden[i * 4 + 2] = pair.x;
        hidden[i * 4 + 1] = hidden[i * 4 + 3] = pair.y;
    }
    ptx::wgmma_fence(hidden);
#pragma unroll
    for (int k = 0; k < CHANNELS / 16; ++k)
        Number<VALUE>::wgmma_m64n64k16(hidden, x + k / 4 * TILE * LINE + k % 4 * 16,
                                       fc1 + k / 4 * CHUNK * LINE + k % 4 * 16);
    ptx::wgmma_commit();
}

// x Φ(x), where Φ(-|x|) is 2 to the power of a polynomial: to 2^-14 of it, or 2e-8.
DCNV4_DEVICE float gelu(float x) {
    const float t = fabsf(x);
    float power = -3.5061003e-4f;
    power = power * t + 6.1130488e-3f;
    power = power * t - 4.9174137e-2f;
    power = power * t - 0.46288872f;
    power = power * t - 1.1497296f;
    power = power * t - 1.000083f;
    return fmaxf(x, 0) - t * ptx::ex2(power);
}

// Begins sums += gelu(hidden) fc2.
DCNV4_DEVICE void begin_sums(float (&sums)[BLOCKS][32], const float (&hidden)[32],
                             const VALUE* fc2) {
    unsigned active[CHUNK / 16][4];
#pragma unroll
    for (int i = 0; i < 16; ++i)
        active[i / 4][i % 4] = Number<VALUE>::round(gelu(hidden[2 * i]), gelu(hidden[2 * i + 1]));
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) ptx::wgmma_fence(sums[i]);
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k)
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i)
            Number<VALUE>::wgmma_m64n64k16(sums[i], active[k], fc2 + i * LINE * LINE + k * 16);
    ptx::wgmma_commit();
}

// x plus sums and a bias.
DCNV4_DEVICE void store_added(const float (&sums)[BLOCKS][32], const Arguments& a,
                              long long first) {
    first += threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const auto row = [=](int i) { return first + i % 2 * 8; };
    const auto column = [](int i) { return i / 2 * SPAN + threadIdx.x % 4 * RUN; };
    Run x[RUNS];
#pragma unroll
    for (int i = 0; i < RUNS; ++i)
        x[i] = row(i) < a.rows ? Run::load(a.x + row(i) * CHANNELS + column(i)) : Run{};
#pragma unroll
    for (int i = 0; i < RUNS; ++i) {
        const Run bias = a.fc2_bias ? Run::load(a.fc2_bias + column(i)) : Run{};
        Run out;
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
            const float sum = sums[i / 4][i / 2 % 2 * 16 + j / 2 * 4 + i % 2 * 2 + j % 2];
            out.set(j, x[i][j] + (sum + bias[j]));
        }
        if (row(i) < a.rows) out.store(a.output + row(i) * CHANNELS + column(i));
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, OCCUPANCY) mlp(Arguments a) {
    const auto shared = (VALUE*)ptx::dynamic_shared();
    VALUE* const x = shared + threadIdx.x / 128 * X;
    float* const biases = (float*)(shared + BIASES);
    for (int i = threadIdx.x; i < HIDDEN; i += MAX_THREADS) biases[i] = load(a.fc1_bias + i);
    const Weights weights(a, shared);
    weights.copy_fc1(0, 0);
    weights.copy_fc1(1 % CHUNKS, 1);
    weights.copy_fc2(0, 0);
    ptx::cp_async_commit();
    const long long stride = gridDim.x * (long long)(GROUPS * TILE);
    int half = 0;  // where the chunk is
#pragma unroll 1
    for (long long block = blockIdx.x * (long long)(GROUPS * TILE); block < a.rows;
         block += stride) {
        const long long first = block + threadIdx.x / 128 * TILE;
        const bool goes_on = block + stride < a.rows;
        store_normalized(x, a, first);
        meet();
        float hidden[32], sums[BLOCKS][32] = {};
        begin_hidden(hidden, x, shared + FC1 + half * CHUNK_SIZE, biases);
        ptx::wgmma_wait();
        ptx::wgmma_hold(hidden);
#pragma unroll 1
        for (int chunk = 0; chunk < CHUNKS; ++chunk, half ^= 1) {
            meet();
            if (goes_on || chunk + 2 < CHUNKS) weights.copy_fc1((chunk + 2) % CHUNKS, half);
            if (goes_on || chunk + 1 < CHUNKS) weights.copy_fc2((chunk + 1) % CHUNKS, half ^ 1);
            ptx::cp_async_commit();
            float next[32];
            if (chunk + 1 < CHUNKS)
                begin_hidden(next, x, shared + FC1 + (half ^ 1) * CHUNK_SIZE,
                             biases + (chunk + 1) * CHUNK);
            begin_sums(sums, hidden, shared + FC2 + half * CHUNK_SIZE);
            ptx::wgmma_wait();
            ptx::wgmma_hold(next);
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i) ptx::wgmma_hold(sums[i]);
#pragma unroll
            for (int i = 0; i < 32; ++i) hidden[i] = next[i];
        }
        store_added(sums, a, first);
    }
}
