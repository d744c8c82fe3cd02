"""The small tree of errors every package raises for things a person can cause.

PixcellError            the job failed                         exit 1
├─ RefusedError         a rule of the house said no            exit 1
├─ ConnectionFailedError  could not connect or authenticate    exit 2
├─ TimedOutError        waited as long as was allowed          exit 3
└─ BadInputError        an argument or a file is not usable    exit 4

Anything else that reaches the command line is a bug of ours and exits 5.
"""

from __future__ import annotations

from typing import ClassVar


class PixcellError(Exception):
    """A failure a person can understand: what happened (`message`), what to do (`hint`), which kind (`code`)."""

    exit_code: ClassVar[int] = 1
    default_code: ClassVar[str] = "failed"

    def __init__(self, message: str, *, hint: str, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code

    def __str__(self) -> str:
        return f"[{self.code}] {self.message} {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint, self.code))


def _rebuild(kind: type[PixcellError], message: str, hint: str, code: str) -> PixcellError:
    """Rebuild an error that crossed a process boundary (keyword-only arguments do not pickle by default)."""
    return kind(message, hint=hint, code=code)


class RefusedError(PixcellError):
    """A rule said no: a budget, a gate, an approval."""

    default_code = "refused"


class ConnectionFailedError(PixcellError):
    """A peer could not be reached or did not accept our credentials."""

    exit_code = 2
    default_code = "connection-failed"


class TimedOutError(PixcellError):
    """Something did not answer in the time allowed."""

    exit_code = 3
    default_code = "timed-out"


class BadInputError(PixcellError):
    """An argument, a setting or a file cannot be used as given."""

    exit_code = 4
    default_code = "bad-input"
