"""UserError, the exception for user mistakes, and the test for out-of-memory errors."""

from __future__ import annotations


class UserError(ValueError):
    """User error: a mistake that the user can mend; its message names the file or field, the value and the fix.

    The commands print it as one line and exit with code 2; everything else that escapes is a bug and keeps its traceback.
    """


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error of this machine or its accelerator: torch's CPU allocator has no kind of its own."""
    said = str(error).lower()
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or (isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said))
