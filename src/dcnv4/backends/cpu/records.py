"""What the kernels are told, said once: a record is packed by name here, and a C++ structure there.

Every member has 64 bits, so that nothing is padded.
"""

from __future__ import annotations

import struct

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Record:
    """A structure: of each member its C++ type, or the record that it is, and what it holds."""

    name: str
    text: str
    """In C++."""
    size: int
    """In bytes."""

    def __init__(self, name: str, members: dict[str, tuple[str | Record, str]]) -> None:
        codes, lines = "", [f"struct {name} {{"]
        absent: dict[str, float | bytes] = {}
        for member, (kind, meaning) in members.items():
            if isinstance(kind, Record):
                codes, absent[member], kind = codes + f"{kind.size}s", b"", kind.name
            else:
                codes, absent[member] = codes + ("d" if kind == "double" else "q"), 0
            lines.append(f"    {kind} {member};" + (meaning and f"  // {meaning}"))
        self.name, self.size = name, struct.calcsize(codes)
        lines += ["};", f"static_assert(sizeof({name}) == {self.size});"]
        self.text = "\n".join(lines)
        self._absent = absent
        self._pack = struct.Struct(codes).pack

    def pack(self, **values: float | bytes) -> bytes:
        """The bytes of the structure; a member that is not named is 0."""
        members = self._absent | values
        if len(members) != len(self._absent):
            raise TypeError(f"{self.name} has no {', '.join(values.keys() - self._absent.keys())}")
        return self._pack(*members.values())


TENSORS = {
    "value": "[images, pixels, groups, depth]",
    "offsets": "[images, rows, columns, groups, levels, points, 2]: x, y",
    "weights": "[images, rows, columns, groups, levels, points]",
    "output": "[images, rows, columns, groups, depth]; backwards, its gradient",
    "grad_value": "as value",
    "grad_offsets": "as offsets",
    "grad_weights": "as weights",
}

VIEW = Record(
    "View",
    {
        "dtype": ("Dtype", "of a tensor"),
        "image": ("int64_t", "from an image to the next, in elements"),
        "row": ("int64_t", "from a row of output pixels to the next"),
        "column": ("int64_t", "from an output pixel, or one of the value, to the next"),
        "group": ("int64_t", "from a group to the next"),
    },
)

PROBLEM = Record(
    "Problem",
    {
        **{name: (VIEW, shape) for name, shape in TENSORS.items()},
        "images": ("int64_t", ""),
        "pixels": ("int64_t", "of one image of the value"),
        "rows": ("int64_t", "of output pixels; 1 for queries"),
        "columns": ("int64_t", "of output pixels; queries"),
        "groups": ("int64_t", ""),
        "depth": ("int64_t", "channels of a group"),
        "levels": ("int64_t", ""),
        "points": ("int64_t", "of a slice in each level"),
        "softmax": ("int64_t", "whether the weights are logits"),
        "clipped": ("int64_t", "whether levels may leave the value"),
        "origin_x": ("int64_t", "pixel of the value at the centre of output pixel (0, 0)"),
        "origin_y": ("int64_t", ""),
        "step_x": ("int64_t", "from an output pixel's centre to the next one's; 0 for queries"),
        "step_y": ("int64_t", ""),
        "shift": ("double", "of every point, in pixels"),
    },
)

POINT = Record(
    "Point",
    {
        "x": ("double", "undeformed, from the centre"),
        "y": ("double", ""),
        "scale_x": ("double", "pixels to an offset of 1"),
        "scale_y": ("double", ""),
        "height": ("int64_t", "of its level"),
        "width": ("int64_t", ""),
        "start": ("int64_t", "the level's first pixel in the value"),
    },
)

CALL = Record(
    "Call",
    {
        **dict.fromkeys(TENSORS, ("char*", "its first element")),
        "threads": ("int64_t", ""),
        "forked": ("int64_t", "whether this process is a child without its parent's threads"),
    },
)

HEADER = "\n\n".join(
    (
        "// Made by records.py.",
        "#pragma once",
        "#include <cstdint>",
        "namespace dcnv4 {",
        f"enum Dtype : int64_t {{ {', '.join(str(d).removeprefix('torch.') for d in DTYPES)} }};",
        *(record.text for record in (VIEW, PROBLEM, POINT, CALL)),
        "}  // namespace dcnv4\n",
    )
)
"""`records.h`, which the kernels include."""
