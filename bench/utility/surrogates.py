"""What a model's surrogates are worth: Frechet distance to held-out real tiles, and as training data for them.

All models are asked for the same tiles: the same conditions (embeddings of tiles of patients that are not held out, as
many of each class), the same starting noise. So the conditions are not private here; what is compared is the model.
Features are those of EfficientNet-Lite0 (ImageNet), which had no part in the generator. The Frechet distance is taken
after projection on the 64 main directions of public tiles, since a few hundred tiles say nothing about more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pixcell_core.diffusion import PixCellPipeline, default_scheduler
from pixcell_core.evaluation.frechet import frechet_distance
from pixcell_core.evaluation.tile_eye import TileEye
from pixcell_core.starter import load_autoencoder
from utility.sites import SIDE, SitePatients

Floats = npt.NDArray[np.float64]

DIRECTIONS = 64
AT_ONCE = 80


@dataclass(frozen=True)
class Worth:
    """Frechet distance (squared, 64 directions), and balanced accuracies on held-out real tiles, 0..1."""

    frechet: float
    linear: float
    nearest: float


class SurrogateTest:
    """Draws surrogates of a model and judges them; everything but the model is fixed when it is built."""

    def __init__(
        self,
        public: SitePatients,
        held_out: SitePatients,
        training: SitePatients,
        *,
        count: int,
        sampling_steps: int = 12,
        guidance_scale: float = 2.0,
    ) -> None:
        self._steps, self._guidance = sampling_steps, guidance_scale
        self._eye = TileEye()
        seen = self._look(public.pixels)
        self._centre = seen.mean(0)
        self._axes: Floats = np.linalg.svd(seen - self._centre, full_matrices=False)[2][:DIRECTIONS]
        self._real = self._look(held_out.pixels)
        self._real_labels = held_out.labels.flatten().numpy()
        self._conditions, self._labels = balanced_conditions(training, count)
        self._noise = torch.randn(
            (len(self._labels), 16, SIDE // 8, SIDE // 8), generator=torch.Generator().manual_seed(9)
        )
        self._autoencoder = load_autoencoder()

    def real_data(self, training: SitePatients, count: int) -> Worth:
        """The ceiling: as many real tiles of the training patients instead of surrogates."""
        pixels, labels = training.pixels.flatten(0, 1), training.labels.flatten()
        rows = balanced_rows(labels, count)
        return self._judge(self._look(pixels[rows][:, None]), labels[rows].numpy())

    def worth(self, model: nn.Module) -> tuple[Worth, npt.NDArray[np.uint8]]:
        """The worth of a model's surrogates, and the surrogates (count, 64, 64, 3) to look at."""
        given: Any = model
        pipeline = PixCellPipeline(self._autoencoder, given, default_scheduler())
        images = []
        for start in range(0, len(self._conditions), AT_ONCE):
            at = slice(start, start + AT_ONCE)
            drawn: Any = pipeline(
                uni_embeds=self._conditions[at],
                latents=self._noise[at],
                guidance_scale=self._guidance,
                num_inference_steps=self._steps,
                latent_size=(SIDE // 8, SIDE // 8),
                output_type="np",
            )
            images.append(drawn.images)
        pixels = np.concatenate(images)
        return self._judge(self._look(torch.from_numpy(pixels)[:, None]), self._labels), pixels

    def _look(self, pixels: torch.Tensor) -> Floats:
        flat = pixels.flatten(0, 1).numpy()
        return np.concatenate([self._eye.look(flat[i : i + AT_ONCE]) for i in range(0, len(flat), AT_ONCE)])

    def _judge(self, features: Floats, labels: npt.NDArray[np.int64]) -> Worth:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        linear = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000)
        )
        nearest = make_pipeline(StandardScaler(), KNeighborsClassifier(5, metric="cosine"))
        scores = [
            float(balanced_accuracy_score(self._real_labels, c.fit(features, labels).predict(self._real)))
            for c in (linear, nearest)
        ]
        distance = frechet_distance(self._project(self._real), self._project(features)).value
        return Worth(distance, scores[0], scores[1])

    def _project(self, features: Floats) -> Floats:
        projected: Floats = (features - self._centre) @ self._axes.T
        return projected


def balanced_rows(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Rows of `count` tiles, as many of each class as there are, evenly over the patients."""
    classes = labels.unique().tolist()
    rng = torch.Generator().manual_seed(8)
    picked = []
    for code in classes:
        rows = (labels == code).nonzero().flatten()
        picked.append(rows[torch.randperm(len(rows), generator=rng)[: count // len(classes)]])
    return torch.cat(picked)


def balanced_conditions(training: SitePatients, count: int) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """Embeddings (count, 1, d) of training tiles and their labels (count,)."""
    labels = training.labels.flatten()
    rows = balanced_rows(labels, count)
    return training.embeddings.flatten(0, 1)[rows], labels[rows].numpy()
