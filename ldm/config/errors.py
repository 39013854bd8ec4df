"""UserError, the exception for user mistakes; the test for out-of-memory errors, and what an error says in a line."""

from __future__ import annotations


class UserError(ValueError):
    """User error: a mistake that the user can mend; its message names the file or field, the value and the fix.

    The commands print it as one line and exit with code 2; everything else that escapes is a bug and keeps its traceback.
    """


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error of this machine or its accelerator: torch's CPU allocator has no kind of its own."""
    said = str(error).lower()
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    kind = kind or (isinstance(error, ImportError) and ("failed to map segment" in said or "cannot allocate memory" in said))  # a library
    return kind or (isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said))


def first_line(error: BaseException, most: int = 200) -> str:
    """What an exception says first, at most `most` characters of it; its kind where it says nothing, as EOFError does."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__
