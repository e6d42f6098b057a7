// Gradients of ms_deform_attn, the value's added straight to memory.
//
// Work, memory and limit: as conv_backward, with slices (query, head) and 4*L*P corners each.
#include "attn.cuh"

using namespace dcnv4;

struct Arguments {
    const VALUE* value;
    const LOCATIONS* locations;
    const WEIGHTS* weights;
    const VALUE* grad;
    Total* grad_value;          // zeros, [B, S, G, D]
    LOCATIONS* grad_locations;  // contiguous, as grad_weights
    WEIGHTS* grad_weights;
    const Sum* units;  // [B], see unit_of_total
    const long long* shapes;
    long long grad_image, grad_query;  // strides
    Attention a;
};

static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the structure must be what Python packs");

extern "C" __global__ void __launch_bounds__(MAX_THREADS) attn_backward(Arguments arguments) {
    const Attention& a = arguments.a;
    __shared__ Levels levels;
    levels.fill(a, arguments.shapes);
    const Slice slice(a.slices);
    const Index image = slice.pixel / a.queries, query = slice.pixel - image * a.queries;
    const long long head = slice.pixel * (long long)GROUPS + slice.group;
    const AttnPoints points{
        levels,
        arguments.locations + image * a.locations_image + query * a.locations_query +
            slice.group * (2 * POINTS),
        arguments.weights + image * a.weights_image + query * a.weights_query +
            slice.group * POINTS,
        arguments.grad_locations + head * (2 * POINTS), arguments.grad_weights + head * POINTS};
    const Weights<AttnPoints> weights(points, slice.lane);
    scatter(points, weights, arguments.value + image * a.value_image + slice.group * DEPTH,
            a.stride,
            arguments.grad + image * arguments.grad_image + query * arguments.grad_query +
                slice.group * DEPTH,
            arguments.grad_value + image * a.length * (GROUPS * DEPTH) + slice.group * DEPTH,
            Index(GROUPS * DEPTH * sizeof(Total)),
            unit_of_total(arguments.units, image), slice);
}
