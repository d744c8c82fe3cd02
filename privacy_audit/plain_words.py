"""A question and an answer per test for readers who are no statisticians: a lawyer, a data-protection officer."""

from __future__ import annotations

from privacy_audit.result import Status, TestResult

_SENTENCES = (
    (
        "training and holdout disjoint",
        "Does anybody stand on both sides of the comparison, so that a leak could hide in it?",
    ),
    (
        "enough patients and tiles",
        "Were there enough patients and pictures for the other answers to mean something?",
    ),
    (
        "holdout drawn before training",
        "Were the patients used for comparison set aside before the generator learnt anything?",
    ),
    (
        "filtered release",
        "Some pictures were withheld after a first audit: were they few, and was everything tested again on the rest?",
    ),
    (
        "self-test: planted copies",
        "Real copies were hidden among the pictures: did the audit find them, so that its silence means something?",
    ),
    (
        "self-test: tissue of training patients",
        "Other pictures of the same patients were mixed in: from how many on would the audit notice the patients?",
    ),
    (
        "near-duplicate training tiles",
        "How many of the hospital's own pictures show the same place twice, so that none is counted double?",
    ),
    ("self-test", "Harmless pictures were mixed in: did the audit leave them alone?"),
    (
        "differential privacy",
        "If a mathematical privacy promise was made, this asks whether the records and an attack contradict it.",
    ),
    (
        "patient membership (closest tile)",
        "Could someone who holds a patient's pictures tell from the release whether that patient took part?",
    ),
    (
        "membership by weights: control",
        "Does the same attack find nothing in a model that saw nobody here, as it must before it may accuse?",
    ),
    (
        "membership by weights",
        "Could someone who holds the generator itself tell which patients it learnt from?",
    ),
    ("exact copies", "Is any released picture simply a real patient's picture, perhaps turned or mirrored?"),
    (
        "near copies",
        "Is any released picture a real patient's picture in disguise: recoloured, blurred, compressed or moved?",
    ),
    (
        "conditioning pairs",
        "Each picture was drawn after the description of a real one: does it redraw that one?",
    ),
    (
        "isolated patients: near copies",
        "Are the pictures of unusual patients, who are easiest to recognise, copied more than others?",
    ),
    ("isolated patients: attribution", "Does the release point to unusual patients more than chance would?"),
    ("rare classes", "Is there a diagnosis so rare among these patients that it could name them?"),
    (
        "cliques of released tiles",
        "Does the generator draw the same picture again and again, as one does who knows it by heart?",
    ),
    (
        "human review",
        "Does a pathologist, shown suspicious and harmless pairs without knowing which is which, see the same tissue twice?",
    ),
    (
        "patient tail asymmetry",
        "Do some released pictures lie nearer to patients who took part than any does to patients who did not?",
    ),
    (
        "linkability",
        "Could a determined person with one picture of a patient find that patient's other pictures through the release?",
    ),
    (
        "burnt-in text",
        "Does any released picture show handwriting, printed letters, pen marks or a piece of a slide label?",
    ),
    (
        "context",
        "A number that other tools report, shown so that readers can compare; it decides nothing here.",
    ),
)


_ANSWERS = {
    Status.PASS: "This point is in order, as far as this run could see.",
    Status.REVIEW: "This run can neither clear nor condemn this point: a named person has to decide.",
    Status.FAIL: "This point is not in order: the release must not leave.",
    Status.INVALID: "The audit may hold no opinion until this point is mended and it is run again.",
}


def answer(test: TestResult) -> str:
    """What the outcome of a test means for the release, without a number."""
    if not test.tested:
        return "Nobody knows: this was not tested." + (
            " The policy demands the test, so a named person has to decide." if test.gating else ""
        )
    return _ANSWERS[test.status] if test.gating else "For information: the verdict does not rest on this."


def sentence(name: str) -> str:
    """The question a test answers, by the longest beginning of its name that is known; empty for an unknown test."""
    known = [(len(start), words) for start, words in _SENTENCES if name.startswith(start)]
    return max(known, default=(0, ""))[1]
