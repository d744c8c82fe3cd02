"""Which log an act belongs into: the signer's own, found from the key, and the site's in whose folder the files lie.

An enrolled party has a folder: keys in ``keys/``, the log in ``log/``, signed by ``keys/release``. Whoever has but a key
has the log beside it: ``KEY.log/``, signed by that key.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pixcell_core.errors import BadInputError
from pixcell_core.trust.keys import SigningKey, VerifyKey
from pixcell_core.trust.log import KEY_FILE, EventLog, LogEntry, read_entries

LOG_FOLDER, LOG_SUFFIX = "log", ".log"
RELEASE_KEY = "release"
"""In a party's folder of keys: the one that signs its log."""


def own_log(key_file: Path, folder: Path | None = None) -> EventLog:
    """The log of whoever signs with the key in `key_file`, begun at its first event.

    Args:
        folder: where the log lies, if elsewhere than said above. A log that the party's release key or the signing key
            began is gone on with; a new one is of the signing key.

    Raises:
        LogBrokenError: the log is another key's. BadInputError: it cannot be written where it would lie.
    """
    beside = key_file.parent / RELEASE_KEY
    home = key_file.parent.parent / LOG_FOLDER
    enrolled = key_file.parent.name == "keys" and (home / KEY_FILE).is_file() and beside.is_file()
    place = folder or (home if enrolled else key_file.with_name(key_file.name + LOG_SUFFIX))
    key = SigningKey.load(key_file)
    if beside.is_file() and (place / KEY_FILE).is_file():
        release = SigningKey.load(beside)
        if VerifyKey.load(place / KEY_FILE) == release.verify_key:
            key = release
    return _opened(place, key)


def log_of_site_around(paths: Iterable[Path]) -> EventLog | None:
    """The log of the party (a site, an enrolled auditor) in whose folder any of `paths` lies; None where none does.

    Raises:
        BadInputError: `site-log-closed`: there is such a log, and this user may not write into it.
    """
    for path in paths:
        for parent in path.resolve().parents:
            public = parent / LOG_FOLDER / KEY_FILE
            key_file = parent / "keys" / RELEASE_KEY
            if not public.is_file() or not key_file.parent.is_dir():
                continue
            if not os.access(key_file, os.R_OK) or not os.access(public.parent, os.W_OK):
                raise BadInputError(
                    f"These files lie in the folder of a site, and {public.parent} cannot be written by this user.",
                    hint="Run it as the site's own user, or give a copy of the tiles that lies elsewhere and --key, "
                    "which makes the run an event of your own log.",
                    code="site-log-closed",
                )
            return _opened(public.parent, SigningKey.load(key_file))
    return None


def append_to_each(logs: Iterable[EventLog | None], kind: str, data: dict[str, Any]) -> tuple[LogEntry, ...]:
    """Add one event to each of several logs, to each folder once; None is skipped."""
    by_folder = {log.folder.resolve(): log for log in logs if log is not None}
    return tuple(log.append(kind, data) for log in by_folder.values())


def same_log(left: EventLog, right: EventLog) -> bool:
    """Whether both are one log."""
    return left.folder.resolve() == right.folder.resolve()


def newest_of(folder: Path, kind: str, **facts: object) -> LogEntry | None:
    """The newest event of a kind whose data hold `facts`; None where there is none."""
    for entry in reversed(read_entries(folder)):
        if entry.kind == kind and all(entry.data.get(name) == value for name, value in facts.items()):
            return entry
    return None


def _opened(folder: Path, key: SigningKey) -> EventLog:
    try:
        return EventLog(folder, key)
    except OSError as error:
        raise BadInputError(
            f"The log {folder} cannot be opened: {error.strerror or error}.",
            hint="Name a folder you may write to: --log DIR.",
            code="log-not-openable",
        ) from error
