"""Masked rounds against plain ones: CPU seconds of a site and of the hub, a whole round on the in-process grid, growth.

python bench/bench_masking.py            the primitives and whole rounds at 5 sites, 1 and 5 million parameters
python bench/bench_masking.py --growth   whole masked rounds of 10, 30 and 100 sites at 1 million parameters
"""

from __future__ import annotations

import logging
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Message
from flwr.app.message_type import MessageType
from paired import compare, show

from pixcell_core.contracts.round import ARRAYS, FLAT, TensorPlace, TrainRequest
from pixcell_core.flower.messages import decode_array, pack
from pixcell_core.masking.keystream import Mask, apply_masks
from server.rounds.aggregation import StreamingMean
from server.rounds.masked import MaskedSum
from server.rounds.screening import Accepted, Expected, screen
from tests.server.masked_consortium import NAME, MaskedConsortium, make_masked_consortium

MILLION = 1_000_000


@dataclass(frozen=True)
class Cost:
    """What one round cost, all sites and the hub in one process."""

    cpu_s: float
    wall_s: float
    bytes_moved: int


def timed(act: Callable[[], int]) -> Cost:
    """Run a round that returns the bytes it moved."""
    cpu, wall = time.process_time(), time.monotonic()
    moved = act()
    return Cost(time.process_time() - cpu, time.monotonic() - wall, moved)


def size_of(message: Message) -> int:
    """Bytes of a message's tensors and documents."""
    tensors = sum(len(a.data) for r in message.content.array_records.values() for a in r.values())
    texts = (v for r in message.content.config_records.values() for v in r.values())
    return tensors + sum(len(v) for v in texts if isinstance(v, str))


class Rounds:
    """Plain and masked rounds of the same sites, from the same updates, over the same grid."""

    def __init__(self, folder: Path, sites: int, size: int) -> None:
        threshold = sites // 2 + 1
        self.masked = make_masked_consortium(
            folder / "masked",
            count=sites,
            threshold=threshold,
            size=size,
            rounds=1000,
            round_timeout_s=3600.0,
        )
        aggregation = self.masked.study.aggregation.model_copy(update={"masking": None})
        open_study = self.masked.study.model_copy(update={"aggregation": aggregation})
        self.plain = MaskedConsortium(folder / "plain", open_study, self.masked.sites, size)
        rows = {name: self.masked.update(name, 1) for name in self.masked.sites}
        for consortium in (self.masked, self.plain):
            # The same updates in every round, drawn beforehand: nothing but the exchange is timed.
            consortium.update = lambda site, number: rows[site]  # type: ignore[method-assign]
        self._round = 0

    def run_masked(self) -> int:
        """One masked round to the opened sum; the kept attempt goes, as after a commit."""
        self._round += 1
        moved = self._count(self.masked)
        exchange = self.masked.exchange(stage_timeout_s=3600.0)
        found = exchange.collect(
            self._round, self.masked.adapter, self.masked.input_digest, list(self.masked.sites)
        )
        assert isinstance(found, MaskedSum), found
        exchange.done()
        wanted = self.masked.plain(list(self.masked.sites))
        error = float(np.linalg.norm(found.total - wanted) / np.linalg.norm(wanted))
        assert error < 1e-6, error
        return moved[0]

    def run_plain(self) -> int:
        """One plain round as the round loop runs it: broadcast, screening, streaming mean."""
        c, moved = self.plain, self._count(self.plain)
        shapes = {NAME: (c.size,)}
        request = TrainRequest(
            study_digest=c.study.digest,
            round=1,
            input_digest=c.input_digest,
            layout=(TensorPlace(name=NAME, shape=(c.size,)),),
        )
        content = pack(request, c.adapter)
        sent = c.grid.push_messages(
            [
                Message(content, dst_node_id=node, message_type=MessageType.TRAIN, ttl=3600.0)
                for node in c.nodes.values()
            ]
        )
        mean, pending = StreamingMean(shapes), set(sent)
        expected = Expected(c.study.digest, 1, c.input_digest, shapes, 1e9)
        while pending:
            for message in c.grid.pull_messages(list(pending)):
                pending.discard(message.metadata.reply_to_message_id)
                verdict = screen(message, expected)
                assert isinstance(verdict, Accepted), verdict
                mean.add(verdict.update)
            time.sleep(0.002)
        mean.applied_to(c.adapter)
        return moved[0]

    def close(self) -> None:
        """End the workers."""
        self.masked.grid.close()
        self.plain.grid.close()

    def _count(self, c: MaskedConsortium) -> list[int]:
        moved = [0]

        def count(question: Message, reply: Message) -> list[Message]:
            moved[0] += size_of(question) + size_of(reply)
            return [reply]

        c.grid.tamper = count
        return moved


def primitives(size: int, sites: int) -> None:
    """A site's masks alone, and the hub's sum, against what a plain round does with the same payload."""
    update = np.random.default_rng(0).normal(0, 0.1, size).astype(np.float32)
    from pixcell_core.masking.fixed_point import FixedPoint

    fill = FixedPoint(0.5, sites).filler(update)
    masks = [Mask(bytes([i]) * 32, bool(i % 2)) for i in range(sites)]
    vector, mean = np.empty(size, "<u4"), np.zeros(size)
    content = pack(
        TrainRequest(
            study_digest="sha256:" + "0" * 64,
            round=1,
            input_digest="sha256:" + "0" * 64,
            layout=(TensorPlace(name=NAME, shape=(size,)),),
        ),
        {NAME: update},
    )
    data = content[ARRAYS][FLAT].data

    def plain_site_and_hub() -> None:
        pack_again = pack(
            TrainRequest(
                study_digest="sha256:" + "0" * 64,
                round=1,
                input_digest="sha256:" + "0" * 64,
                layout=(TensorPlace(name=NAME, shape=(size,)),),
            ),
            {NAME: update},
        )
        assert pack_again
        flat = decode_array(data, (size,))
        assert np.isfinite(flat).all()
        np.add(mean, flat, out=mean)

    found = compare(lambda: apply_masks(vector, masks, fill), plain_site_and_hub)
    show(
        f"clipping and {sites} masks of {size} parameters",
        "packing, reading and adding one plain update",
        found,
    )


def main() -> None:
    """Print the figures."""
    logging.disable(logging.CRITICAL)
    if "--growth" in sys.argv:
        for sites in (10, 30, 100):
            with tempfile.TemporaryDirectory() as folder:
                rounds = Rounds(Path(folder), sites, MILLION)
                cost = timed(rounds.run_masked)
                rounds.close()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{sites} sites, {MILLION} parameters: {cost.wall_s:.1f} s wall, {cost.cpu_s:.1f} CPU-s, "
                f"{cost.bytes_moved / 1e6:.0f} MB moved, peak {peak:.0f} MB of the one process with all sites",
                flush=True,
            )
        return
    for size in (MILLION, 5 * MILLION):
        primitives(size, 5)
        with tempfile.TemporaryDirectory() as folder:
            rounds = Rounds(Path(folder), 5, size)
            moved = (timed(rounds.run_masked).bytes_moved, timed(rounds.run_plain).bytes_moved)
            found = compare(rounds.run_masked, rounds.run_plain, repeats=5)
            rounds.close()
        show(f"whole round, 5 sites, {size} parameters", "the plain round", found)
        more = (found.ours - found.theirs) / 5
        print(f"  {more:.3f} CPU-s more per site; {moved[0] / 1e6:.1f} MB moved against {moved[1] / 1e6:.1f}")


if __name__ == "__main__":
    main()
