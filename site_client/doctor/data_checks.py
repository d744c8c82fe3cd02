"""Checks of what a site brings: slides, patients, tiles, approvals, the ledger and what is left of its budget."""

from __future__ import annotations

from collections import Counter
from functools import partial

from pixcell_core.contracts.spool import TrainerBeat
from pixcell_core.errors import BadInputError, PixcellError
from site_client.agent.handlers import alive
from site_client.agent.hub_client import WARN_DAYS
from site_client.agent.link_record import read_link
from site_client.agent.supervisor import FRESH_S
from site_client.approvals.book import ApprovalBook
from site_client.catalogue import Catalogue
from site_client.doctor.finding import Finding
from site_client.doctor.question import Question
from site_client.trainer.spool import Spool

PERMISSION = "slide-unreadable"
MISSING = ("slide-missing", "slides-missing")
NO_MPP = ("mpp-missing", "mpp-implausible")
SHOWN = 20


def check_slides(asked: Question) -> Finding:
    """Every slide opens; what may not be read is told apart from what is gone and from what is broken."""
    from site_client.catalogue.intake import check_slide
    from site_client.slides.parallel import default_workers, ordered_map

    told = partial(Finding, name="slides", private=True)
    with Catalogue(asked.folder.root) as catalogue:
        slides = catalogue.slides()
        errors = list(ordered_map(lambda s: check_slide(s, asked.deep), slides, default_workers()))
    if not slides:
        return told(status="skip", found="the catalogue holds no slide")
    formats = ", ".join(f"{n} {vendor}" for vendor, n in sorted(Counter(s.vendor for s in slides).items()))
    assumed = sum(s.mpp_assumed for s in slides)
    broken = [(s, e) for s, e in zip(slides, errors, strict=True) if e is not None]
    if broken:
        kinds = Counter(_kind(error) for _, error in broken)
        found = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        return told(
            status="fail",
            found=f"{len(slides)} slides ({formats}): {found}",
            details=tuple(f"[{e.code}] {s.public_name}: {e.message}" for s, e in broken[:SHOWN]),
            remedy="May not be read: give this user the right. Gone: restore or re-add. Broken: copy again.",
        )
    if assumed:
        return told(
            status="warn",
            found=f"{len(slides)} slides ({formats}) open; {assumed} name no microns per pixel, yours is assumed",
            remedy="Check the assumed value against the scanner's.",
        )
    return told(
        status="ok",
        found=f"{len(slides)} slides ({formats}) open, with their scale",
    )


def check_patients(asked: Question) -> Finding:
    """Enough patients for a promise to any of them."""
    from site_client.ledger.cohorts import SMALLEST_COHORT

    told = partial(Finding, name="patients", private=True)
    with Catalogue(asked.folder.root) as catalogue:
        everybody, split = catalogue.patients(), catalogue.split()
        train = len(catalogue.patients("train")) if split is not None else len(everybody)
    if train < SMALLEST_COHORT:
        return told(
            status="fail",
            found=f"{train} patients to train on; at least {SMALLEST_COHORT} are needed",
            remedy="Add slides of more patients; a cohort of one is refused.",
        )
    if split is None:
        return told(
            status="warn",
            found=f"{len(everybody)} patients, not yet split",
            remedy="Draw the holdout before anything is trained: pixcell site data split",
        )
    if asked.study is not None and not train / 4 <= asked.study.expected_patients <= train * 4:
        return told(
            status="warn",
            found=f"{train} patients to train on; study {asked.study.id} divides by {asked.study.expected_patients}",
            remedy="The study's divisor fits another size of site; tell the coordinator without the number.",
        )
    return told(status="ok", private=True, found=f"{train} patients to train on")


def check_tiles(asked: Question) -> Finding:
    """Patients of whom no tile was cut: they count nowhere, and nothing else says so."""
    told = partial(Finding, name="tiles", private=True)
    with Catalogue(asked.folder.root) as catalogue:
        plans = list(catalogue.tile_counts())
        if not plans:
            return told(status="skip", found="no slide was cut yet")
        lost = sorted(set(catalogue.patients()) - catalogue.patients_with_tiles())
    if lost:
        return told(
            status="warn",
            found=f"{len(lost)} patients have no tile",
            details=tuple(lost[:SHOWN]),
            remedy="Look at their slides: no tissue, out of focus, or another scale. They are not trained on.",
        )
    return told(status="ok", private=True, found="every patient has a tile")


