"""Feature stores: what was written comes back; a killed writer leaves nothing half; nobody is named on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pixcell_core.errors import BadInputError
from pixcell_core.training import feature_store
from pixcell_core.training.feature_store import ROW_SCHEMA, FeatureStore, FeatureStoreWriter, shard_name

META = {"tile_size": 16, "mpp": 0.5, "encoder": "sha256:00"}
PATIENTS = ("Ada-1815", "../Grace", "Zoë O'Neill")


def rows(patient: str, count: int) -> list[dict[str, Any]]:
    return [
        {
            "tile": f"tile-{patient}-{i}",
            "slide": f"slide-{patient}",
            "label": "stroma" if i % 2 else None,
            "x": 16 * i,
            "y": 3,
            "level": 0,
            "mpp": 0.5,
            "tissue": 0.9,
            "focus": 0.5,
            "ink": 0.0,
        }
        for i in range(count)
    ]


def tensors(patient: str, count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(patient))
    return {
        "pixels": torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator),
        "latents": torch.randn(count, 32, 2, 2, generator=generator).half(),
        "embeddings": torch.randn(count, 1, 8, generator=generator).half(),
    }


def fill(path: Path, patients: tuple[str, ...] = PATIENTS, count: int = 3) -> FeatureStore:
    writer = FeatureStoreWriter(path, META)
    for patient in patients:
        writer.add(patient, rows(patient, count), **tensors(patient, count))
    writer.close()
    return FeatureStore.open(path)


def test_round_trip(tmp_path: Path) -> None:
    store = fill(tmp_path / "store")
    assert store.patients == sorted(PATIENTS)
    assert store.meta == META
    for patient in PATIENTS:
        expected = tensors(patient, 3)
        assert torch.equal(store.pixels(patient), expected["pixels"])
        assert torch.equal(store.latents(patient), expected["latents"])
        assert torch.equal(store.embeddings(patient), expected["embeddings"])
        assert store.tiles(patient) == [f"tile-{patient}-{i}" for i in range(3)]
        assert store.labels(patient) == [None, "stroma", None]
    table = pq.read_table(tmp_path / "store" / "index.parquet")
    assert table.schema.equals(ROW_SCHEMA)
    assert {(r["patient"], r["shard"]) for r in table.to_pylist()} == {(p, shard_name(p)) for p in PATIENTS}
    assert {r["row"] for r in table.to_pylist()} == {0, 1, 2}


def test_file_names_name_nobody(tmp_path: Path) -> None:
    fill(tmp_path / "store")
    names = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")]
    assert len([n for n in names if n.endswith(".safetensors")]) == 3
    for patient in PATIENTS:
        assert not [n for n in names if patient.strip("./") in n or f"slide-{patient}" in n]
    assert not (tmp_path / "Grace").exists(), "a patient's name is no path"


def test_a_holdout_store_has_no_latents_and_says_so(tmp_path: Path) -> None:
    writer = FeatureStoreWriter(tmp_path / "store", META)
    only = {k: v for k, v in tensors("a", 2).items() if k != "latents"}
    writer.add("a", rows("a", 2), **only)
    writer.close()
    with pytest.raises(BadInputError) as refused:
        FeatureStore.open(tmp_path / "store").latents("a")
    assert refused.value.code == "feature-missing"


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    fill(tmp_path / "store")
    before = (tmp_path / "store" / "store.json").read_bytes()
    with pytest.raises(BadInputError, match=r"\(mpp, tile_size\)") as refused:
        FeatureStoreWriter(tmp_path / "store", {**META, "tile_size": 32, "mpp": 1.0})
    assert refused.value.code == "feature-settings-differ"
    assert (tmp_path / "store" / "store.json").read_bytes() == before
    FeatureStoreWriter(tmp_path / "store", dict(reversed(META.items())))  # order is no setting


def test_a_second_run_resumes_at_the_first_missing_patient(tmp_path: Path) -> None:
    fill(tmp_path / "store", PATIENTS[:2])
    writer = FeatureStoreWriter(tmp_path / "store", META)
    assert [writer.has(p) for p in PATIENTS] == [True, True, False]
    stamp = (tmp_path / "store" / "shards" / f"{shard_name(PATIENTS[0])}.safetensors").stat().st_mtime_ns
    writer.add(PATIENTS[2], rows(PATIENTS[2], 3), **tensors(PATIENTS[2], 3))
    assert FeatureStore.open(tmp_path / "store").patients == sorted(PATIENTS[:2]), "not closed: the old index"
    writer.close()
    assert FeatureStore.open(tmp_path / "store").patients == sorted(PATIENTS)
    after = (tmp_path / "store" / "shards" / f"{shard_name(PATIENTS[0])}.safetensors").stat().st_mtime_ns
    assert stamp == after


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from pixcell_core.training import feature_store

def write(place, at):
    done = 0
    def dying(real):
        def act(self, *arguments, **named):
            nonlocal done
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return real(self, *arguments, **named)
        return act
    Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)
    writer = feature_store.FeatureStoreWriter(place, {"n": 1})
    for name, value in (("a", 1), ("b", 2), ("a", 3)):
        count = 5 if value == 3 else 2
        writer.add(name, [{"tile": f"{name}{value}"}] * count, pixels=torch.full((count, 3, 16, 16), value))
    writer.close()

for at in range(30):
    child = os.fork()
    if not child:
        write(Path(sys.argv[1]) / str(at), at)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
    if not status:
        break
"""


