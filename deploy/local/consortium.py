"""The demonstration's road: every stage is a command that a person of the consortium could type."""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.local.board import Board
from deploy.local.dishonest import plant_real_tiles
from deploy.local.plan import STUDY_ID, DemoPlan
from deploy.local.processes import Processes
from pixcell_core.private.accounting import GaussianEvent, calibrate_noise
from pixcell_core.procedural.tissue import TissueClass

CORES = 2
# Public settings of the demonstration's study, chosen once on drawn tissue that belongs to no site: patients' gradients
# there are 0.003 to 0.006 long, so that this C clips nearly all of them and no noise is added for nothing; a step is
# learning rate times C long, short enough for the noise that so few patients need.
MAX_GRAD_NORM = 0.002
LEARNING_RATE = 300
LABELS = tuple(sorted(kind.value for kind in TissueClass))
"""Public names of the classes that drawn tissue is labelled with."""
TARGETS = "attn1.to_v,attn1.to_out.0,attn2.to_v,attn2.to_out.0"
TWINS = "surrogates-base"
"""Folder of a site: its surrogates once more, drawn by the base alone."""


@dataclass
class SiteOutcome:
    """What became of one site."""

    name: str
    slides: int = 0
    patients: int = 0
    tiles: int = 0
    epsilon_value: float | None = None
    delta: float | None = None
    not_covered: str = ""
    verdict: str = ""
    flagged: list[str] = field(default_factory=list)
    planted: dict[str, str] = field(default_factory=dict)
    withheld: int = 0
    bundle: str = ""
    bundle_verified: bool = False
    why_refused: str = ""
    report: str = ""
    site_report: str = ""
    sheet: str = ""


