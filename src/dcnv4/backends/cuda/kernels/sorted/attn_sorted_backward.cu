// Gradients of ms_deform_attn where queries that are neighbours sample the same pixels.
//
// Work: a block a tile of queries and a head. What their points add to one pixel is summed within
// the block first: sorted.cuh.
// Memory: an encoder of 100 x 134 pixels and three more levels, whose points are normal with a
// deviation of 2 pixels, has 56 legal corners a slice, and 10 runs of corners at one pixel. So many
// times a pixel's channels are read and its gradient is added to. A corner moves DEPTH output
// gradients and 28 bytes of list through shared memory. Coordinates and weights are read once.
// Limit: instructions: a warp has 8 slices of 32 halves, and needs 67 for a corner of each and 1600
// besides, 200 M for that encoder, which takes 400 us on an H100.
#include <common/attn_backward.cuh>
#include <common/queries.cuh>
#include <sorted/sorted.cuh>

using namespace dcnv4;

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_THREADS / THREADS)
    attn_sorted_backward(Arguments a) {
    __shared__ Levels levels;
    __shared__ Sorted sorted;
    sorted.clear();
    levels.fill(a);
    each_tile<true>(a, levels, [&](const Slice& slice, Index image, Index query) {
        scatter_sorted(a, sorted, AttnGradients(a, levels, slice, image, query), slice);
    });
}
