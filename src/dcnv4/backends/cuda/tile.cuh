// A tile of output pixels as small dense products on tensor cores.
//
// A warp owns the TILE_W x TILE_H pixels of one group, a pixel a lane. Offsets are small and local,
// so all corners that they sample lie in a window a few pixels larger than the tile. S, of [window
// positions, 32 pixels], holds at every corner its share of the point's weight; a pixel's column
// belongs to its lane, so building S needs no atomics. Then
//
//     output of a pixel               S' V        V: the window of the value
//     gradient of the value           S T         T: the output's gradient
//     what a point's gradients need   V T'        at the point's corners
//
// A window holds the tile's corners exactly where they fit in WINDOW positions, otherwise as many
// as fit about their mean. A point with a corner beyond it is FAR: four lanes gather it from memory.
// Where more than MOST_FAR are, the tile's slices are computed as the direct kernels do.
//
// The fragments of mma.m16n8k16: lane 4g+t holds rows g and g+8, columns 2t, 2t+1 and 8 more. The
// order of channels is free in all three products, so lane t of a quad takes those that are
// neighbours in memory, and what it adds to memory is again neighbours.
#pragma once

#include "points.cuh"

namespace dcnv4 {

constexpr int TILE_W = 8, TILE_H = 4, PIXELS = 32;
constexpr int WINDOW = 160;           // positions at most
constexpr int WIDEST = 32;            // columns of them at most
constexpr int ROWS = WINDOW / 2;      // of float32 products with 32 pixels that lie in S's place
constexpr int MOST_FAR = 64;
constexpr int WORDS = DEPTH / 8;      // pairs of channels that a lane of a quad holds
constexpr int RUN = WORDS % 4 ? 2 : 4;  // of them side by side in memory

static_assert(DEPTH % 16 == 0 && sizeof(VALUE) == 2 && POINTS <= 16, "no tile kernel for these");

// Whether either half of any word is infinite or NaN.
template <int N>
DCNV4_DEVICE bool not_finite(const unsigned (&words)[N]) {
    constexpr unsigned exponents = Number<VALUE>::exponents, carry = 0x80008000u - exponents;
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) found |= (words[i] & exponents) + carry;
    return found & 0x80008000u;
}

// The channels of a pixel that lane t of a quad holds: word j those from `channel(t, j)` on.
struct Words {
    unsigned word[WORDS];

    static DCNV4_DEVICE int channel(int t, int j) {
        return j / RUN * (8 * RUN) + t * (2 * RUN) + j % RUN * 2;
    }
    // `first`: the first of the pixel's DEPTH channels.
    static DCNV4_DEVICE Words load(const VALUE* first, int t) {
        Words out;
#pragma unroll
        for (int j = 0; j < WORDS; j += RUN) {
            const auto run = Vector<VALUE, 2 * RUN>::load(first + channel(t, j));
#pragma unroll
            for (int i = 0; i < RUN; ++i) out.word[j + i] = run.word[i];
        }
        return out;
    }
    static DCNV4_DEVICE Words zero() {
        Words out;
#pragma unroll
        for (int j = 0; j < WORDS; ++j) out.word[j] = 0;
        return out;
    }
};

// Where a tile lies.
struct Tile {
    int image, row, column;  // of its first output pixel
    int group, lane, rows, columns;  // of those in the image

    DCNV4_DEVICE Tile(unsigned index, int height, int width) {
        const unsigned across = (width + TILE_W - 1) / TILE_W, down = (height + TILE_H - 1) / TILE_H;
        group = index % GROUPS;
        index /= GROUPS;
        column = index % across * TILE_W;
        index /= across;
        row = index % down * TILE_H;
        image = index / down;
        lane = threadIdx.x % 32;
        rows = min(TILE_H, height - row);
        columns = min(TILE_W, width - column);
    }
    DCNV4_DEVICE bool has(int pixel) const {
        return pixel % TILE_W < columns && pixel / TILE_W < rows;
    }
    // Of all pixels of the image.
    DCNV4_DEVICE int pixel(int pixel, int width) const {
        return (row + pixel / TILE_W) * width + column + pixel % TILE_W;
    }
};

// COUNT numbers of every pixel of a tile, in shared memory: read and written coalesced. In memory
// pixels begin on whole words, a group's numbers not always.
template <int COUNT>
struct Staged {
    static constexpr int IN_WORD = 4 / sizeof(FIELDS);
    static constexpr int SPAN = COUNT / IN_WORD + IN_WORD - 1, PITCH = SPAN | 1;
    unsigned words[PIXELS * PITCH];

    static DCNV4_DEVICE int shift(const Tile& tile) { return tile.group * COUNT % IN_WORD; }

