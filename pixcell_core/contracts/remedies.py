"""What to do about a site that does not count: one sentence per code, in one place.

Codes come from the coordinator's screening, from a site's agent and from its trainer. A code without a remedy is a
defect, and a test looks for it in the code that gives them.
"""

from __future__ import annotations

from collections.abc import Mapping

_UPDATE_SITE = (
    "The site installs the release that the study was written for and restarts its agent and trainer."
)
_LEDGER = "The site's admin runs `pixcell site budget show` there and restores the newest copy of the ledger folder."
_NETWORK = "The site runs `pixcell site doctor`; it is asked again as soon as its agent is back."
_APPROVE = (
    "The site's admin reads the study and runs `pixcell site approve STUDY.json`; then start the run again."
)
_LOG = (
    "Both heads stand signed in the coordinator's log. The site explains, or is revoked: pixcell kit revoke."
)
_OWN_LOG = (
    "The coordinator's log was cut, put back or written anew. Restore DIR/log, or explain it to the sites."
)
_TRAINER_LOG = (
    "The site's admin reads the trainer's log; once it is mended the site is asked again in the next round."
)
_MASK_AGAIN = "It is asked again with the next attempt; if it repeats, start the run again."
_COMPARE_RELEASES = "The site sent nothing. Compare both releases; if they agree, somebody changes messages."
_LEFT_PROTOCOL = (
    "Compare the site's release; if it is the study's, ask its admin before the site takes part again."
)
_NEW_STUDY = "Create the study again under a new --id from the keys the sites were enrolled with."

