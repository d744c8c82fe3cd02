"""Where the coordinator keeps its files: one folder, owned by one user, readable by nobody else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from server.registry.registry import Registry

START_ADAPTER = "start.safetensors"
"""In a run's folder: the adapter of round 0."""


@dataclass(frozen=True)
class ServerLayout:
    """The folder of one consortium's coordinator."""

    root: Path

    @property
    def pki(self) -> Path:
        """Certificate authority and server certificate."""
        return self.root / "pki"

    @property
    def secrets(self) -> Path:
        """The secret between hub and executor."""
        return self.root / "secrets"

    def registry(self) -> Registry:
        """The database of sites, studies, runs, rounds, heads and acts; opened once in each process."""
        from server.registry.opening import open_registry

        return open_registry(self.root)

    @property
    def pretraining(self) -> Path:
        """One folder per pretraining job."""
        return self.root / "pretraining"

    @property
    def hub(self) -> Path:
        """State, logs and ready file of the hub."""
        return self.root / "hub"

    @property
    def requests(self) -> Path:
        """Runs asked for and not yet started; the hub takes them from here."""
        return self.hub / "requests"

    @property
    def nodes(self) -> Path:
        """Node identity per registered site, written by the hub."""
        return self.hub / "nodes.json"

    @property
    def bell(self) -> Path:
        """Touched when the hub's executor has something to do."""
        return self.hub / "bell"

    @property
    def ready(self) -> Path:
        """Address and process of the running hub."""
        return self.hub / "hub.json"

    @property
    def events(self) -> Path:
        """The hub's event log: one JSON object a line."""
        return self.hub / "events.jsonl"

    def run(self, study_id: str) -> Path:
        """The folder of one study's run: its start adapter and the tensors of its committed rounds."""
        return self.root / "runs" / study_id

    def check(self) -> ServerLayout:
        """This layout, if it was initialised; else an input error that says how."""
        if not (self.pki / "ca.crt").is_file():
            raise BadInputError(
                f"{self.root} is not a coordinator's folder.",
                hint=f"Make one: pixcell init --dir {self.root}",
                code="not-initialised",
            )
        return self
