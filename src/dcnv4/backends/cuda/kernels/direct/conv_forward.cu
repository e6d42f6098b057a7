// deform_conv, gathered straight from memory.
//
// Work: LANES threads a slice; slices of a block lie side by side, group after group, then pixel
// after pixel, so that the windows of a block overlap. After the tile kernel, its leftover.
// Memory: every offset and weight once, every output once, and 4*K vectors of channels a slice out
// of L1 mostly, since the windows of neighbouring pixels overlap.
// Limit: L1, which serves rows shorter than its 128-byte lines at about half its rate: its data
// pipe is 87 % busy for 16 channels in float16 on an H200, the issue slots 63 %. Not device memory.
#include <common/leftover.cuh>
#include <direct/gather.cuh>

using namespace dcnv4;

// Blocks for which an SM must have registers: as many as there are after tiles, where points may
// lie far apart, and more would spoil each other's L1.
constexpr int OCCUPANCY = AFTER_TILES          ? GATHERING_THREADS / MAX_THREADS
                          : sizeof(VALUE) == 2 ? 4
                                               : 0;

extern "C" __global__ void __launch_bounds__(MAX_THREADS, OCCUPANCY) conv_forward(Arguments a) {
    each_slice(a, [&](const Slice& slice, const OutputPixel& at) {
        gather_slice(a, ConvPoints(a, at, slice.group), at.image, slice);
    });
}
