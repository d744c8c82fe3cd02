"""Large images: exact averages, no seam, the right embeddings in every window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pixcell_core.diffusion import PixCellPipeline, Windowing, WindowPlan, seam_ratio
from pixcell_core.diffusion.windows import WindowAxis, WindowedNoise
from pixcell_core.models.prepared import PreparedCondition
from pixcell_core.starter import load_autoencoder, load_transformer


class _Net(torch.nn.Module):
    """Stands for a transformer: predicts what `rule(latents, condition)` says; counts rows."""

    dtype = torch.float64

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rule, self.rows = rule, []

    def prepare(self, condition: torch.Tensor) -> Any:
        return PreparedCondition(len(condition), constants=(condition,))

    def forward(
        self, latents: torch.Tensor, encoder_hidden_states: Any, timestep: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        condition = encoder_hidden_states.constants[0]
        self.rows.append(len(condition))
        latents = latents.repeat(len(condition) // len(latents), 1, 1, 1)
        noise = self.rule(latents, condition)
        return (torch.cat([noise, torch.zeros_like(noise)], dim=1),)


def _windowed(
    rule: Any, plan: WindowPlan, condition: torch.Tensor, scale: float = 1.0, **options: Any
) -> Any:
    tokens = plan.rows.tokens * plan.columns.tokens
    null = torch.zeros(len(condition), tokens, condition.shape[-1], dtype=torch.float64)
    net = _Net(rule)
    return WindowedNoise(net, condition, null, scale, plan=plan, windowing=Windowing(**options)), net


SIZES = [((16, 16), 4), ((24, 40), 4), ((17, 16), 1), ((30, 22), 1), ((8, 40), 4), ((64, 16), 16)]
TIME = torch.tensor(500)


@pytest.mark.parametrize(("size", "tokens"), SIZES)
def test_weights_add_up_to_one_everywhere(size: tuple[int, int], tokens: int) -> None:
    plan = WindowPlan.of(size, sample_size=16, tokens=tokens, patch=1)
    for axis in (plan.rows, plan.columns):
        total = torch.zeros(axis.length, dtype=torch.float64)
        for start, weight in zip(axis.starts, axis.weights(), strict=True):
            assert (weight > 0).all()
            total[start : start + axis.window] += weight
        assert torch.allclose(total, torch.ones_like(total), atol=1e-14)
        assert axis.starts[0] == 0 and axis.starts[-1] + axis.window == axis.length


def _net_free_noise(
    rule: Any, plan: WindowPlan, latents: torch.Tensor, conditions: dict[tuple[int, int], torch.Tensor]
) -> torch.Tensor:
    """The average of all windows, pixel by pixel from its definition, in float64."""
    images, channels, height, width = latents.shape
    total = torch.zeros(latents.shape, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            weights, values = 0.0, torch.zeros(images, channels, dtype=torch.float64)
            for place in plan.places:
                top, left = plan.rows.starts[place[0]], plan.columns.starts[place[1]]
                a, b = plan.rows.window, plan.columns.window
                if not (top <= y < top + a and left <= x < left + b):
                    continue
                weight = (
                    math.sin(math.pi * (y - top + 0.5) / a) ** 2
                    * math.sin(math.pi * (x - left + 0.5) / b) ** 2
                )
                noise = rule(latents[:, :, top : top + a, left : left + b], conditions[place])
                values += weight * noise[:, :, y - top, x - left]
                weights += weight
            total[:, :, y, x] = values / weights
    return total


def _local_rule(latents: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """Depends on the place inside the window, on the window's content and on its tokens in order."""
    count = condition.shape[1]
    said = (condition * torch.arange(1, count + 1, dtype=torch.float64)[None, :, None]).sum(dim=(1, 2))
    ramp = torch.linspace(0, 1, latents.shape[-1], dtype=torch.float64)
    return latents.tanh() + ramp + said[:, None, None, None] * 0.1 + latents.mean(dim=(1, 2, 3), keepdim=True)


def test_the_average_follows_its_definition() -> None:
    plan = WindowPlan.of((12, 18), sample_size=8, tokens=4, patch=2)
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 12, 18, dtype=torch.float64, generator=source)
    grid = torch.randn(2, *plan.grid_shape, 5, dtype=torch.float64, generator=source)
    conditions = {}
    for i, j in plan.places:
        row, column = plan.rows.starts[i] // 4, plan.columns.starts[j] / 4
        low, share = int(column), column - int(column)
        left = grid[:, row : row + 2, low : low + 2]
        right = grid[:, row : row + 2, low + 1 : low + 3] if share else left
        conditions[i, j] = ((1 - share) * left + share * right).flatten(1, 2)
    expected = _net_free_noise(_local_rule, plan, latents, conditions)
    for batch_size in (1, 3, 50):
        noise, _ = _windowed(_local_rule, plan, grid, batch_size=batch_size)
        assert torch.allclose(noise(latents, TIME), expected, atol=1e-12)
    nothing = {place: torch.zeros_like(tokens) for place, tokens in conditions.items()}
    without = _net_free_noise(_local_rule, plan, latents, nothing)
    guided, _ = _windowed(_local_rule, plan, grid, scale=3.0, batch_size=4)
    assert torch.allclose(guided(latents, TIME), without + 3.0 * (expected - without), atol=1e-12)


