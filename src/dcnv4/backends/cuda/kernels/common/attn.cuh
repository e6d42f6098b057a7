// Where the points of ms_deform_attn lie: the mirror of `attn_map` and `levels` in geometry.py.
#pragma once

#include <common/slices.cuh>

namespace dcnv4 {

// The levels' sizes and first rows in the value, shared by a block. A level without pixels, or one
// that does not fit in the value, gets sizes of -1: no point lies inside it.
struct Levels {
    int height[LEVELS], width[LEVELS];
    Index first[LEVELS];

    DCNV4_DEVICE void fill(const Arguments& a) {
        const long long* shapes = a.shapes;
        for (int level = threadIdx.x; level < LEVELS; level += blockDim.x) {
            long long start = 0, rows, columns;
            for (int l = 0;; ++l) {
                rows = shapes ? shapes[2 * l] : a.sizes[2 * l];
                columns = shapes ? shapes[2 * l + 1] : a.sizes[2 * l + 1];
                if (l == level) break;
                start += rows * columns;
            }
            const bool fits = rows > 0 && columns > 0 && start >= 0 && rows <= a.length &&
                              columns <= a.length && start + rows * columns <= a.length;
            height[level] = fits ? int(rows) : -1;
            width[level] = fits ? int(columns) : -1;
            first[level] = fits ? Index(start) : 0;
        }
        __syncthreads();
    }
};

// What makes pixels of coordinates (x, y): factors, then summands.
struct Map {
    Sum scale[2], shift[2];
};

// The points of a slice.
struct AttnPoints {
    const Levels& levels;
    const REFERENCE* reference;      // [L or 1, REFERENCE_NUMBERS]
    Index reference_level;           // stride
    const COORDINATES* coordinates;  // [L, P, 2]
    const WEIGHTS* weights;          // [L, P]

    DCNV4_DEVICE AttnPoints(const Arguments& a, const Levels& levels, int group, Index image,
                            Index query)
        : levels(levels),
          reference(a.reference + image * a.reference_image + query * a.reference_query),
          reference_level(a.reference_level),
          coordinates(a.coordinates + image * a.coordinates_image + query * a.coordinates_query +
                      group * (2 * POINTS)),
          weights(a.weights + image * a.weights_image + query * a.weights_query + group * POINTS) {}

    DCNV4_DEVICE int level(int k) const { return k / LEVEL_POINTS; }
    DCNV4_DEVICE Map map(int level) const {
        using Part = Vector<REFERENCE, REFERENCE_VECTOR>;
        Sum place[4] = {};
#pragma unroll
        for (int i = 0; i < REFERENCE_NUMBERS; i += REFERENCE_VECTOR) {
            const Part part = Part::load(reference + level * reference_level + i);
#pragma unroll
            for (int j = 0; j < REFERENCE_VECTOR; ++j) place[i + j] = part[j];
        }
        const Sum sizes[2] = {Sum(levels.width[level]), Sum(levels.height[level])};
        const Sum half = 0.5, share = half / LEVEL_POINTS;
        Map out;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Sum unit = BOX_BY_SIZE ? half : sizes[i] * share;
            out.scale[i] = REFERENCE_NUMBERS == 4   ? place[2 + i] * unit
                           : REFERENCE_NUMBERS == 2 ? Sum(1)
                                                    : sizes[i];
            out.shift[i] = REFERENCE_NUMBERS ? place[i] * sizes[i] - half : -half;
        }
        return out;
    }
    DCNV4_DEVICE Place locate(int k) const {
        const int level = this->level(k);
        const int height = levels.height[level], width = levels.width[level];
        const Map map = this->map(level);
        const auto low = Vector<COORDINATES, COORDINATE_VECTOR>::load(coordinates + 2 * k);
        const Sum u = low[0], v = COORDINATE_VECTOR == 2 ? low[1] : load(coordinates + 2 * k + 1);
        return {corners(u * map.scale[0] + map.shift[0], v * map.scale[1] + map.shift[1], height,
                        width),
                levels.first[level], width};
    }
    DCNV4_DEVICE Sum logit(int k) const { return load(weights + k); }
};

}  // namespace dcnv4
