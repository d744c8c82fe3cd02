"""What the tests of enrolment ask of a refusal and of a kit."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pixcell_core.contracts.enrolment import Kit
from pixcell_core.errors import PixcellError
from pixcell_core.trust.certificates import (
    read_authority,
)
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.kits import open_kit

NOW = datetime.now(UTC).replace(microsecond=0)


def code_of(act: Any, *arguments: Any, **more: Any) -> str:
    """The code of the refusal that `act` must meet."""
    with pytest.raises(PixcellError) as refused:
        act(*arguments, **more)
    assert refused.value.hint and refused.value.exit_code in (1, 4)
    return refused.value.code


def read_kit(path: Path, ca: Path) -> Kit:
    """A kit file, verified."""
    return open_kit(Envelope.load(path), read_authority(ca.read_bytes()))
