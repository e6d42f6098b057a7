// Rows of a few channels times a weight, plus a bias, on tensor cores. Rows in float32 are rounded
// as they are read, and where a backward will need them so, kept.
//
// Work: a warp ROWS of them; a lane of a quad 8 neighbours of every 32 channels, of each row and
// weight, since a sum's terms may come in any order, and 8 neighbours of every 32 results.
// Limit: device memory; weights are in L1.
#include <common/numbers.cuh>

using namespace dcnv4;

constexpr int TILES = ROWS / 16;      // of the rows of a warp
constexpr int STRIP = 32, RUN = 8;    // channels or results at once, and a lane's of them
constexpr int RUNS = CHANNELS / STRIP;
constexpr int STEPS = CHANNELS / 16;  // of 16 channels each, 4 of every lane of a quad

// A lane's channels of a row, two to a word.
struct Part {
    Vector<VALUE, RUN> run[RUNS];
    DCNV4_DEVICE unsigned pair(int i) const { return run[i / 4].word[i % 4]; }
};

// From where its first begin.
template <typename T>
DCNV4_DEVICE Part load_part(const T* at) {
    Part part;
#pragma unroll
    for (int i = 0; i < RUNS; ++i) {
        if constexpr (sizeof(T) == sizeof(VALUE)) {
            part.run[i] = Vector<VALUE, RUN>::load(at + i * STRIP);
            continue;
        }
        const T* own = at + i * STRIP;
        const Vector<float, 4> fours[] = {Vector<float, 4>::load(own),
                                          Vector<float, 4>::load(own + 4)};
#pragma unroll
        for (int j = 0; j < RUN; ++j) part.run[i].set(j, fours[j / 4][j % 4]);
    }
    return part;
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) linear(Arguments a) {
    const int lane = threadIdx.x % 4, quad = threadIdx.x % 32 / 4;
    const long long warp = blockIdx.x * (MAX_THREADS / 32LL) + threadIdx.x / 32;
    const long long first = warp * ROWS + quad;
    if (warp * ROWS >= a.rows) return;
    Part x[TILES][2] = {};
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
        const long long row = first + 8 * i;
        if (row >= a.rows) continue;
        const long long at = row * CHANNELS + lane * RUN;
        Part& part = x[i / 2][i % 2];
        part = load_part(a.x + at);
        if (!a.rounded) continue;
#pragma unroll
        for (int j = 0; j < RUNS; ++j) part.run[j].store(a.rounded + at + j * STRIP);
    }
#pragma unroll 1
    for (int column = 0; column < WIDTH; column += STRIP) {
        const int own = column + lane * RUN;
        Vector<VALUE, RUN> bias = {};
        if (a.bias && own < WIDTH) bias = Vector<VALUE, RUN>::load(a.bias + own);
        float sums[TILES][RUN / 2][4];
#pragma unroll
        for (int j = 0; j < RUN / 2; ++j) {
            // Which weight makes the result that the fragment's layout gives to whom.
            const int result = min(column + quad / 2 * RUN + 2 * j + quad % 2, WIDTH - 1);
            const Part weight = load_part(a.weight + result * CHANNELS + lane * RUN);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                float(&sum)[4] = sums[tile][j];
                sum[0] = sum[2] = bias[2 * j], sum[1] = sum[3] = bias[2 * j + 1];
                const Part &upper = x[tile][0], &lower = x[tile][1];
#pragma unroll
                for (int i = 0; i < 2 * STEPS; i += 2) {
                    const unsigned pairs[] = {upper.pair(i), lower.pair(i), upper.pair(i + 1),
                                              lower.pair(i + 1)};
                    Number<VALUE>::mma_m16n8k16(sum, pairs, weight.pair(i), weight.pair(i + 1));
                }
            }
        }
        if (own >= WIDTH) continue;
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i) {
            const long long row = first + 8 * i;
            if (row >= a.rows) continue;
            Vector<VALUE, RUN> out;
#pragma unroll
            for (int j = 0; j < RUN; ++j) out.set(j, sums[i / 2][j / 2][i % 2 * 2 + j % 2]);
            out.store(a.output + row * WIDTH + own);
        }
    }
}
