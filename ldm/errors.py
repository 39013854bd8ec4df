"""The one exception that a user's mistake raises."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend; its message names the file or field, the value and the fix.

    The commands print it as one line and exit with code 2; everything else that escapes is a bug and keeps its traceback.
    """