def check_trainer(asked: Question) -> Finding:
    """Whether a trainer stands ready."""
    try:
        beat: TrainerBeat | None = Spool(asked.folder.spool).beat()
    except PixcellError:
        beat = None
    if beat is None or not alive(beat, asked.now):
        return Finding(name="trainer", status="skip", found="no trainer is running")
    if not beat.ready:
        return Finding(name="trainer", status="warn", found="the trainer is starting", remedy="Wait for it.")
    return Finding(name="trainer", status="ok", found="a trainer stands ready")


def check_heartbeat(asked: Question) -> Finding:
    """When the hub last accepted a heartbeat of this site's agent."""
    link = read_link(asked.folder.agent)
    age = None if link is None else link.age_s(asked.now)
    if age is None:
        return Finding(
            name="heartbeat", status="skip", found="the hub never accepted a heartbeat of this site"
        )
    if not -5.0 <= age <= FRESH_S:
        return Finding(
            name="heartbeat",
            status="warn",
            found=f"the hub last accepted a heartbeat {age:.0f} s ago",
            remedy="Start the agent, or see `pixcell site status` for what is wrong.",
        )
    return Finding(name="heartbeat", status="ok", found=f"the hub accepted a heartbeat {age:.0f} s ago")


def check_approvals(asked: Question) -> Finding:
    """Approved studies: until when, and whether they name the app this site lets in."""
    standings = ApprovalBook(asked.folder).studies(asked.now)
    valid = [s for s in standings if s.valid and s.approval is not None]
    if not valid:
        return Finding(name="approvals", status="skip", found="no study is approved here")
    nameless = [s.study.id for s in valid if s.study.app_digest is None]
    if nameless:
        return Finding(
            name="approvals",
            status="fail",
            found=f"approved, but naming no app: {', '.join(nameless)}. Their rounds are refused",
            remedy="Ask the coordinator for a study that names its app.",
        )
    soon = [
        f"{s.study.id} ({s.approval.expires_at:%Y-%m-%d})"
        for s in valid
        if s.approval is not None and (s.approval.expires_at - asked.now).days < WARN_DAYS
    ]
    if soon:
        return Finding(
            name="approvals",
            status="warn",
            found=f"{len(valid)} approved; ending within {WARN_DAYS} days: {', '.join(soon)}",
            remedy="Ask the coordinator whether they go on.",
        )
    return Finding(name="approvals", status="ok", found=f"{len(valid)} approved")


def check_ledger(asked: Question) -> Finding:
    """The privacy ledger: every record chained and signed, and none lost that somebody saw."""
    from site_client.ledger.site import ledger_folder, ledger_public_key, remembered_heads
    from site_client.ledger.view import read_ledger

    root = asked.folder.root
    view = read_ledger(ledger_folder(root), ledger_public_key(root))
    if not view.records and view.check.ok:
        return Finding(name="ledger", status="skip", found="this site has no privacy ledger yet")
    lost = [head for head in remembered_heads(root) if not view.contains(head)]
    if not view.check.ok or lost:
        return Finding(
            name="ledger",
            status="fail",
            found=str(view.check) if not view.check.ok else "the ledger is older than what it showed before",
            remedy="Restore the newest copy of the ledger folder; never delete it. pixcell site budget verify",
        )
    return Finding(name="ledger", status="ok", found=str(view.check))


def check_budget(asked: Question) -> Finding:
    """What is left of the site's epsilon, with its unit and delta."""
    from site_client.ledger.site import ledger_folder, ledger_public_key
    from site_client.ledger.view import read_ledger

    root = asked.folder.root
    view = read_ledger(ledger_folder(root), ledger_public_key(root))
    if view.cap is None or not view.check.ok:
        why = "this site has no privacy ledger yet" if view.check.ok else "the ledger does not verify"
        return Finding(name="budget", status="skip", found=why)
    spent = view.epsilon(view.cap.delta).value
    left = max(0.0, view.cap.epsilon - spent)
    found = (
        f"epsilon {left:.2f} of {view.cap.epsilon:g} per patient at delta {view.cap.delta:g} is left "
        f"(neighbouring cohorts differ in one patient; training and private conditions together)"
    )
    if left < 0.1 * view.cap.epsilon:
        return Finding(
            name="budget",
            status="warn",
            found=found,
            remedy="`pixcell site budget show --study FILE` says whether another round is admitted.",
        )
    return Finding(name="budget", status="ok", found=found)


DATA_CHECKS = (
    check_slides,
    check_patients,
    check_tiles,
    check_trainer,
    check_heartbeat,
    check_approvals,
    check_ledger,
    check_budget,
)


def _kind(error: BadInputError) -> str:
    if error.code == PERMISSION:
        return "may not be read"
    if error.code in MISSING:
        return "gone"
    if error.code in NO_MPP:
        return "without a usable scale"
    return "changed" if error.code == "slide-changed" else "broken"
