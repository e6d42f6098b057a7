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
    long long value_image;        // strides, in numbers but for pixel_bytes
    long long offset_mask_image;
    long long offset_mask_pixel;
    INDEX pixel_bytes;            // of the value
    INDEX slices;                 // B * Ho * Wo * G
    INDEX images;                 // B
    SUM offset_scale;
    int height;
    int width;
    int out_height;
    int out_width;
    int strip_tiles;              // of each strip of tiles
    int strips;                   // of a column of tiles
"""
_ATTN = """
    long long value_image;        // strides, in numbers but for pixel_bytes
    long long locations_image;
    long long locations_query;
    long long weights_image;
    long long weights_query;
    long long length;             // S
    INDEX pixel_bytes;            // of the value
    INDEX slices;                 // B * Q * G
    INDEX queries;
    int sizes[2 * LEVELS];        // H, W of each level, where the host knows them
"""
_CONV_FORWARD = f"""
    const VALUE* value;              // [B, H, W, C]
    const OFFSET_MASK* offset_mask;  // [B, Ho, Wo, M]
    VALUE* output;                   // [B, Ho, Wo, C], contiguous
    unsigned char* leftover;         // [tiles, TILE_PARTS], or null without tiles: see leftover.cuh
{_CONV}"""
_CONV_BACKWARD = f"""
    const VALUE* value;              // [B, H, W, C]
    const OFFSET_MASK* offset_mask;  // [B, Ho, Wo, M]
    const VALUE* grad;               // [B, Ho, Wo, C]
    TOTAL* grad_value;               // [B, H, W, C], contiguous, to be added to
    OFFSET_MASK* grad_offset_mask;   // [B, Ho, Wo, M], contiguous
    const SUM* fixed_point_scale;    // [B], or null where sums are not of integers
    unsigned char* leftover;         // [tiles, TILE_PARTS], or null without tiles: see leftover.cuh
    long long grad_image;
    long long grad_pixel;
    long long offset_mask_channels;  // M
{_CONV}"""
_ATTN_FORWARD = f"""
    const VALUE* value;          // [B, S, G, D]
    const LOCATIONS* locations;  // [B, Q, G, L, P, 2]
    const WEIGHTS* weights;      // [B, Q, G, L, P]
    VALUE* output;               // [B, Q, C], contiguous
    const long long* shapes;     // [L, 2] where only the device knows the sizes, otherwise null
{_ATTN}"""
_ATTN_BACKWARD = f"""
    const VALUE* value;            // [B, S, G, D]
    const LOCATIONS* locations;    // [B, Q, G, L, P, 2]
    const WEIGHTS* weights;        // [B, Q, G, L, P]
    const VALUE* grad;             // [B, Q, C]
    TOTAL* grad_value;             // [B, S, G, D], contiguous, to be added to
    LOCATIONS* grad_locations;     // as locations, contiguous
    WEIGHTS* grad_weights;         // as weights, contiguous
    const SUM* fixed_point_scale;  // [B], or null where sums are not of integers
    const long long* shapes;       // [L, 2] where only the device knows the sizes, otherwise null
    long long grad_image;
    long long grad_query;
{_ATTN}"""
ARGUMENTS = {
    "conv_forward": _CONV_FORWARD,
    "conv_tile_forward": _CONV_FORWARD,
    "conv_backward": _CONV_BACKWARD,
    "conv_tile_backward": _CONV_BACKWARD,
    "conv_sorted_backward": _CONV_BACKWARD,
    "attn_forward": _ATTN_FORWARD,
    "attn_backward": _ATTN_BACKWARD,
    "attn_sorted_backward": _ATTN_BACKWARD,
    "zeros": """
    uint4* vectors;   // 16 bytes each
    long long bytes;  // of them, whole words
""",
    "fixed_point_scale": """
    const VALUE* grad;         // [B, ..., C], of the output
    const WEIGHTS* weights;    // [B, ...], the tensor that holds them
    unsigned* largest;         // [2 B + 1], zeros: two an image, and how many blocks are done
    float* fixed_point_scale;  // [B]
    long long grad_image;      // strides, in numbers
    long long grad_row;
    long long weights_image;
    long long weights_row;
    INDEX rows;                // of an image
    int images;
    int blocks;                // of an image
    int terms;                 // fewer than 2**terms are added
""",
    "convert_sums": """
    const TOTAL* sums;               // [B, count]
    const float* fixed_point_scale;  // [B], or null where sums are not of integers
    VALUE* result;                   // [B, count]
    long long count;                 // of an image
    int blocks;                      // of an image
""",
}
"""What each kernel is told: the members of a structure, tensors' addresses first. Types in capitals
are macros."""

_CODES = {
    "int": "i",
    "unsigned": "I",
    "long long": "q",
    "unsigned long long": "Q",
    "float": "f",
    "double": "d",
}


def structure(name: str) -> str:
    """What comes in front of the source of kernel `name`."""
    return (
        "#include <common/numbers.cuh>\n"
        f"namespace dcnv4 {{\nstruct Arguments {{{ARGUMENTS[name]}}};\n}}\n#line 1\n"
    )


def packer(
    name: str, macros: Mapping[str, int | str], numbers: Mapping[str, Number]
) -> Callable[..., bytes]:
    """What makes the bytes of kernel `name`'s arguments from the tensors' addresses, by keyword.

    Args:
        macros: types in capitals.
        numbers: the other arguments, by name.
    """
    members = re.findall(r"([\w ]+)(\*?) (\w+)(?:\[.*\])?;", ARGUMENTS[name])
    code, given = "", list[float]()
    for kind, pointer, member in members:
        if pointer:
            continue
        number = numbers[member]
        several = number if isinstance(number, tuple) else (number,)
        code += f"{len(several)}{_CODES[str(macros.get(kind.strip(), kind.strip()))]}"
        given += several
    tail = struct.pack(f"{code}0q", *given)
    addresses = ", ".join(member for _, pointer, member in members if pointer)
    pack = struct.Struct(f"{addresses.count(',') + 1}P{len(tail)}s").pack
    # A function whose parameters have these names: as fast as one by position.
    made: Callable[..., bytes] = eval(
        f"lambda {addresses}: pack({addresses}, tail)", {"pack": pack, "tail": tail}
    )
    return made