REMEDIES: Mapping[str, str] = {
    "ok": "Nothing is wrong.",
    # The coordinator's view of a site that was not asked, or did not answer in time.
    "not-enrolled": "Enrol the site: it runs `pixcell site enroll` and sends its request.",
    "not-connected": _NETWORK,
    "not-seen": "Send the site its invitation; its approval is seen when a run is started and the site is connected.",
    "not-ready": "See what the site lacks with `pixcell run watch`; it is asked again in the next round.",
    "not-sent": "The hub did not take the message. See the hub's log; the site is asked again in the next round.",
    "deadline": "Ask the site how long a round takes there; a new study may give a longer --round-timeout.",
    "straggler": "The site was slower than the grace after the quorum; a new study may give a longer grace.",
    "no-answer": "The site's agent could not answer; its own log says why.",
    "dropped-out": "The site was gone before the hub was started again; it is asked in the next round.",
    # The reply on its way.
    "site-offline": _NETWORK,
    "site-failed": "The site's admin reads the agent's log; it is asked again in the next round.",
    "message-failed": "The exchange broke off. If it happens again, both sides run their doctor commands.",
    # The reply's form and content.
    "extra-record": _UPDATE_SITE,
    "bad-form": _UPDATE_SITE,
    "other-study": "The site answered for another study. It restarts its agent; if it repeats, call its admin.",
    "stale": "An answer to an earlier round came late. The site is asked again in the next round.",
    "other-input": "The site trained from another adapter than the one sent. It restarts its agent and trainer.",
    "tensor-names": _UPDATE_SITE,
    "tensor-dtype": _UPDATE_SITE,
    "tensor-shape": "The site's base model or adapter targets differ from the study's; compare the base's digest.",
    "tensor-rank": "The site trains an adapter of another rank. All sites of a study use the study's rank; restart "
    "its trainer with the study's settings.",
    "tensor-damaged": "The update was damaged on its way or made up. If it repeats, call the site's admin.",
    "not-finite": "Training diverged at the site. A lower learning rate needs a new study.",
    "norm-bound": "The update is longer than any honest one. Call the site's admin before it takes part again.",
    # The masked round: a site's refusal of what the hub asks, or the hub's of what a site answered.
    "already-opened": "Restore the newest copy of the run's folder: the site opened this round's sum already.",
    "other-survivors": "The site opens one list of survivors alone. Restore the newest copy of the run's folder.",
    "stale-attempt": _MASK_AGAIN,
    "out-of-order": _MASK_AGAIN,
    "other-round": _MASK_AGAIN,
    "too-few-sites": "Bring more sites up; a sum of fewer than the study's threshold is opened by nobody.",
    "keys-altered": _COMPARE_RELEASES,
    "keys-not-signed": _COMPARE_RELEASES,
    "sharers-altered": _COMPARE_RELEASES,
    "survivors-altered": _COMPARE_RELEASES,
    "survivors-not-signed": _COMPARE_RELEASES,
    "unknown-site": _COMPARE_RELEASES,
    "not-masked": _COMPARE_RELEASES,
    "masking-missing": _COMPARE_RELEASES,
    "weak-key": "The site whose key it is runs broken or hostile software. Ask its admin which release it is.",
    "bad-answer": _LEFT_PROTOCOL,
    "wrong-share": _LEFT_PROTOCOL,
    "inconsistent-shares": "That site left the protocol. Create a study under a new --id without it.",
    "other-identity": _NEW_STUDY,
    "threshold-too-low": "Create the study again under a new --id with --threshold above half of its sites.",
    "masking-state-broken": "The site's admin restores agent/masking/ from its newest copy and never deletes it.",
    # Refusals of the site.
    "not-approved": _APPROVE,
    "approval-denied": "The site said no. Only its admin can change the answer.",
    "approval-withdrawn": "The site withdrew its approval. Only its admin can approve again.",
    "approval-expired": "Make a study with a later end, or ask the site to approve again.",
    "approval-superseded": "The site decided again since; its admin sees the decisions with `pixcell site studies`.",
    "app-not-approved": "Start the run with the release that the study was made with.",
    "approval-of-another-study": "The approval is for another version of the study; the site approves this one.",
    "approval-of-another-site": "The approval names another site; each site signs for itself.",
    "approval-too-wide": "The approval allows more than the study asks for; the site approves the study file again.",
    "bad-envelope": "The approval is damaged; the site approves the study file again.",
    "bad-document": _UPDATE_SITE,
    "signature-refused": "The approval is not signed by the key the site was enrolled with. Call its admin.",
    "study-altered": "The study was changed on its way. Compare its digest with the site by phone.",
    "unknown-study": "The site was not asked about the study since its agent's folder was made; start the run again.",
    "adapter-altered": "The adapter was changed on its way to the site. Look for a proxy that rewrites traffic.",
    "adapter-mismatch": "The adapter does not fit the site's base model; compare the base's digest.",
    "base-differs": "The site fetches the study's base model and starts its trainer with --base.",
    "code-differs": _UPDATE_SITE,
    "features-differ": "The site extracts its features again with the study's tile size and resolution.",
    "no-trainer": "The site starts its trainer: pixcell site trainer.",
    "trainer-starting": "Wait: the site's trainer is loading the model.",
    "trainer-lost": _TRAINER_LOG,
    "trainer-failed": _TRAINER_LOG,
    "bad-spool": "The site's admin looks at the spool folder: disk space, permissions, release of the trainer.",
    "site-refused": "The site refused for a reason of its own; its own log says which.",
    "refused": "The site refused for a reason of its own; its own log says which.",
    "budget-exceeded": "The site's privacy budget does not cover the round. It takes no further part in this study.",
    "study-budget-exceeded": "The study's budget does not cover the round at this site: rounds that were trained "
    "twice were charged twice.",
    "log-forked": _LOG,
    "log-rolled-back": _LOG,
    "log-not-offered": "The site runs `pixcell log verify SITE/log` and restores the newest copy of that folder.",
    "log-key-changed": _LOG,
    "coordinator-log-forked": _OWN_LOG,
    "coordinator-log-rewritten": _OWN_LOG,
    "ledger-rewound": _LEDGER,
    "clock-backwards": "The site corrects its clock.",
    "ledger-broken": _LEDGER,
    "ledger-busy": "Another program at the site holds its privacy ledger; it is asked again in the next round.",
    "ledger-changed": _LEDGER,
    "ledger-key-missing": _LEDGER,
    "ledger-of-another-site": _LEDGER,
    "ledger-unreadable": _LEDGER,
    "ledger-write": "The site's admin looks at the ledger folder: disk space and permissions.",
    "witness-broken": _LEDGER,
    "witness-unwritten": "The site's admin looks at the folder of the ledger's witness: disk space, permissions.",
}
"""Remedy per code."""

UNKNOWN = "Both sides run their doctor commands and update to the same release; the code is not known here."


def remedy_of(code: str) -> str:
    """What to do about an exclusion of this code; a general sentence where a newer peer sent one not known here."""
    return REMEDIES.get(code, UNKNOWN)
