"""Real processes: one killed outright resumes bit-equal; two together do what one does with twice the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from pixcell_core.errors import PixcellError
from pixcell_core.training.journal import Journal
from pixcell_core.training.parallel import Processes
from pixcell_core.training.sampler import shard_of
from pixcell_core.training.settings import TrainingSettings
from pixcell_core.training.trainer import Trainer

SCRIPT = Path(__file__).with_name("process_runs.py")


def _load_runs() -> Any:
    spec = spec_from_file_location("process_runs", SCRIPT)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNS = _load_runs()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As the processes have it: sums over two threads round otherwise."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of the script, once; its words on how each process ended are in `said`."""
    place = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(place)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (place / "said").write_text(done.stdout + done.stderr)
    return place


def alone(settings: TrainingSettings, tokens: int = 1) -> dict[str, torch.Tensor]:
    model = RUNS.transformer(tokens)
    Trainer(model, RUNS.tiles(tokens=tokens), settings).run(None)
    return dict(model.state_dict())


def ended(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return dict(torch.load(folder / f"{name}-{rank}.pt", weights_only=True))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[k] - other[k]).abs().max().item() for k in one)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Their distance but for the keys' biases: the softmax does not feel them, so their gradient is rounding alone,
    which AdamW blows up to whole steps."""
    return distance(*({k: v for k, v in s.items() if "to_k.bias" not in k} for s in (one, other)))


@pytest.mark.parametrize(("name", "settings"), [("adamw", RUNS.ADAMW), ("came", RUNS.CAME)])
def test_a_run_killed_outright_resumes_bit_equal(folder: Path, name: str, settings: TrainingSettings) -> None:
    said = (folder / "said").read_text()
    assert f"{name} killed -9" in said and f"{name} resumed 0" in said, said
    resumed = ended(folder, name)
    assert resumed["steps"] == [4, 5, 6, 7], "it went on from the checkpoint of step 3"
    assert distance(resumed["model"], alone(settings)) == 0.0
    steps = [row["step"] for row in Journal(folder / name / "metrics.jsonl").rows()]
    assert steps == list(range(1, 8)), "every step stands in the journal once"


@pytest.mark.parametrize(("lost", "value"), [("position", 0), ("optimizer", None), ("ema", None)])
def test_mutant_a_resume_that_loses_a_part_differs(tmp_path: Path, lost: str, value: object) -> None:
    """The comparison above notices a forgotten place in the epoch, optimiser or average."""
    settings, whole = RUNS.CAME, alone(RUNS.CAME)
    Trainer(RUNS.transformer(), RUNS.tiles(), replace(settings, steps=3)).run(tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    fresh = Trainer(RUNS.transformer(), RUNS.tiles(), settings)
    state[lost] = {"optimizer": fresh.optimizer.state_dict(), "ema": fresh.ema.state_dict()}.get(lost, value)
    torch.save(state, tmp_path / "c.pt")
    fresh.run(tmp_path / "c.pt")
    assert distance(fresh.model.state_dict(), whole) > 0


def test_dropout_too_resumes_bit_equal_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    whole, parts, fresh = (RUNS.transformer(dropout=0.3) for _ in range(3))
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    Trainer(whole, RUNS.tiles(), RUNS.ADAMW).run(None)
    assert torch.equal(torch.random.get_rng_state(), before)
    Trainer(parts, RUNS.tiles(), replace(RUNS.ADAMW, steps=3)).run(tmp_path / "c.pt")
    torch.manual_seed(99)
    Trainer(fresh, RUNS.tiles(), RUNS.ADAMW).run(tmp_path / "c.pt")
    assert distance(whole.state_dict(), fresh.state_dict()) == 0.0
    assert distance(whole.state_dict(), alone(RUNS.ADAMW)) > 0, "dropout was off"


@pytest.mark.parametrize("tokens", [1, 4])
def test_two_processes_do_what_one_does_with_twice_the_batch(folder: Path, tokens: int) -> None:
    assert f"pair {tokens} 0 0" in (folder / "said").read_text(), (folder / "said").read_text()
    one = alone(replace(RUNS.PAIR, batch_size=4), tokens)
    both = [ended(folder, f"pair{tokens}", rank)["model"] for rank in (0, 1)]
    assert distance(both[0], both[1]) == 0.0
    assert apart(both[0], one) < 1e-6
    assert apart(alone(RUNS.PAIR, tokens), one) > 1e-3, "the comparison would not notice a lost half"


def test_two_processes_with_two_parts_each_do_the_same(folder: Path) -> None:
    assert apart(ended(folder, "parts")["model"], alone(replace(RUNS.PAIR, batch_size=4))) < 1e-6


def test_two_processes_resume_bit_equal_and_only_the_first_writes(folder: Path) -> None:
    said = (folder / "said").read_text()
    assert "half 0 0" in said and "rest 0 0" in said, said
    resumed = [ended(folder, "again", rank) for rank in (0, 1)]
    assert resumed[0]["steps"] == resumed[1]["steps"] == [4, 5, 6]
    assert distance(resumed[0]["model"], ended(folder, "pair1")["model"]) == 0.0
    assert sorted(p.name for p in (folder / "again").iterdir()) == ["c.pt", "metrics.jsonl"]
    rows = Journal(folder / "again" / "metrics.jsonl").rows()
    assert [row["step"] for row in rows] == list(range(1, 7)), "two writers would write each step twice"


def test_accumulated_parts_are_one_batch() -> None:
    parts, one = replace(RUNS.PAIR, accumulate=2), replace(RUNS.PAIR, batch_size=4)
    assert apart(alone(parts), alone(one)) < 1e-6


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (2, 3), (4, 2), (3, 1)])
def test_shards_do_not_overlap_and_make_up_the_whole(world: int, parts: int) -> None:
    whole = list(range(100, 100 + 5 * world * parts))
    shards = [
        shard_of(whole, rank=r, world=world, part=p, parts=parts) for p in range(parts) for r in range(world)
    ]
    assert [row for shard in shards for row in shard] == whole
    assert {len(shard) for shard in shards} == {5}


def test_processes_that_resumed_from_different_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(into: list[torch.Tensor], own: torch.Tensor) -> None:
        into[0].copy_(own)

    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    pair = Processes(0, 2)
    pair.check_same(0)
    with pytest.raises(PixcellError) as refused:
        pair.check_same(3)
    assert refused.value.code == "processes-disagree" and "[3, 0]" in refused.value.message
    Processes().check_same(3)