class LocalConsortium:
    """Runs the stages of a plan; each finished command is remembered, so that a second run goes on."""

    def __init__(self, plan: DemoPlan, processes: Processes, board: Board) -> None:
        self.plan, self.run, self.board = plan, processes, board
        self.out = plan.out
        self.server = plan.out / "coordinator"
        self.outcomes = {name: SiteOutcome(name) for name in plan.names}
        self._turn = threading.Semaphore(CORES)

    def site(self, name: str) -> Path:
        """Folder of a site."""
        return self.out / name

    @contextmanager
    def _busy(self, who: str, what: str) -> Iterator[None]:
        with self._turn:
            self.board.say(who, what)
            yield

    def _each(self, act: Callable[[str], None], *others: Callable[[], None]) -> None:
        """Run `act` for every site and the other jobs, as many at a time as there are cores."""
        with ThreadPoolExecutor(len(self.plan.names) + len(others)) as pool:
            jobs = [pool.submit(act, name) for name in self.plan.names] + [
                pool.submit(other) for other in others
            ]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                self.run.abort()
                raise

    # --- slides, tiles, features; meanwhile the coordinator pretrains ----------------------------------------------

    def prepare(self) -> None:
        """Slides become tiles and features at each site; the coordinator continues the base on public tiles."""
        self._each(self._prepare_site, self._pretrain)

    def _prepare_site(self, name: str) -> None:
        plan, folder, number = self.plan, self.site(name), self.plan.names.index(name)
        where = ["--site-dir", str(folder)]
        slides, csv = folder / "slides", None
        if plan.slides is not None:
            slides, csv = plan.slides, plan.slides_csv
        else:
            with self._busy(name, f"drawing {plan.patients} slides"):
                self._call(name, "synthesise", ["site", "data", "synthesise", *where,
                    "--patients", str(plan.patients), "--seed", str(plan.seed + 1000 * number),
                    "--site-seed", str(plan.seed + number), "--size", str(plan.slide_size)])  # fmt: skip
        add = ["site", "data", "add", *where, "--slides", str(slides)]
        add += ["--csv", str(csv)] if csv else []
        add += ["--assume-mpp", str(plan.assume_mpp)] if plan.assume_mpp else []
        size = ["--tile-size", str(plan.tile_size), "--mpp", str(plan.mpp)]
        with self._busy(name, "reading slides, cutting tiles"):
            added = self._call(name, "add", add)["data"]
            self._call(name, "tile", ["site", "data", "tile", *where, *size])
        with self._busy(name, "drawing the holdout patients, before anything is trained"):
            self._call(name, "split", ["site", "data", "split", *where, "--seed", str(plan.seed + number),
                "--holdout-fraction", str(plan.holdout_fraction)])  # fmt: skip
        with self._busy(name, "encoding tiles"):
            features = self._call(name, "features", ["site", "features", *where, *size,
                "--tiles-per-patient", str(plan.tiles_per_patient)])["data"]  # fmt: skip
        outcome = self.outcomes[name]
        outcome.slides = int(added["added"]) + int(added["known"])
        outcome.patients = sum(int(p["patients"]) for p in features["parts"])
        outcome.tiles = sum(int(p["tiles"]) for p in features["parts"])

    def _call(self, who: str, what: str, arguments: list[str], **options: Any) -> dict[str, Any]:
        return self.run.call(f"{who}.{what}", arguments, **options)

    def _pretrain(self) -> None:
        plan = self.plan
        with self._busy("coordinator", f"pretraining on {plan.pretraining_tiles} public tiles"):
            self._call("coordinator", "pretrain", ["pretrain", "--out", str(self.out / "pretraining"),
                "--draw", str(plan.pretraining_tiles), "--steps", str(plan.pretraining_steps),
                "--tile-size", str(plan.tile_size), "--seed", str(plan.seed), "--threads", "1"])  # fmt: skip

    @property
    def base(self) -> Path:
        """The pretrained base that the study names."""
        return self.out / "pretraining" / "transformer"

    # --- enrolment, study, rounds -----------------------------------------------------------------------------------

    def enrol(self) -> Path:
        """Make the consortium, enrol the sites, write the study and let every site approve it; returns its file."""
        plan = self.plan
        folder = ["--dir", str(self.server)]
        hub_file = self.out / "hub-address"
        if not hub_file.exists():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                hub_file.write_text(f"127.0.0.1:{probe.getsockname()[1]}")
        with self._busy("coordinator", "making the consortium's keys"):
            sealed = ["--passphrase-file", str(self._passphrase())]
            self._call("coordinator", "init", ["init", *folder, *sealed])
        for name in plan.names:
            with self._busy(name, "enrolling"):
                enrolled = self._call(name, "enroll", ["site", "enroll", "--site-dir", str(self.site(name)),
                    "--name", name, "--hub", hub_file.read_text(), "--ca", str(self.server / "pki" / "ca.crt")])  # fmt: skip
                kit = self._call("coordinator", f"kit-{name}", ["kit", "approve", enrolled["data"]["request"],
                    *folder, *sealed, "--fingerprint", enrolled["data"]["fingerprint"]])  # fmt: skip
                self._call(name, "install-kit",
                    ["site", "install-kit", kit["data"]["kit"], "--site-dir", str(self.site(name))])  # fmt: skip
        conditions, votes = self._conditions()
        sigma = calibrate_noise(
            1.0, plan.rounds * plan.steps_per_round, plan.epsilon, plan.delta, already_spent=votes
        )
        sigma = math.ceil(sigma * 1e4) / 1e4  # rounded up, so that the last round stays within the cap
        study = self.out / "study.json"
        quorum = max(1, len(plan.names) - 1)
        with self._busy("coordinator", f"writing the study: noise multiplier {sigma:.2f}, q = 1"):
            self._call("coordinator", "study", ["study", "create", *folder, "--id", STUDY_ID, "--base", str(self.base),
                "--sites", ",".join(plan.names), "--rounds", str(plan.rounds), "--steps", str(plan.steps_per_round),
                "--sigma", f"{sigma:.4f}", "--clip", str(MAX_GRAD_NORM), "--delta", str(plan.delta),
                "--epsilon-cap", str(plan.epsilon), "--expected-patients", str(plan.training_patients),
                "--tiles-per-patient", "2", "--noise-draws", "1", "--learning-rate", str(LEARNING_RATE),
                "--rank", "4", "--targets", TARGETS, "--tile-size", str(plan.tile_size), "--mpp", str(plan.mpp),
                "--quorum", str(quorum), "--round-timeout", "180", "--out", str(study), *conditions])  # fmt: skip
        for name in plan.names:
            with self._busy(name, "approving the study"):
                self._call(
                    name,
                    "approve",
                    ["site", "approve", str(study), "--site-dir", str(self.site(name)), "--yes"],
                )
        return study

    def _passphrase(self) -> Path:
        """A random passphrase of the CA's key, in a file for this user alone, as a coordinator would keep it."""
        path = self.out / "passphrase"
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_urlsafe(24))
        return path

    @property
    def _candidates(self) -> Path:
        """Public embeddings that patients vote for, where the conditions are private."""
        return self.out / "candidates.safetensors"

    def _conditions(self) -> tuple[list[str], list[GaussianEvent]]:
        """Settings of the study's conditioning, and what private conditions will charge every site's patients."""
        plan = self.plan
        if plan.conditioning != "private":
            return ["--conditioning", plan.conditioning], []
        with self._busy("coordinator", "drawing public candidates to vote for"):
            made = self._call("coordinator", "candidates", ["site", "candidates", "make", "--draw",
                str(2 * plan.candidates), "--out", str(self._candidates), "--tile-size", str(plan.tile_size),
                "--mpp", str(plan.mpp), "--seed", str(plan.seed + 9000)])["data"]  # fmt: skip
        # The votes get their share of the cap, the training what is left of it.
        noise = calibrate_noise(1.0, plan.vote_iterations, plan.vote_share * plan.epsilon, plan.delta)
        noise = math.ceil(noise * 1e4) / 1e4
        votes = GaussianEvent(1.0, noise, plan.vote_iterations)
        settings = {
            "--conditioning": "private",
            "--votes-noise": f"{noise:.4f}",
            "--votes-iterations": str(plan.vote_iterations),
            "--labels": ",".join(LABELS),
            "--candidates-digest": str(made["digest"]),
        }
        return [word for pair in settings.items() for word in pair], [votes]

    def federate(self) -> Path:
        """Start hub, agents and trainers; run the rounds; stop them; returns the federated adapter."""
        arguments = [
            "run",
            "start",
            STUDY_ID,
            "--dir",
            str(self.server),
            "--wait",
            "--timeout",
            "900",
            "--poll",
            "0.1",
        ]
        kept = self.out / "adapter-path"
        if kept.exists() and Path(kept.read_text()).exists():
            return Path(kept.read_text())
        ready = self.out / "ready"
        ready.mkdir(exist_ok=True)
        port = (self.out / "hub-address").read_text().rsplit(":", 1)[1]
        try:
            self.board.say("coordinator", "starting the hub")
            self.run.background(
                "hub", ["hub", "start", "--dir", str(self.server), "--port", port], ready / "hub"
            )

            def start(name: str) -> None:
                self.board.say(name, "starting agent and trainer")
                self.run.background(f"{name}.agent", ["site", "start", "--site-dir", str(self.site(name)),
                    "--with-trainer", "--base", str(self.base), "--poll", "0.3"], ready / name, timeout=240)  # fmt: skip

            with ThreadPoolExecutor(len(self.plan.names)) as pool:
                for started in [pool.submit(start, name) for name in self.plan.names]:
                    started.result()
            self.board.say("coordinator", f"{self.plan.rounds} rounds of private fine-tuning")
            shown = self._call("coordinator", "run", arguments, once=False)["data"]
        finally:
            self.run.stop()
        adapter = Path(shown["adapter"])
        kept.write_text(str(adapter))
        return adapter

    # --- surrogates, audit, gate ------------------------------------------------------------------------------------

    def release(self, study: Path, adapter: Path) -> None:
        """Each site draws surrogates, is audited, and asks the gate."""
        self._call("auditor", "key", ["key", "new", str(self.out / "auditor.key")])
        self._each(lambda name: self._release_site(name, study, adapter))

    def _release_site(self, name: str, study: Path, adapter: Path) -> None:
        plan, folder, outcome = self.plan, self.site(name), self.outcomes[name]
        where, drawn = ["--site-dir", str(folder)], folder / "surrogates"
        voted = ["--candidates", str(self._candidates)] if plan.conditioning == "private" else []
        drawing = ["site", "generate", *where, *voted, "--count", str(plan.surrogates), "--base", str(self.base),
            "--study", str(study), "--steps", str(plan.sampler_steps), "--threads", "1",
            "--guidance-scale", str(plan.guidance_scale), "--seed", str(plan.seed)]  # fmt: skip
        with self._busy(name, f"drawing {plan.surrogates} surrogates"):
            self._call(name, "generate", [*drawing, "--out", str(drawn), "--adapter", str(adapter)])
        if plan.base_twins:
            with self._busy(name, f"drawing {plan.surrogates} twins with the base alone"):
                self._call(name, "twins", [*drawing, "--out", str(folder / TWINS)])
        if name == plan.dishonest_site:
            self.board.say(name, f"planting {plan.planted} real tiles among the surrogates")
            record = self.out / "planted.json"
            outcome.planted = plant_real_tiles(folder, drawn, plan.planted, plan.seed, record)
        with self._busy(name, "sealing the release"):
            draft = self._call(name, "draft", ["release", "draft", *where, "--tiles", str(drawn)])["data"]
        audit = self.out / "audits" / name
        seen = self._examine(name, audit, draft)
        if seen["withholding_answers"]:
            with self._busy(name, f"withholding {len(seen['flagged'])} flagged of {plan.surrogates} tiles"):
                first, audit = audit, self.out / "audits" / f"{name}-filtered"
                arguments = ["release", "withhold", *where, "--audit", str(first)]
                draft = self._call(name, "withhold", arguments)["data"]
                outcome.withheld = int(draft["withheld"])
            seen = self._examine(name, audit, draft, first)
        outcome.verdict = str(seen["verdict"])
        origins = json.loads(Path(draft["origins"]).read_text())
        outcome.flagged = sorted(origins[f["synthetic"]] for f in seen["flagged"])
        outcome.report, outcome.site_report = str(seen["page"]), str(seen["site_page"])
        outcome.sheet = str(draft["sample_sheet"])
        with self._busy(name, "asking the gate"):
            self._ask_the_gate(name, [*where, "--release", str(draft["release"])], audit)
        budget = self._call(name, "budget", ["site", "budget", "show", *where])["data"]
        outcome.epsilon_value = float(budget["epsilon_spent"])
        outcome.delta, outcome.not_covered = float(budget["delta"]), str(budget["does_not_cover"])
        self.board.say(name, f"{outcome.verdict}: {outcome.bundle or outcome.why_refused}")

    def _examine(
        self, name: str, audit: Path, draft: dict[str, Any], first: Path | None = None
    ) -> dict[str, Any]:
        """Run the audit on a sealed draft; `first` is the audit after which tiles were withheld."""
        features, tiles = self.site(name) / "features", str(draft["tiles_dir"])
        arguments = ["audit", "run", "--train", str(features / "train"), "--holdout", str(features / "holdout"),
            "--synthetic", tiles, "--out", str(audit)]  # fmt: skip
        if self.plan.base_twins:
            arguments += ["--base-twins", str(self.site(name) / TWINS), "--origins", str(draft["origins"])]
        arguments += ["--policy", self.plan.policy]
        arguments += ["--filtered-from", str(first)] if first else []
        with self._busy("auditor", f"examining {name} {'again' if first else ''}".strip()):
            answer = self._call("auditor", audit.name, arguments, accept=(0, 1))
        found: dict[str, Any] = answer["data"]
        return found

    def _ask_the_gate(self, name: str, where: list[str], audit: Path) -> None:
        outcome, bundle = self.outcomes[name], self.out / "bundles" / f"{name}.zip"
        bundle.parent.mkdir(exist_ok=True)
        sign = ["release", "sign", *where, "--audit", str(audit), "--key", str(self.out / "auditor.key")]
        sign += ["--accept-policy", self.plan.policy]
        export = ["release", "export", *where, "--out", str(bundle)]
        for what, arguments in (("sign", sign), ("export", export)):
            answer = self._call(name, what, arguments, accept=(0, 1))
            if answer["exit_code"]:
                outcome.why_refused = outcome.why_refused or str(answer.get("message", ""))
        if bundle.exists():
            trust = ["--trust", str(self.out / "auditor.key.pub")]
            verified = self._call(name, "verify", ["release", "verify", str(bundle), *trust], once=False)
            outcome.bundle, outcome.bundle_verified = str(bundle), verified["exit_code"] == 0

    def write(self, summary: dict[str, Any]) -> None:
        """Keep the summary beside everything else."""
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1))
