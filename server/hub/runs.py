"""Starts runs and registers sites from inside the hub's process, by what lies in the coordinator's folder.

A command that wants a run leaves a file in `hub/requests`; the folder's permissions are its authentication. No
network interface of the hub can start a run or add a key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from typing import Any

from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, Status
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.servicer.control import control_handlers

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.errors import PixcellError
from pixcell_core.flower.pace import Bell
from server.enrolment.sites import SiteBook, node_public_key
from server.hub.bundle import FOLDER_KEY, STUDY_KEY, build_bundle
from server.hub.event_log import EventLog
from server.layout import ServerLayout
from server.rounds.board import RunBoard
from server.studies.book import StudyBook

FLEET_KIND = "grpc-rere"


class RunDesk:
    """Keeps Flower's state in step with the folder: site keys in, requested runs started, dead runs marked."""

    def __init__(self, layout: ServerLayout, link_state: Any, events: EventLog) -> None:
        self._layout, self._state, self._events = layout, link_state, events
        self._registry = layout.registry()
        self._nodes: dict[str, int] = {}
        self._bundle = build_bundle()
        self._active: dict[str, int] = {}
        self._silent = False

    def begin(self) -> None:
        """Forget what an earlier hub process believed: no site is connected yet, no run is going on.

        Without this a site could not rejoin until its last heartbeat ran out.
        """
        for site in self._state.get_node_info():
            self._state.deactivate_node(site.node_id)
        for run in self._state.get_run_info():
            if run.status.status != Status.FINISHED:
                self._state.stop_run(run.run_id)
        for study_id in RunBoard.ids(self._registry):
            self._fail(
                study_id, "The hub was stopped during the run. Committed rounds are kept: start it again."
            )

    def tick(self) -> None:
        """Do what the folder asks for. Called every half second; never raises for what a file contains.

        Requests wait while the registry does not answer.
        """
        if not self._registry_answers():
            return
        self._register_sites()
        self._mark_dead_runs()
        for request in sorted(self._layout.requests.glob("*.json")):
            study_id = request.stem
            if study_id in self._active and self._loop_process(study_id) is None:
                # The last run has said how it ended and is on its way out, or the new one has not begun to speak.
                continue
            try:
                self._start(study_id)
            except PixcellError as error:
                self._events.say("run-refused", study=study_id, code=error.code)
                self._fail(study_id, f"{error.message} {error.hint}")
            finally:
                request.unlink(missing_ok=True)

    def _registry_answers(self) -> bool:
        try:
            self._registry.ping()
        except PixcellError as error:
            if not self._silent:
                self._events.say("registry-silent", code=error.code)
            self._silent = True
            return False
        if self._silent:
            self._events.say("registry-answers")
        self._silent = False
        return True

    def _register_sites(self) -> None:
        book = SiteBook(self._registry)
        fresh = [name for name in book.names() if name not in self._nodes]
        for name in fresh:
            try:
                key = public_key_to_bytes(node_public_key(book.get(name)))
            except PixcellError as error:
                self._events.say("site-unreadable", site=name, code=error.code)
                self._nodes[name] = 0
                continue
            node = self._state.get_node_id_by_public_key(key)
            if node is None:
                node = self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)
                self._events.say("site-registered", site=name, node=str(node))
            self._nodes[name] = int(node)
        if fresh or not self._layout.nodes.exists():
            known = {name: str(node) for name, node in self._nodes.items() if node}
            write_atomically(self._layout.nodes, json.dumps(known, sort_keys=True).encode())

    def _start(self, study_id: str) -> None:
        study = StudyBook(self._registry).get(study_id)
        if study_id in self._active:
            self._events.say("run-already-active", study=study_id)
            return
        bundle = Fab(hashlib.sha256(self._bundle).hexdigest(), self._bundle, {})
        answer = control_handlers.start_run(
            StartRunRequest(
                fab=fab_to_proto(bundle),
                override_config=user_config_to_proto(
                    {STUDY_KEY: study_id, FOLDER_KEY: str(self._layout.root)}
                ),
            ),
            AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME),
            self._state,
            FLEET_KIND,
        )
        Bell(self._layout.bell).ring()
        self._active[study_id] = int(answer.run_id)
        self._events.say("run-started", study=study_id, digest=study.digest, run=str(answer.run_id))

    def _mark_dead_runs(self) -> None:
        if not self._active:
            return
        status = self._state.get_run_status(set(self._active.values()))
        for study_id, run in list(self._active.items()):
            found = status.get(run)
            if found is not None and found.status == Status.FINISHED:
                del self._active[study_id]
                self._events.say("run-ended", study=study_id, run=str(run), outcome=str(found.sub_status))
                if not (self._layout.requests / f"{study_id}.json").exists():
                    self._fail(
                        study_id, "The round loop ended without saying why. See the executor's log in hub/."
                    )
            elif (pid := self._loop_process(study_id)) is not None and not _alive(pid):
                self._fail(
                    study_id,
                    "The round loop's process was killed. Committed rounds are kept: "
                    f"run `pixcell run start {study_id}` again.",
                )
                with contextlib.suppress(Exception):
                    self._state.stop_run(run)
                del self._active[study_id]
                self._events.say("run-killed", study=study_id, run=str(run))

    def _loop_process(self, study_id: str) -> int | None:
        state = RunBoard(self._registry, study_id).read(history=False)
        return state.process if state is not None and state.state in ("waiting", "running") else None

    def _fail(self, study_id: str, reason: str) -> None:
        RunBoard(self._registry, study_id).fail_if_unfinished(reason)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
