"""The one exception a user's mistake raises; the command line prints it without a traceback and exits with 2."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(Exception):
    """Something the user can put right: says what is wrong, where, and what to do.

    Args:
        what: What is wrong, one sentence without a final stop.
        where: The file, configuration key or line at fault; empty where ``what`` already names it.
        cure: What to type or change instead.
    """

    def __init__(self, what: str, *, where: str = "", cure: str = "") -> None:
        self.what, self.where, self.cure = what, where, cure
        lines = [f"{where}: {what}" if where else what]
        if cure:
            lines.append(f"  → {cure}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword arguments when a data-loading worker sends the error to its parent process."""
        return _rebuild, (self.what, self.where, self.cure)


def _rebuild(what: str, where: str, cure: str) -> UserError:
    return UserError(what, where=where, cure=cure)
