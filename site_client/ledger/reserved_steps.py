"""The steps of one round, each charged when it is asked for, none twice, none given back."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from pixcell_core.errors import RefusedError


class StepNotReservedError(RefusedError):
    """A step was asked for that the round does not have, or a second time."""

    default_code = "step-not-reserved"


class ReservedSteps:
    """The steps of one round. Called with each step's index, from 0; returns when it is charged on disk.

    Args:
        steps: how many the round has.
        at_a_time: steps charged together.
        charge: writes a charge of so many steps and returns its sequence number once it is on disk.
        note: notes, for the reader, the first charge's number, the steps charged and the steps taken.
    """

    def __init__(
        self,
        steps: int,
        at_a_time: int,
        charge: Callable[[int], int],
        note: Callable[[int, int, int], None],
    ) -> None:
        self._steps = steps
        self._at_a_time = at_a_time
        self._charge = charge
        self._note = note
        self._taken = 0
        self._reserved = 0
        self._first: int | None = None
        self._closed = False

    @property
    def steps_reserved(self) -> int:
        """Steps of this round charged so far."""
        return self._reserved

    def __call__(self, step_index: int) -> None:
        """Charge step `step_index`, waiting for the disk where it is the first of a block.

        Raises:
            StepNotReservedError: it is not the next one, the round has no such step, or the round is closed.
        """
        if self._closed or step_index != self._taken or step_index >= self._steps:
            raise StepNotReservedError(
                f"Step {step_index} was not reserved: step {self._taken} of {self._steps} is next, "
                "each step is charged once, and a finished round gives no more.",
                hint="Reserve a new round for further steps; a repeated step is a new charge.",
            )
        if self._taken == self._reserved:
            block = min(self._at_a_time, self._steps - self._reserved)
            sequence = self._charge(block)
            self._first = sequence if self._first is None else self._first
            self._reserved += block
        self._taken += 1

    def close(self) -> None:
        """Record how many reserved steps were taken. Gives nothing back; harmless when done twice."""
        if self._closed:
            return
        self._closed = True
        if self._first is not None:
            self._note(self._first, self._reserved, self._taken)

    def __enter__(self) -> ReservedSteps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
