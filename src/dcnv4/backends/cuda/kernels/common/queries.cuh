// Which queries a block takes: neighbours in memory or, for an encoder, whose queries are the
// pixels of the levels, neighbours in the image.
//
// A block of the latter has BLOCK_COLUMNS x BLOCK_ROWS queries of one level, and BLOCK_GROUPS
// heads: they sample the same pixels. Any queries are right, these are fast.
#pragma once

#include <common/attn.cuh>

namespace dcnv4 {

// How queries are cut into tiles, shared by a block: levels one after another, tiles of a level in
// rows. Queries that are no level's pixels make a last level, BLOCK_COLUMNS columns wide.
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
                const int down = rest ? int((queries - query + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS)
                                 : follows ? levels.height[level]
                                           : 0;
                const int across = rest ? BLOCK_COLUMNS : follows ? levels.width[level] : 0;
                first[level] = query, height[level] = down, width[level] = across;
                query += Index(down) * across;
                count += Index((across + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS) *
                         ((down + BLOCK_ROWS - 1) / BLOCK_ROWS);
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
        const Index across = (width[level] + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
        const Index down = in_level / across;
        const int column = int(in_level - down * across) * BLOCK_COLUMNS + slice % BLOCK_COLUMNS;
        const int row = int(down) * BLOCK_ROWS + slice / BLOCK_COLUMNS;
        const bool has = row < height[level] && column < width[level];
        return has ? min(first[level] + Index(row) * width[level] + column, queries) : queries;
    }
};

// Calls `visit(slice, image, query)` for the thread's slice of every tile that the block owns.
// Blocks stride over the tiles, as their number is known only where the levels' sizes are; a tile's
// heads come one after another. LAST_FIRST: as a backward goes.
template <bool LAST_FIRST, typename Visit>
DCNV4_DEVICE void each_tile(const Arguments& a, const Levels& levels, Visit visit) {
    __shared__ Tiling tiling;
    tiling.fill(levels, a.queries);
    constexpr int PARTS = GROUPS / BLOCK_GROUPS;  // of a tile's heads
    const Index tiles = tiling.tiles[LEVELS], all = a.slices / (a.queries * BLOCK_GROUPS) * tiles;
    const int own = threadIdx.x / LANES;
#pragma unroll 1
    for (Index n = blockIdx.x; n < all; n += gridDim.x) {
        const Index index = LAST_FIRST ? from_last(n, all) : n;
        const Index row = index / PARTS, image = row / tiles;
        const int head = int(index - row * PARTS) * BLOCK_GROUPS + own % BLOCK_GROUPS;
        const Index query = tiling.query(row - image * tiles, own / BLOCK_GROUPS, a.queries);
        const Index legal = query < a.queries ? query : a.queries - 1;
        visit(Slice(query < a.queries, image * a.queries + legal, head, threadIdx.x % LANES), image,
              legal);
    }
}

// Calls `visit(slice, image, query)` for the thread's slices: those of the block's tiles or, where
// queries are in no tiles, the one that the thread's number says.
template <typename Visit>
DCNV4_DEVICE void each_slice(const Arguments& a, const Levels& levels, Visit visit) {
    if constexpr (QUERY_TILES) {
        each_tile<false>(a, levels, visit);
    } else {
        const Slice slice(a.slices);
        const Index image = slice.pixel / a.queries;
        visit(slice, image, slice.pixel - image * a.queries);
    }
}

}  // namespace dcnv4
