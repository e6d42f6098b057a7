"""Not built yet."""

from .. import Call


def why_not(call: Call) -> str | None:
    return "is not built yet"
