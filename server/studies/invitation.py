"""Invitations: for every site of a study one folder with the study file and a letter that says what it asks."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.contracts.masking import MIN_COHORT
from pixcell_core.contracts.study import Study
from pixcell_core.errors import RefusedError
from server.studies.overview import Planned

STUDY_FILE = "study.json"
LETTER = "letter.md"


class Invited(BaseModel):
    """Where the invitations lie; each folder goes to one site."""

    study: str
    digest: str
    folders: list[Path]

    def __str__(self) -> str:
        listed = "\n".join(f"  {folder}" for folder in self.folders)
        return (
            f"Invitations to study {self.study}, one folder per site:\n{listed}\n"
            f"Send each to its site, and read this digest over the phone:\n  {self.digest}"
        )


def write_invitations(
    study: Study, sites: dict[str, EnrolmentRequest], planned: Planned, out: Path
) -> Invited:
    """Write one folder per site into `out`. Raises `RefusedError` where another study's invitations lie there."""
    folders = [out / site for site in study.sites]
    for folder in folders:
        there = folder / STUDY_FILE
        if there.is_file() and there.read_bytes() != study.to_bytes():
            raise RefusedError(
                f"{folder} holds the invitation to another study.",
                hint="Give --out a folder of its own for every study.",
                code="invitation-exists",
            )
    for site, folder in zip(study.sites, folders, strict=True):
        write_atomically(folder / STUDY_FILE, study.to_bytes())
        write_atomically(folder / LETTER, letter(study, sites[site], planned).encode())
    return Invited(study=study.id, digest=study.digest, folders=folders)


def letter(study: Study, site: EnrolmentRequest, planned: Planned) -> str:
    """What one site's admin reads before the decision: what is asked, what to compare, what to run. Markdown."""
    votes = study.conditioning.votes
    conditions = (
        f"`{study.conditioning.mode}`"
        if votes is None
        else f"`private`: {votes.iterations} rounds of patients' votes, charged to the same cap"
    )
    passes = "" if planned.within_cap else "\n**The plan passes the cap: the last rounds will be refused.**"
    return f"""# Invitation of {site.site} to study {study.id}

{_one_line(study.title) or "No title was given."}

## What it asks

| | |
|---|---|
| rounds | {study.rounds}, each of {study.steps_per_round} private steps |
| sites | {", ".join(study.sites)}; a round counts with {study.quorum} of them |
| patients per step | each with chance {study.sample_rate:g} |
| tiles per patient and step | {study.tiles_per_patient} of {study.tile_size} px at {study.mpp:g} microns per pixel |
| noise | sigma {study.noise_multiplier:g} x C, C = {study.max_grad_norm:g} per patient |
| what leaves the site | {_leaves(study)} |
| what may steer surrogates | {conditions} |
| a round waits | {_waits(study)} |
| valid until | {study.expires_at:%Y-%m-%d %H:%M} UTC |

## What it costs each patient

Planned for all rounds: {planned.statement}.

The cap that you approve: epsilon {study.epsilon_cap:g} per patient at delta {study.delta:g}.
Your own ledger refuses every round that would pass it.{passes}

## Compare by phone

Call the coordinator at a number you know. Both sides read aloud; every character must be the same.

- study: `{study.digest}`
- base model: `{study.base_digest}`
- training code: `{study.code_digest}`
- app that the hub announces: `{study.app_digest or "not fixed by this study"}`
- your own key as the coordinator holds it: `{site.fingerprint}`
{_identities(study)}
## Decide

```
pixcell site approve {STUDY_FILE} --site-dir SITE     # shows the digest again, asks, signs
pixcell site deny {STUDY_FILE} --site-dir SITE        # or says no
pixcell site start --site-dir SITE --with-trainer --base BASE
pixcell site budget show --site-dir SITE              # what your patients have been used for
pixcell site revoke {STUDY_FILE} --site-dir SITE      # later: takes effect at the next round
```

A changed study has another digest and needs another approval. Nobody can approve for you.
"""


def _leaves(study: Study) -> str:
    masking = study.aggregation.masking
    if masking is None:
        return "one noised update of the adapter per round, and nothing measured; the coordinator sees it"
    return (
        "one noised update of the adapter per round under masks: the coordinator sees the sum of at least "
        f"{max(masking.threshold, MIN_COHORT)} sites"
    )


def _waits(study: Study) -> str:
    text = f"at most {study.round_timeout_s:g} s"
    if study.straggler_rule == "grace":
        text += f", and {study.straggler_grace_s:g} s more once {study.quorum} sites have answered"
    return text


def _identities(study: Study) -> str:
    masking = study.aggregation.masking
    if masking is None:
        return ""
    rows = "\n".join(f"- {key.site}: `{key.key_id}`" for key in masking.identities)
    return (
        "\nYou mask with these sites. Call each of them; it reads what `pixcell key show SITE/keys/approval.pub` "
        f"prints there:\n\n{rows}\n"
    )


def _one_line(text: str) -> str:
    """A title without line breaks or marks that Markdown would act on."""
    return "".join(c for c in text if c.isprintable() and c not in "`*_[]<>#|")
