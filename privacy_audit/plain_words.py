"""One sentence per test for readers who are no statisticians: a lawyer, a data-protection officer, an ethics board."""

from __future__ import annotations

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


def sentence(name: str) -> str:
    """The sentence for a test, by the longest beginning of its name that is known; empty for an unknown test."""
    known = [(len(start), words) for start, words in _SENTENCES if name.startswith(start)]
    return max(known, default=(0, ""))[1]
