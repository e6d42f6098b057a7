"""What each kernel is told, said once.

From one list of a kernel's arguments come the structure that is compiled in front of its source,
and the bytes that it gets.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from typing import Union

Number = Union[float, "tuple[int, ...]"]

_CONV = """
    long long value_image, offset_mask_image, offset_mask_pixel;  // strides, in numbers
    INDEX pixel_bytes;                                            // stride of the value's pixels
    INDEX slices, images;                                         // B * Ho * Wo * G, and B
    SUM offset_scale;
    int height, width, out_height, out_width;
    int strip_tiles, strips;  // tiles of a strip, and strips of a column of tiles
"""
_ATTN = """
    long long value_image, coordinates_image, coordinates_query;  // strides, in numbers
    long long weights_image, weights_query;
    long long reference_image, reference_query, reference_level;
    long long length;          // S
    INDEX pixel_bytes;         // stride of the value's rows
    INDEX slices, queries;     // B * Q * G, and Q
    int sizes[2 * LEVELS];     // H and W of each level, where the host knows them
"""
ARGUMENTS = {
    "conv_forward": f"""
    const VALUE* value;              // [B, H, W, C]
    const OFFSET_MASK* offset_mask;  // [B, Ho, Wo, M]
    VALUE* output;                   // [B, Ho, Wo, C], contiguous
    unsigned char* leftover;         // [tiles, TILE_PARTS] after tiles, see leftover.cuh
{_CONV}""",
    "conv_backward": f"""
    const VALUE* value;              // [B, H, W, C]
    const OFFSET_MASK* offset_mask;  // [B, Ho, Wo, M]
    const VALUE* grad;               // [B, Ho, Wo, C]
    TOTAL* grad_value;               // [B, H, W, C], pixels SUMS_PIXEL apart, to be added to
    OFFSET_MASK* grad_offset_mask;   // [B, Ho, Wo, M], pixels evenly spaced
    SUM* fixed_point_scale;          // [B] where sums are of integers
    unsigned char* leftover;         // [tiles, TILE_PARTS] after tiles, see leftover.cuh
    long long grad_image, grad_pixel, grad_offset_mask_pixel;
    long long offset_mask_channels;  // M
{_CONV}""",
    "attn_forward": f"""
    const VALUE* value;              // [B, S, G, D]
    const COORDINATES* coordinates;  // [B, Q, G, L, P, 2], locations or offsets from reference
    const WEIGHTS* weights;          // [B, Q, G, L, P]
    const REFERENCE* reference;      // [B or 1, Q or 1, L or 1, REFERENCE_NUMBERS]
    VALUE* output;                   // [B, Q, C], contiguous
    const long long* shapes;         // [L, 2] where only the device knows the sizes
{_ATTN}""",
    "attn_backward": f"""
    const VALUE* value;              // [B, S, G, D]
    const COORDINATES* coordinates;  // [B, Q, G, L, P, 2], locations or offsets from reference
    const WEIGHTS* weights;          // [B, Q, G, L, P]
    const REFERENCE* reference;      // [B or 1, Q or 1, L or 1, REFERENCE_NUMBERS]
    const VALUE* grad;               // [B, Q, C]
    TOTAL* grad_value;               // [B, S, G, D], contiguous, to be added to
    COORDINATES* grad_coordinates;   // as coordinates, [B * Q, ...]
    WEIGHTS* grad_weights;           // as weights, [B * Q, ...]
    SUM* fixed_point_scale;          // [B] where sums are of integers
    const long long* shapes;         // [L, 2] where only the device knows the sizes
    long long grad_image, grad_query, grad_coordinates_row, grad_weights_row;
{_ATTN}""",
    "zeros": """
    uint4* sums;
    long long bytes;  // whole words
""",
    "fixed_point_scale": """
    const VALUE* grad;         // [B, ..., C], of the output
    const WEIGHTS* weights;    // [B, ...], the tensor that holds them
    unsigned* largest;         // [2 B + 1], zeros: two an image, and how many blocks are done
    float* fixed_point_scale;  // [B]
    long long grad_image, grad_row, weights_image, weights_row;  // strides
    INDEX rows;                // of an image
    int images, blocks;        // blocks: of an image
    int terms;                 // fewer than 2**terms are added