def test_a_writer_killed_at_any_rename_leaves_no_half_shard_taken_for_whole(tmp_path: Path) -> None:
    """SIGKILL before every rename and removal in turn, also while a patient's shard is being written anew."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ends = [int(line) for line in done.stdout.split()]
    assert ends[:-1] == [-signal.SIGKILL] * (len(ends) - 1) and ends[-1] == 0, done.stderr
    assert len(ends) > 9, "one kill before each rename and removal"
    for at in range(len(ends) - 1):
        place = tmp_path / str(at)
        writer = FeatureStoreWriter(place, {"n": 1})
        assert not list(place.rglob("shards/*.partial")), "leftovers are cleared away"
        complete = [p for p in ("a", "b") if writer.has(p)]
        writer.close()
        store = FeatureStore.open(place)
        assert store.patients == complete
        for patient in complete:
            value = int(store.tiles(patient)[0][-1])
            assert torch.equal(store.pixels(patient).unique(), torch.tensor([value], dtype=torch.uint8))
            assert len(store.pixels(patient)) == len(store.tiles(patient))


def test_a_damaged_store_is_an_input_error_not_a_bug(tmp_path: Path) -> None:
    def code(path: Path) -> str | None:
        with pytest.raises(BadInputError) as refused:
            store = FeatureStore.open(path)
            for patient in store.patients:
                store.pixels(patient)
        return refused.value.code

    assert code(tmp_path / "nowhere") == "no-feature-store"
    for number, (part, content) in enumerate(
        (
            ("index.parquet", b"PAR1 no more"),
            ("store.json", b"{"),
            ("store.json", None),
            (f"shards/{shard_name('a')}.safetensors", b"cut"),
            (f"shards/{shard_name('a')}.safetensors", None),
        )
    ):
        place = tmp_path / str(number)
        fill(place, ("a",))
        if content is None:
            (place / part).unlink()
        else:
            (place / part).write_bytes(content)
        assert code(place) == "feature-store-damaged", part
    place = tmp_path / "rows"
    fill(place, ("a",))
    shard = place / "shards" / f"{shard_name('a')}.safetensors"
    fill(tmp_path / "other", ("a",), count=2)
    shard.write_bytes((tmp_path / "other" / "shards" / shard.name).read_bytes())
    assert code(place) == "feature-store-damaged", "three rows, two tiles"
    (place / "store.json").write_text("[]")
    with pytest.raises(BadInputError):
        FeatureStoreWriter(place, META)


def test_rows_and_tensors_must_agree(tmp_path: Path) -> None:
    writer = FeatureStoreWriter(tmp_path / "store", META)
    with pytest.raises(ValueError, match="one entry per row"):
        writer.add("a", rows("a", 2), **tensors("a", 3))
    assert not writer.has("a")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the list of mappings is Linux's")
def test_tensors_are_memory_mapped(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", ("a",))
    name = str(store.path / "shards" / f"{shard_name('a')}.safetensors")
    assert name not in Path("/proc/self/maps").read_text()
    kept = store.pixels("a")
    assert name in Path("/proc/self/maps").read_text()
    assert torch.equal(kept, tensors("a", 3)["pixels"])


def test_text_is_flushed_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = Path.replace
    monkeypatch.setattr(feature_store.os, "fsync", lambda number: order.append("fsync"))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append(f"rename {to.suffix}"), real(self, to))[1]
    )
    writer = FeatureStoreWriter(tmp_path / "store", META)
    order.clear()
    writer.add("a", rows("a", 1), **tensors("a", 1))
    assert order == ["fsync", "rename .json", "fsync", "rename .safetensors"]
    assert json.loads((tmp_path / "store" / "shards" / f"{shard_name('a')}.rows.json").read_text())


def test_a_patient_who_left_the_catalogue_leaves_the_store(tmp_path: Path) -> None:
    writer = FeatureStoreWriter(tmp_path, {"tile_size": 8})
    row = {"tile": "t", "slide": "s", "label": None, "x": 0, "y": 0, "level": 0, "mpp": 0.5}
    for patient in ("stays", "left"):
        writer.add(patient, [row], pixels=torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    writer.close({"stays"})
    assert FeatureStore.open(tmp_path).patients == ["stays"]
    assert not writer.has("left")