def test_averaging_noise_is_averaging_clean_images() -> None:
    plan = WindowPlan.of((12, 18), sample_size=8, tokens=1, patch=2)
    latents = torch.randn(1, 3, 12, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grid = torch.zeros(1, *plan.grid_shape, 5, dtype=torch.float64)
    alpha, sigma = 0.6, 0.8
    noise, _ = _windowed(_local_rule, plan, grid)
    by_noise = (latents - sigma * noise(latents, TIME)) / alpha

    def clean_rule(crop: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return (crop - sigma * _local_rule(crop, condition)) / alpha

    clean, _ = _windowed(clean_rule, plan, grid)
    assert torch.allclose(by_noise, clean(latents, TIME), atol=1e-12)


@pytest.mark.parametrize(("size", "tokens"), SIZES)
def test_a_constant_prediction_gives_a_seamless_constant(size: tuple[int, int], tokens: int) -> None:
    plan = WindowPlan.of(size, sample_size=16, tokens=tokens, patch=1)
    grid = torch.randn(2, *plan.grid_shape, 5, dtype=torch.float64)
    noise, _ = _windowed(lambda x, c: torch.full_like(x, 0.37), plan, grid, scale=3.0, batch_size=5)
    found = noise(torch.randn(2, 3, *size, dtype=torch.float64), TIME)
    assert torch.allclose(found, torch.full_like(found, 0.37), atol=1e-14)


def test_every_window_sees_its_slice_of_the_grid() -> None:
    plan = WindowPlan.of((128 * 2, 128 * 3), sample_size=128, tokens=16, patch=2, stride=64)
    assert plan.grid_shape == (8, 12) and len(plan.places) == 3 * 5
    grid = torch.arange(8 * 12, dtype=torch.float64).reshape(1, 8, 12, 1)
    for i, j in plan.places:
        expected = [(2 * i + r) * 12 + 2 * j + c for r in range(4) for c in range(4)]
        assert plan.condition(grid, (i, j)).flatten().tolist() == expected
    mutant = plan.condition(grid.transpose(1, 2).reshape(1, 8, 12, 1), (1, 1)).flatten().tolist()
    assert mutant != [(2 + r) * 12 + 2 + c for r in range(4) for c in range(4)]


def test_between_two_tiles_one_token_is_their_mean() -> None:
    plan = WindowPlan.of((32, 64), sample_size=32, tokens=1, patch=2)
    assert plan.grid_shape == (1, 2) and plan.columns.starts == [0, 16, 32]
    grid = torch.tensor([[[[1.0], [5.0]]]])
    assert [plan.condition(grid, (0, j)).item() for j in range(3)] == [1.0, 3.0, 5.0]


def test_a_ragged_edge_needs_one_more_cell() -> None:
    axis = WindowAxis(length=50, window=32, stride=16, tokens=1)
    assert axis.starts == [0, 16, 18] and axis.cells == 2
    assert torch.allclose(axis.mixture(18), torch.tensor([[0.4375, 0.5625]], dtype=torch.float64))


def test_4096_pixels_are_planned_as_published() -> None:
    plan = WindowPlan.of((512, 512), sample_size=128, tokens=16, patch=2)
    assert len(plan.places) == 49 and plan.grid_shape == (16, 16)
    assert plan.borders[0] == [64, 128, 192, 256, 320, 384, 448]


def test_one_window_of_the_native_size_is_the_plain_call(tiny_transformer: Any, tiny_vae: Any) -> None:
    for tokens in (1, 4):
        pipeline = PixCellPipeline(tiny_vae, tiny_transformer(tokens))
        side = math.isqrt(tokens)
        grid = torch.randn(2, side, side, 12)
        options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
        seeds = [3, 4]
        plain, windowed = (
            pipeline(c, generator=[torch.Generator().manual_seed(s) for s in seeds], **options).images
            for c in (grid.flatten(1, 2), grid)
        )
        assert torch.allclose(plain, windowed, atol=1e-4 * float(plain.std()))


@pytest.mark.parametrize(("tokens", "size"), [(1, (24, 40)), (4, (40, 16)), (16, (16, 28))])
def test_large_images_of_any_aspect(
    tiny_transformer: Any, tiny_vae: Any, tokens: int, size: tuple[int, int]
) -> None:
    pipeline = PixCellPipeline(tiny_vae, tiny_transformer(tokens), "ddim")
    plan = pipeline.window_plan(size)
    told: list[int] = []
    images: Any = pipeline(
        torch.randn(1, *plan.grid_shape, 12),
        latent_size=size,
        num_inference_steps=2,
        windowing=Windowing(batch_size=3, on_windows=told.append),
        output_type="np",
    ).images
    assert images.shape == (1, size[0] * 8, size[1] * 8, 3)
    assert sum(told) == 2 * len(plan.places) and max(told) <= 3


@pytest.mark.parametrize("tokens", [1, 4])
def test_an_image_does_not_depend_on_its_batch_or_the_windows_per_call(
    tiny_transformer: Any, tiny_vae: Any, tokens: int
) -> None:
    pipeline = PixCellPipeline(tiny_vae, tiny_transformer(tokens))
    grid = torch.randn(3, 3, 3, 12)

    def draw(rows: list[int], per_call: int) -> torch.Tensor:
        images: Any = pipeline(
            grid[rows],
            num_inference_steps=3,
            generator=[torch.Generator().manual_seed(i) for i in rows],
            windowing=Windowing(batch_size=per_call),
            output_type="latent",
        ).images
        return images

    together = draw([0, 1, 2], 4)
    assert torch.allclose(draw([1], 1), together[1:2], atol=2e-5 * float(together.std()))


def test_the_same_tokens_in_every_window(tiny_transformer: Any, tiny_vae: Any) -> None:
    pipeline = PixCellPipeline(tiny_vae, tiny_transformer(4))
    null = pipeline.get_unconditional_embedding(1)
    drawn: Any = pipeline(
        null,
        guidance_scale=1.0,
        latent_size=(16, 32),
        windowing=Windowing(),
        num_inference_steps=2,
        output_type="latent",
    ).images
    assert drawn.shape == (1, 16, 16, 32)


# The seam metric


def _tissue(seed: int) -> np.ndarray:
    import cv2

    rng = np.random.default_rng(seed)
    return cv2.GaussianBlur(rng.uniform(0, 255, (256, 256, 3)), (0, 0), 6) * 4.0


def test_a_smooth_image_has_no_seam_and_a_hard_tiled_one_has() -> None:
    smooth = _tissue(0)
    assert seam_ratio(smooth, [128], [128]) == pytest.approx(1.0, abs=0.25)
    tiled = np.block(
        [
            [[_tissue(1)[:128, :128]], [_tissue(2)[:128, :128]]],
            [[_tissue(3)[:128, :128]], [_tissue(4)[:128, :128]]],
        ]
    )
    assert seam_ratio(tiled, [128], [128]) > 4.0
    assert seam_ratio(np.zeros((8, 8)), [4]) == 1.0


def test_a_pattern_of_the_decoder_is_no_seam() -> None:
    image = np.random.default_rng(0).uniform(0, 1, (128, 128))
    image[:, ::8] += 3.0
    assert seam_ratio(image, columns=[64]) > 2.0
    assert seam_ratio(image, columns=[64], period=8) == pytest.approx(1.0, abs=0.1)


def test_borders_that_do_not_exist_are_refused() -> None:
    for options in (
        {},
        {"rows": [0]},
        {"columns": [8]},
        {"rows": list(range(1, 8))},
        {"rows": [4], "period": 4},
    ):
        with pytest.raises(ValueError, match="border"):
            seam_ratio(np.zeros((8, 8)), **options)


def test_hard_cut_windows_score_worse_than_blended_ones() -> None:
    """The net paints every window in a shade of its own; only the weights decide whether borders show."""
    plan = WindowPlan.of((64, 64), sample_size=32, tokens=1, patch=2)
    grid = torch.randn(
        1, *plan.grid_shape, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def shade(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return c.mean(dim=(1, 2))[:, None, None, None].expand_as(x)

    latents = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    blended, _ = _windowed(shade, plan, grid)
    hard_plan = WindowPlan.of((64, 64), sample_size=32, tokens=1, patch=2, stride=32)
    hard, _ = _windowed(shade, hard_plan, grid)
    texture = 0.02 * np.random.default_rng(0).standard_normal((64, 64, 3))
    scores = [
        seam_ratio(net(latents, TIME)[0].permute(1, 2, 0).numpy() + texture, [32], [32])
        for net in (blended, hard)
    ]
    assert scores[0] < 2.0 < 5.0 < scores[1]


def test_the_starter_draws_without_seams_where_hard_tiling_shows_them() -> None:
    """Unlike neighbours by intent: random embeddings, so that every cell asks for another tissue."""
    pipeline = PixCellPipeline(load_autoencoder(), load_transformer())
    grid = torch.randn(1, 3, 3, 256, generator=torch.Generator().manual_seed(0))
    borders = [128, 256]
    scores = {}
    for name, stride in (("overlapping", 8), ("hard", 16)):
        images: Any = pipeline(
            grid,
            num_inference_steps=6,
            generator=[torch.Generator().manual_seed(1)],
            windowing=Windowing(stride=stride, batch_size=9),
            output_type="np",
        ).images
        scores[name] = seam_ratio(images[0], borders, borders, period=8)
    assert scores["overlapping"] < 1.25
    assert scores["hard"] > 1.3 * scores["overlapping"]
