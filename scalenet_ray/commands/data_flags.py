"""Flags that name an annotated data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from scalenet_ray.core.bounds import ONE_OR_MORE
from scalenet_ray.training.examples import TrainingImages


@dataclass(frozen=True)
class AnnotatedData:
    """An annotated data set; the embedded sample where none is named.

    Attributes:
        data: a folder in the layout of COCO (SPLIT/ and annotations/instances_SPLIT.json), VOC or VisDrone, or a YOLO
            data.yaml; local, s3://, gs://, az://, hf:// or https://.
        annotations: in place of --data, with --images: an instances file, or a folder of VOC's or VisDrone's label
            files. {split} stands for the split's name.
        images: folder of the images of --annotations.
    """

    data: str | None = None
    annotations: str | None = None
    images: str | None = None

    @property
    def is_sample(self) -> bool:
        """True if no data set is named."""
        return self.data is None and self.annotations is None and self.images is None

    def named(self) -> dict[str, str | None]:
        """The three flags, as the run folder's settings hold them."""
        return {"data": self.data, "annotations": self.annotations, "images": self.images}


@dataclass(frozen=True)
class TrainingData(AnnotatedData):
    """Training and validation images of an annotated data set.

    Attributes:
        split: training split.
        val_split: validation split, evaluated after each epoch.
        holdout: share of the training split that is held out for validation, in place of --val-split.
        limit: only the first so many images of each split.
        output: the run folder, local, s3://, gs:// or az://; by default a new one under runs/.
        resume: continue the run in the output folder.
    """

    split: str = "train2017"
    val_split: str = "val2017"
    holdout: float = 0.0
    limit: Annotated[int, ONE_OR_MORE] | None = None
    output: str | None = None
    resume: bool = False

    def training_images(self) -> TrainingImages:
        """The images; raises as `TrainingImages`."""
        return TrainingImages(
            self.data, self.split, self.val_split, self.holdout, self.limit, self.annotations, self.images
        )
