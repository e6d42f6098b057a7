// ms_deform_attn, gathered straight from memory.
//
// Work: LANES threads a slice (query, head), the heads of a query side by side; in an encoder, a
// tile of queries a block, with as many heads as fill a line of L1.
// Memory: every location and weight once, every output once; 4*L*P vectors of channels a slice,
// out of L1 where neighbouring queries look at neighbouring pixels, out of L2 otherwise.
// Limit: the number of instructions, then L1; few queries: the latency of one slice's loads.
#ifdef BLOCK_ROWS
#include "attn_tiles.cuh"
#else
#include "attn.cuh"
#endif

using namespace dcnv4;

struct Arguments {
    const VALUE* value;
    const LOCATIONS* locations;
    const WEIGHTS* weights;
    VALUE* output;
    const long long* shapes;
    Attention a;
};

static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the structure must be what Python packs");

DCNV4_DEVICE void compute(const Arguments& arguments, const Levels& levels, const Slice& slice,
                          Index image, Index query) {
    const Attention& a = arguments.a;
    const AttnPoints points{levels,
                            arguments.locations + image * a.locations_image +
                                query * a.locations_query + slice.group * (2 * POINTS),
                            arguments.weights + image * a.weights_image + query * a.weights_query +
                                slice.group * POINTS,
                            nullptr, nullptr};
    const Weights<AttnPoints> weights(points, slice.lane);
    const VALUE* value = arguments.value + image * a.value_image + slice.group * DEPTH;
    VALUE* output = arguments.output + (slice.pixel * (long long)GROUPS + slice.group) * DEPTH;

#pragma unroll 1
    for (int start = 0; start < DEPTH; start += LANES * VECTOR) {
        const int channel = start + slice.lane * VECTOR;
        const bool idle = channel >= DEPTH;
        Sum sum[VECTOR] = {};
        gather(points, weights, value + (idle ? 0 : channel), a.stride, slice.lane, sum);
        Channels out;
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) out.set(c, sum[c]);
        if (slice.active && !idle) out.store(output + channel);
    }
}

// Blocks for which a processor must have registers.
constexpr int RESIDENT = sizeof(VALUE) == 8 ? 0 : 5;

extern "C" __global__ void __launch_bounds__(MAX_THREADS, RESIDENT)
    attn_forward(Arguments arguments) {
    const Attention& a = arguments.a;
    __shared__ Levels levels;
    levels.fill(a, arguments.shapes);
#ifdef BLOCK_ROWS
    each_tile<false>(a, levels, [&](const Slice& slice, Index image, Index query) {
        compute(arguments, levels, slice, image, query);
    });
#else
    const Slice slice(a.slices);
    const Index image = slice.pixel / a.queries;
    compute(arguments, levels, slice, image, slice.pixel - image * a.queries);
#endif
}