    template <typename Visit>
    static DCNV4_DEVICE void each(const Tile& tile, int width, Visit visit) {
        const int last = (shift(tile) + COUNT - 1) / IN_WORD;
#pragma unroll
        for (int first = 0; first < PIXELS; first += 2) {
            const int pixel = first + tile.lane / 16;
#pragma unroll
            for (int word = 0; word < SPAN; word += 16) {
                const int own = word + tile.lane % 16;
                if (own <= last && tile.has(pixel)) visit(pixel, own);
            }
        }
    }
    // `image`: the image's first number; `stride`: from pixel to pixel.
    DCNV4_DEVICE void load(const Tile& tile, int width, const FIELDS* image, long long stride) {
        const FIELDS* first = image + tile.pixel(0, width) * stride +
                              tile.group * COUNT / IN_WORD * IN_WORD;
        each(tile, width, [&](int pixel, int word) {
            const long long at = (pixel / TILE_W * width + pixel % TILE_W) * stride;
            words[pixel * PITCH + word] = __ldg((const unsigned*)(first + at) + word);
        });
    }
    DCNV4_DEVICE void store(const Tile& tile, int width, FIELDS* image, long long stride) const {
        FIELDS* first = image + tile.pixel(0, width) * stride +
                        tile.group * COUNT / IN_WORD * IN_WORD;
        const int before = shift(tile);
        each(tile, width, [&](int pixel, int word) {
            FIELDS* to = first + (pixel / TILE_W * width + pixel % TILE_W) * stride + word * IN_WORD;
            const FIELDS* from = (const FIELDS*)(words + pixel * PITCH + word);
            if (IN_WORD == 1 || (word * IN_WORD >= before && word * IN_WORD + 1 < before + COUNT))
                *(unsigned*)to = *(const unsigned*)from;
            else
                to[word * IN_WORD < before] = from[word * IN_WORD < before];
        });
    }
    DCNV4_DEVICE FIELDS* of(const Tile& tile, int pixel) {
        return (FIELDS*)(words + pixel * PITCH) + shift(tile);
    }
};

template <typename T>
DCNV4_DEVICE Sum read(const T* at) {
    unsigned word;
    if constexpr (sizeof(T) == 2)
        word = *(const unsigned short*)at;
    else
        word = *(const unsigned*)at;
    return Number<T>::get(&word, 0);
}

// S, or in its place the products of window positions and pixels. Both are swizzled, so that lanes
// that each walk a column of their own, and the blocks of tensor cores, meet few bank conflicts.
struct __align__(128) Matrix {
    unsigned char bytes[WINDOW * PIXELS * 2];

    static DCNV4_DEVICE int half_at(int position, int pixel) {
        const int at = position * (PIXELS * 2) + pixel * 2;
        return at ^ (at >> 3 & 0x30);
    }
    static DCNV4_DEVICE int float_at(int row, int pixel) {
        const int at = row * (PIXELS * 4) + pixel * 4;
        return at ^ (at >> 2 & 0x60);
    }
    DCNV4_DEVICE void clear(int positions, int lane) {
        for (int at = lane * 16; at < positions * (PIXELS * 2); at += 32 * 16)
            *(uint4*)(bytes + at) = make_uint4(0, 0, 0, 0);
    }
};

// The rectangle of input pixels that a tile samples; from -1, to one past the image.
struct Box {
    int column, row, width, height;
    float inverse;  // of the width

    DCNV4_DEVICE int positions() const { return width * height; }
    DCNV4_DEVICE int at(int c, int r) const { return (r - row) * width + c - column; }
    DCNV4_DEVICE bool has(int c, int r) const {
        return c >= column && r >= row && c + 1 < column + width && r + 1 < row + height;
    }
    // The pixel at a position, -1 outside the image.
    DCNV4_DEVICE int pixel(int position, int image_height, int image_width) const {
        const int down = int((position + 0.5f) * inverse);
        const int c = column + position - down * width, r = row + down;
        const bool inside = c >= 0 && c < image_width && r >= 0 && r < image_height &&
                            position < positions();
        return inside ? r * image_width + c : -1;
    }
};

// The points of a lane's slice.
struct Slots {
    int column[POINTS], row[POINTS];  // of the top left corner
    int position[POINTS];             // of it in the box
    Sum x[POINTS], y[POINTS];         // from it, in pixels
    Sum weight[POINTS];
    unsigned inside, far;             // a bit a point
};

