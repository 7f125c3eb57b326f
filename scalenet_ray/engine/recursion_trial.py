"""One trial of a sweep: a policy over growing subsets of the images, in one process, with kept answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from scalenet_ray.core.answers import RaisedOn, fails_on_all
from scalenet_ray.core.coco import CocoDataset, ImageRecord, read_annotations, to_results
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.evaluation import evaluate
from scalenet_ray.core.ground_truth import oracle_from
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.core.search_space import changed_policy
from scalenet_ray.engine.batch import image_opener
from scalenet_ray.engine.kept import Kept, KeptDetector, KeptScale
from scalenet_ray.models.networks import NetworkNames

__all__ = ["RecursionTrial", "TrialTask"]


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a sweep do alike.

    Attributes:
        policies: those that trials start from, by name.
        networks: the detector and Scale Net.
        annotations: address of the instances file.
        folder: of the images.
        subsets: how many images each step ends at, the last one all; what is stopped early saw fewer.
        ceiling: the most detector passes an image; None to ask for the whole front.
        max_pixels: larger images are refused before they are decoded.
    """

    policies: Mapping[str, Policy]
    networks: NetworkNames
    annotations: str
    folder: str
    subsets: tuple[int, ...]
    ceiling: float | None
    max_pixels: int


class RecursionTrial(tune.Trainable):
    """A policy, step by step over more images; each step tells what it found on all of them so far.

    Results: "AP_small", "AP", "AP_large" in percent, "passes" an image, "images_failed", "score" (AP_small, or below 0
    by how far the passes exceed the ceiling), "hits" and "misses" of what was kept.
    """

    # What comes after the configuration is given by `tune.with_parameters`.
    def setup(self, config: dict[str, Any], task: TrialTask, keeper: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load what all policies need; an actor goes on to its next trial with it."""
        self._task = task
        self._kept = Kept(keeper)
        self._dataset: CocoDataset = read_annotations(task.annotations)
        self._detector = task.networks.load_detector(self._dataset.categories, self._dataset.unused_categories)
        self._predictors: dict[str, Any] = {}
        self._open_image = image_opener(task.folder, task.max_pixels)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial."""
        self.config = new_config
        values = {path: value for path, value in new_config.items() if path != "policy"}
        self._policy = changed_policy(self._task.policies[new_config["policy"]], "trial", values)
        self._kept.begin()
        self._results: list[dict[str, Any]] = []
        self._passes = 0.0
        self._failed = self._done = 0
        self._raised = RaisedOn()
        return True

    def step(self) -> dict[str, Any]:
        """Work through the images up to the end of the next subset."""
        self._kept.fetch()
        end = next((size for size in self._task.subsets if size > self._done), self._task.subsets[-1])
        for images, record in enumerate(self._dataset.images[self._done : end], start=self._done + 1):
            self._work(record, no_more=images == self._task.subsets[-1])
        self._done = end
        self._kept.share()
        ids = [record.image_id for record in self._dataset.images[:end]]
        figures = evaluate(self._dataset, self._results, image_ids=ids)
        passes = self._passes / max(1, end - self._failed)
        ceiling = self._task.ceiling
        return {
            **{name: figures[name] for name in ("AP", "AP_small", "AP_large")},
            "passes": passes,
            "score": figures["AP_small"] if ceiling is None or passes <= ceiling else ceiling - passes,
            "images": end,
            "images_failed": self._failed,
            "hits": self._kept.hits,
            "misses": self._kept.misses,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial that is cut short begins anew, on what was kept."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing; see `save_checkpoint`."""

    def _work(self, record: ImageRecord, *, no_more: bool) -> None:
        try:
            image = self._open_image(record)
        except TileError:
            self._failed += 1
            return
        result = recursive_detect(
            image,
            record.image_id,
            self._policy,
            detect=KeptDetector(self._detector, self._kept),
            predict_scale=self._predictor(self._policy),
        )
        self._failed += result.failure is not None
        self._raised.add(result.failure and result.failure.reason)
        if self._raised.all_of_the_first(no_more=no_more):
            raise fails_on_all(self._raised.reason, self._raised.images)
        self._passes += result.detector_passes if result.failure is None else 0.0
        self._results += to_results(record.image_id, result.detections, result.image_hw)

    def _predictor(self, policy: Policy) -> Any:
        """What tells scales to a policy, made once for all trials of this process."""
        if not policy.needs_network and policy.kind != "oracle":
            return None
        kind = "oracle" if policy.kind == "oracle" else "scale net"
        if kind not in self._predictors:
            if kind == "oracle":
                self._predictors[kind] = oracle_from(self._task.annotations)
            else:
                self._predictors[kind] = KeptScale(self._task.networks.load_scale_net(), self._detector, self._kept)
        return self._predictors[kind]
