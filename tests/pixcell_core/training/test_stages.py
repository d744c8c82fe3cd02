"""Stages: 256 -> 512 -> 1024 carries every parameter, rebuilds every table, and draws the null anew when it must."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.models.positions import sincos_table
from pixcell_core.training import stages
from pixcell_core.training.stages import (
    NULL,
    STAGES,
    TABLE,
    drawn_null,
    new_model,
    next_stage,
    published_config,
)

SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "cross_attention_dim": 16}


def first(seed: int = 0) -> PixCellTransformer2DModel:
    return new_model({**published_config(256), **SMALL, "caption_channels": 24}, seed)


def shared_equal(one: PixCellTransformer2DModel, other: PixCellTransformer2DModel) -> bool:
    left, right = dict(one.named_parameters()), dict(other.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_weights_are_carried_and_tables_rebuilt_through_all_stages() -> None:
    stage = first()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.normal_()
    for resolution in (512, 1024):
        grown = next_stage(stage, resolution, seed=5)
        assert shared_equal(stage, grown)
        wanted = STAGES[resolution]
        for name in ("sample_size", "interpolation_scale", "caption_num_tokens"):
            assert grown.config[name] == getattr(wanted, name), name
        fresh = PixCellTransformer2DModel(**{**published_config(resolution), **SMALL, "caption_channels": 24})
        assert torch.equal(grown.pos_embed.pos_embed, fresh.pos_embed.pos_embed)
        assert torch.equal(grown.state_dict()[TABLE], fresh.state_dict()[TABLE])
        stage = grown


def test_the_condition_table_lies_on_the_tile_centres_of_its_stage() -> None:
    """Coordinates 8, 24 at 512 px and 4, 12, 20, 28 at 1024 px, both on an axis of 32."""
    for resolution, centres in ((512, [8, 24]), (1024, [4, 12, 20, 28])):
        table = next_stage(first(), resolution, seed=0).state_dict()[TABLE][0]
        side = len(centres)
        for row in range(side):
            for column in range(side):
                # base 1 and scale 1: the coordinate of the only column is the phase itself
                across = sincos_table(24, 1, 1, base=1, scale=1, phase=centres[column])[0, :12]
                down = sincos_table(24, 1, 1, base=1, scale=1, phase=centres[row])[0, 12:]
                assert torch.allclose(table[row * side + column], torch.cat([across, down]), atol=1e-6)


def test_the_null_is_drawn_by_seed_or_given_and_carried_where_the_tokens_stay() -> None:
    one = first()
    grown, again, other = (next_stage(one, 512, seed=s).state_dict()[NULL] for s in (5, 5, 6))
    assert torch.equal(grown, again) and not torch.equal(grown, other)
    assert torch.equal(grown, drawn_null(4, 24, 5))
    given = torch.full((4, 24), 0.25)
    assert torch.equal(next_stage(one, 512, seed=5, null=given).state_dict()[NULL], given)
    assert torch.equal(next_stage(one, 256, seed=5).state_dict()[NULL], one.state_dict()[NULL])
    big = drawn_null(64, 1536, 1)
    assert big.std().item() * math.sqrt(1536) == pytest.approx(1.0, abs=0.02)
    with pytest.raises(BadInputError) as refused:
        next_stage(one, 512, seed=5, null=torch.zeros(1, 24))
    assert refused.value.code == "null-shape-differs"


@pytest.mark.parametrize("kept", ["interpolation_scale", "sample_size", "caption_num_tokens"])
def test_mutant_a_configuration_that_does_not_grow_fails(monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    right = stages.grown_config

    def forgetful(config: Mapping[str, Any], factor: int) -> dict[str, Any]:
        return {**right(config, factor), kept: config[kept]}

    monkeypatch.setattr(stages, "grown_config", forgetful)
    with pytest.raises((AssertionError, BadInputError, ValueError)):
        test_weights_are_carried_and_tables_rebuilt_through_all_stages()


def test_a_new_model_is_decided_by_its_seed_and_starts_at_zero_output() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one, again, other = first(1), first(1), first(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert shared_equal(one, again) and not shared_equal(one, other)
    assert torch.equal(one.state_dict()[NULL], again.state_dict()[NULL])
    with torch.no_grad():
        output = one.eval()(torch.randn(1, 16, 32, 32), torch.randn(1, 1, 24), torch.tensor([5]))
    assert not output.sample.any()


@pytest.mark.parametrize("resolution", [128, 300, 384])
def test_an_impossible_stage_is_refused(resolution: int) -> None:
    with pytest.raises(BadInputError) as refused:
        next_stage(first(), resolution, seed=0)
    assert refused.value.code == "stage-impossible" and str(resolution) in refused.value.message
    with pytest.raises(BadInputError) as refused:
        published_config(resolution)
    assert refused.value.code == "unknown-stage"


def test_the_published_stage_has_the_published_size() -> None:
    with torch.device("meta"):
        model = PixCellTransformer2DModel(**published_config(1024))
    assert sum(p.numel() for p in model.parameters()) == 608_072_960
    assert len(model.state_dict()) == 605