// A box for the warp's points, which are told from those that are far.
DCNV4_DEVICE Box enclose(Slots& s) {
    constexpr int most = 1 << 30;
    int left = most, top = most, right = -most, bottom = -most;
#pragma unroll
    for (int k = 0; k < POINTS; ++k)
        if (s.inside >> k & 1) {
            left = min(left, s.column[k]), right = max(right, s.column[k]);
            top = min(top, s.row[k]), bottom = max(bottom, s.row[k]);
        }
    left = __reduce_min_sync(~0u, left), right = __reduce_max_sync(~0u, right);
    top = __reduce_min_sync(~0u, top), bottom = __reduce_max_sync(~0u, bottom);
    Box box;
    if (left > right) left = right = top = bottom = 0;
    box.column = left, box.row = top;
    box.width = right - left + 2, box.height = bottom - top + 2;
    s.far = 0;
    if (box.width > WIDEST || box.height > WINDOW / 2 || box.positions() > WINDOW) {
        int columns = 0, rows = 0;  // sums over the points, from the box's corner
#pragma unroll
        for (int k = 0; k < POINTS; ++k)
            if (s.inside >> k & 1) {
                columns += min(s.column[k] - left, 0xffff);
                rows += min(s.row[k] - top, 0xffff);
            }
        const int count = __reduce_add_sync(~0u, __popc(s.inside));
        const int middle = __reduce_add_sync(~0u, columns) / count;
        const int center = __reduce_add_sync(~0u, rows) / count;
        const int width = min(box.width, 16), height = min(box.height, WINDOW / width);
        const int wider = min(min(box.width, WIDEST), WINDOW / height);
        box.column = left + min(max(middle - (wider - 2) / 2, 0), box.width - wider);
        box.row = top + min(max(center - (height - 2) / 2, 0), box.height - height);
        box.width = wider, box.height = height;
#pragma unroll
        for (int k = 0; k < POINTS; ++k)
            if (s.inside >> k & 1 && !box.has(s.column[k], s.row[k])) s.far |= 1u << k;
    }
    box.inverse = 1.0f / box.width;
#pragma unroll
    for (int k = 0; k < POINTS; ++k) s.position[k] = box.at(s.column[k], s.row[k]);
    return box;
}

// A power of two by which weights of up to `most` are divided, so that S neither overflows nor
// loses small ones.
DCNV4_DEVICE Sum unit_of(Sum most) {
    const unsigned exponent = __float_as_uint(most) >> 23 & 255;
    return __uint_as_float(min(max(exponent, 1u), 253u) << 23);
}

DCNV4_DEVICE Sum largest_weight(const Slots& s) {
    Sum most = 0;
#pragma unroll
    for (int k = 0; k < POINTS; ++k) most = max(most, abs(s.weight[k]));
    return most;
}

// S of a tile, for weights divided by `unit`.
DCNV4_DEVICE void fill(Matrix& matrix, const Slots& s, const Box& box, Sum unit, int lane) {
    matrix.clear((box.positions() + 15) & ~15, lane);
    __syncwarp();
    const Sum scale = 1 / unit;
    const unsigned near = s.inside & ~s.far;
#pragma unroll
    for (int k = 0; k < POINTS; ++k) {
        if (!(near >> k & 1)) continue;
        Sum share[4];
        coefficients(s.weight[k] * scale, s.x[k], s.y[k], share);
        const int corner[4] = {s.position[k], s.position[k] + 1, s.position[k] + box.width,
                               s.position[k] + box.width + 1};
        unsigned short* at[4];
        unsigned short sum[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            at[i] = (unsigned short*)(matrix.bytes + Matrix::half_at(corner[i], lane));
            sum[i] = *at[i];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            *at[i] = Number<VALUE>::add(sum[i], Number<VALUE>::round(share[i]));
    }
    __syncwarp();
}

// Calls `visit(octet, k, weight)` for the far points of pixels 8 * octet + g, one by one, in quad g.
template <typename Visit>
DCNV4_DEVICE void each_far(const Slots& s, int lane, Visit visit) {
    unsigned mask[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) mask[q] = __shfl_sync(~0u, s.far, 8 * q + lane / 4);
    while (__any_sync(~0u, mask[0] | mask[1] | mask[2] | mask[3])) {
        int octet = -1, k = 0;
#pragma unroll
        for (int q = 0; q < 4; ++q)
            if (octet < 0 && mask[q]) {
                octet = q, k = __ffs(mask[q]) - 1;
                mask[q] &= mask[q] - 1;
            }
        Sum weight = 0;
#pragma unroll
        for (int p = 0; p < POINTS; ++p) {
            const Sum other = __shfl_sync(~0u, s.weight[p], max(8 * octet + lane / 4, 0));
            if (p == k) weight = other;
        }
        visit(octet, k, weight);  // by all lanes; octet -1 where a quad has none left
    }
}

}  // namespace dcnv4
