"""The code of a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pixcell_core.errors import PixcellError


def code(action: Callable[[], Any]) -> str:
    with pytest.raises(PixcellError) as refused:
        action()
    return refused.value.code
