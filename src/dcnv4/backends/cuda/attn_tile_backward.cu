// Gradients of ms_deform_attn where queries that are neighbours sample the same pixels: an
// encoder's, whose queries are the pixels of the levels.
//
// Work: a block owns a tile of TILE_WIDTH x TILE_HEIGHT queries of one level, and a head. What
// their points add to one pixel is summed within the block first: sorted.cuh. Blocks stride over
// the tiles, as their number is known only where the levels' sizes are. Any queries are right,
// these are fast.
// Memory: an encoder of 100 x 134 pixels and three more levels, whose points are normal with a
// deviation of 2 pixels, has 56 legal corners a slice, and 10 runs of corners at one pixel. So many
// times a pixel's channels are read and its gradient is added to. A corner moves DEPTH output
// gradients and 28 bytes of list through shared memory. Locations and weights are read once.
// Limit: instructions: a warp has 8 slices of 32 halves, and needs 67 for a corner of each and 1600
// besides, 200 M for that encoder, which takes 400 us on an H100.
#include "attn_backward.cuh"
#include "sorted.cuh"

using namespace dcnv4;

// How queries are cut into tiles, shared by a block: levels one after another, tiles of a level in
// rows. Queries that no level takes are a last one, TILE_WIDTH columns wide.
struct Tiling {
    Index first[LEVELS + 1];  // query
    int height[LEVELS + 1], width[LEVELS + 1];
    Index tiles[LEVELS + 1];  // up to the end of this level

    DCNV4_DEVICE void fill(const Levels& levels, Index queries) {
        if (threadIdx.x == 0) {
            Index query = 0, count = 0;
            for (int level = 0; level <= LEVELS; ++level) {
                const bool rest = level == LEVELS;
                const bool follows =
                    !rest && levels.height[level] > 0 && levels.first[level] == query;
                const int down = rest      ? int((queries - query + TILE_WIDTH - 1) / TILE_WIDTH)
                                 : follows ? levels.height[level]
                                           : 0;
                const int across = rest ? TILE_WIDTH : follows ? levels.width[level] : 0;
                first[level] = query, height[level] = down, width[level] = across;
                query += Index(down) * across;
                count += Index((across + TILE_WIDTH - 1) / TILE_WIDTH) *
                         ((down + TILE_HEIGHT - 1) / TILE_HEIGHT);
                tiles[level] = count;
            }
        }
        __syncthreads();
    }

    // The query of a slice of `tile`, or `queries` where it has none.
    DCNV4_DEVICE Index query(Index tile, int slice, Index queries) const {
        int level = 0;
        while (level < LEVELS && tile >= tiles[level]) ++level;
        const Index in_level = tile - (level ? tiles[level - 1] : 0);
        const Index across = (width[level] + TILE_WIDTH - 1) / TILE_WIDTH, down = in_level / across;
        const int column = int(in_level - down * across) * TILE_WIDTH + slice % TILE_WIDTH;
        const int row = int(down) * TILE_HEIGHT + slice / TILE_WIDTH;
        const bool has = row < height[level] && column < width[level];
        return has ? min(first[level] + Index(row) * width[level] + column, queries) : queries;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_THREADS / THREADS)
    attn_tile_backward(Arguments arguments) {
    const Attention& a = arguments.a;
    __shared__ Levels levels;
    __shared__ Tiling tiling;
    __shared__ Sorted sorted;
    sorted.clear();
    levels.fill(a, arguments.shapes);
    tiling.fill(levels, a.queries);
    const Index tiles = tiling.tiles[LEVELS], all = a.slices / a.queries * tiles;
#pragma unroll 1
    for (Index index = blockIdx.x; index < all; index += gridDim.x) {
        const Index row = index / GROUPS, image = row / tiles;  // a tile's heads one after another
        const Index query = tiling.query(row - image * tiles, threadIdx.x / LANES, a.queries);
        const Index legal = query < a.queries ? query : a.queries - 1;
        const Slice slice(query < a.queries, image * a.queries + legal, int(index - row * GROUPS),
                          threadIdx.x % LANES);
        const Head head(arguments, levels, slice, image, legal);
        const Weights<AttnPoints> weights(head.points, slice.lane);
        scatter_sorted(sorted, head.points, weights, head.image, a.stride, head.grad,
                       head.grad_image, Head::grad_stride, slice);
    }
}