""",
    "convert_sums": """
    const TOTAL* sums;               // [B, count]
    const float* fixed_point_scale;  // [B] where sums are of integers
    VALUE* result;                   // as sums, or ROW of them together
    float* columns;                  // [COLUMNS], to be added to, or nothing
    long long result_row;            // stride of those
    INDEX count;
    int blocks;                      // of an image
""",
    "linear": """
    const INPUT* x;       // [rows, CHANNELS]
    const VALUE* weight;  // [WIDTH, CHANNELS]
    const VALUE* bias;    // [WIDTH], or nothing
    VALUE* rounded;       // [rows, CHANNELS], x in this type, or nothing
    VALUE* output;        // [rows, WIDTH]
    long long rows;
""",
    "mlp": """
    const VALUE* x;              // [rows, CHANNELS]
    const VALUE* norm_weight;    // [CHANNELS]
    const VALUE* norm_bias;      // [CHANNELS]
    const VALUE* fc1_weight;     // [HIDDEN, CHANNELS]
    const VALUE* fc1_bias;       // [HIDDEN]
    const VALUE* fc2_weight;     // [CHANNELS, HIDDEN]
    const VALUE* fc2_bias;       // [CHANNELS], or nothing
    VALUE* output;               // [rows, CHANNELS]
    long long rows;
    float eps;
""",
    "layer_norm_forward": """
    const VALUE* x;         // [rows, CHANNELS]
    const WEIGHTS* weight;  // [CHANNELS]
    const WEIGHTS* bias;    // [CHANNELS]
    VALUE* output;          // [rows, CHANNELS]
    long long rows;
    float eps;
""",
    "layer_norm_backward": """
    const VALUE* x;         // [rows, CHANNELS]
    const WEIGHTS* weight;  // [CHANNELS]
    const VALUE* grad;      // [rows, CHANNELS], of the output
    const VALUE* added;     // [rows, CHANNELS], to the gradient of x, or nothing
    VALUE* grad_x;          // [rows, CHANNELS]
    float* sums;            // [blocks, 2, CHANNELS], which make the gradients of weight and bias
    long long rows;
    float eps;
""",
}
"""What each kernel is told, members of a structure: tensors first, types in capitals are macros.
All kernels of an operator and direction are told the same."""

_CODES = {
    "int": "i",
    "unsigned": "I",
    "long long": "q",
    "unsigned long long": "Q",
    "float": "f",
    "double": "d",
}


def _arguments(name: str) -> str:
    """The members that kernel `name` is told."""
    return ARGUMENTS[re.sub("_tile|_sorted", "", name)]


def structure(name: str) -> str:
    """What comes in front of the source of kernel `name`."""
    return f"""#include <common/numbers.cuh>
namespace dcnv4 {{
struct Arguments {{{_arguments(name)}}};
}}
#line 1
"""


def starter(
    name: str,
    macros: Mapping[str, int | str],
    numbers: Mapping[str, Number],
    launch: Callable[[bytes], None],
) -> Callable[..., None]:
    """What launches kernel `name` with tensors, by keyword, or None in their place.

    Args:
        macros: types in capitals.
        numbers: the other arguments, by name.
        launch: gets the bytes of all arguments.
    """
    tensors, code, given = [], "", list[float]()
    for kind, members in re.findall(r"^ +(?:const )?([\w ]+\*?) (\w.*?);", _arguments(name), re.M):
        for member in re.findall(r"(\w+)(?:\[.*?\])?", members):
            if kind.endswith("*"):
                tensors.append(member)
                continue
            number = numbers[member]
            several = number if isinstance(number, tuple) else (number,)
            code += f"{len(several)}{_CODES[str(macros.get(kind, kind))]}"
            given += several
    tail = struct.pack(f"{code}0q", *given)
    pack = struct.Struct(f"{len(tensors)}P{len(tail)}s").pack
    # A function whose parameters have these names: as fast as one by position.
    addresses = ", ".join(f"0 if {name} is None else {name}.data_ptr()" for name in tensors)
    text = f"lambda {', '.join(tensors)}: launch(pack({addresses}, tail))"
    start: Callable[..., None] = eval(text, {"launch": launch, "pack": pack, "tail": tail})
    return start
