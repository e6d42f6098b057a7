"""What the kernels are told, said once: records, in C++ structures, packed here by name."""

from __future__ import annotations

import re
import struct

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Record:
    """A structure of these members, each of 64 bits, so that nothing is padded.

    Args:
        members: in C++; the type of one may be another record, which is packed already.
        nested: these other records.
    """

    name: str
    text: str
    """The structure in C++."""
    size: int
    """Bytes."""

    def __init__(self, name: str, members: str, *nested: Record) -> None:
        sizes = {record.name: record.size for record in nested}
        codes = ""
        self._absent: dict[str, float | bytes] = {}
        for kind, names in re.findall(r"^ *([\w*]+) ([\w, ]+);", members, re.MULTILINE):
            code = f"{sizes[kind]}s" if kind in sizes else "d" if kind == "double" else "q"
            for member in names.split(", "):
                codes += code
                self._absent[member] = b"" if kind in sizes else 0
        self._pack = struct.Struct(codes).pack
        self.name, self.size = name, struct.calcsize(codes)
        check = f"static_assert(sizeof({name}) == {self.size});\n"
        self.text = f"struct {name} {{{members}}};\n{check}"

    def pack(self, **values: float | bytes) -> bytes:
        """The bytes of the structure; a member that is not named is 0."""
        members = self._absent | values
        if len(members) != len(self._absent):
            raise TypeError(f"{self.name} has no {', '.join(values.keys() - self._absent.keys())}")
        return self._pack(*members.values())


_TENSORS = """
    TENSOR value;         // [images, pixels, groups, depth]
    TENSOR offsets;       // [images, rows, columns, groups, levels, points, 2]: x, y
    TENSOR weights;       // [images, rows, columns, groups, levels, points]
    TENSOR output;        // [images, rows, columns, groups, depth]; backwards, its gradient
    TENSOR grad_value;    // as value
    TENSOR grad_offsets;  // as offsets
    TENSOR grad_weights;  // as weights
    TENSOR reference;     // [images, rows, columns, levels, 2 or 4], in what sums are made in
"""
TENSORS = re.findall(r"TENSOR (\w+)", _TENSORS)

VIEW = Record(
    "View",
    """
    Dtype dtype;
    // Strides, in elements. column: of the value's pixels too; group: of the reference's levels.
    int64_t image, row, column, group;
""",
)
PROBLEM = Record(
    "Problem",
    _TENSORS.replace("TENSOR", "View")
    + """
    int64_t images, rows, columns, groups, depth;  // columns: queries, in one row
    int64_t pixels;                                // of one image of the value
    int64_t levels, points;                        // points of a slice in each level
    int64_t softmax;                               // whether the weights are logits
    int64_t origin_x, origin_y;  // pixel of the value at the centre of output pixel (0, 0)
    int64_t step_x, step_y;      // from there to the next output pixel's; 0 for queries
    double shift;                // of every point, in pixels
    int64_t reference_numbers;   // 2 of a point that offsets start from, 4 of a box, 0 without
""",
    VIEW,
)
POINT = Record(
    "Point",
    """
    double x, y;              // undeformed, in pixels from the centre
    double scale_x, scale_y;  // pixels of an offset of 1; of boxes, by their width and height
    int64_t height, width;    // of its level
    int64_t start;            // the level's first pixel in the value
""",
)
CALL = Record(
    "Call",
    _TENSORS.replace("TENSOR", "char*")
    + """
    int64_t threads;
    int64_t forked;  // whether this process is a child, without its parent's threads
""",
)

HEADER = f"""\
// Made by records.py.
#pragma once

#include <cstdint>

namespace dcnv4 {{

enum Dtype : int64_t {{ {", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)} }};

{VIEW.text}
{PROBLEM.text}
{POINT.text}
{CALL.text}
}}  // namespace dcnv4
"""
"""`records.h`, which the kernels include."""
