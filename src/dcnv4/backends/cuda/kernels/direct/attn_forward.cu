// ms_deform_attn, gathered straight from memory.
//
// Work: LANES threads a slice (query, head), the heads of a query side by side; in an encoder, a
// tile of queries a block, with as many heads as fill a line of L1.
// Memory: every coordinate and weight once, every output once; 4*L*P vectors of channels a slice,
// out of L1 where neighbouring queries look at neighbouring pixels, out of L2 otherwise.
// Limit: the number of instructions, then L1; few queries: the latency of one slice's loads.
#include <common/queries.cuh>
#include <direct/gather.cuh>

using namespace dcnv4;

// Blocks for which an SM must have registers.
constexpr int OCCUPANCY = sizeof(VALUE) == 8 ? 0 : 5;

extern "C" __global__ void __launch_bounds__(MAX_THREADS, OCCUPANCY) attn_forward(Arguments a) {
    __shared__ Levels levels;
    levels.fill(a);
    each_slice(a, levels, [&](const Slice& slice, Index image, Index query) {
        gather_slice(a, AttnPoints(a, levels, slice.group, image, query), image, slice);
    });
}
