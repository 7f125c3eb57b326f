"""Detection in many images from Python: an iterator of predictions, as `scalenet-ray detect` does it."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, cast, overload

from scalenet_ray.api.inputs import Images, InputImages, check_threshold, collect_images
from scalenet_ray.api.prediction import Prediction
from scalenet_ray.api.scaled_prediction import ready_policy
from scalenet_ray.core.detections import Detections, Failure
from scalenet_ray.core.errors import UserError, needs_extra
from scalenet_ray.core.geometry import AnyImage
from scalenet_ray.core.networks import AnyScalePredictor
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.policy_form import policy_to_dict
from scalenet_ray.data.categories import classes_named
from scalenet_ray.models.detectors import Detector
from scalenet_ray.models.spec import AUTO, SAMPLE_DETECTOR, SAMPLE_SCALE_NET, DetectorInfo, NetworkSpec
from scalenet_ray.runs.batch import Progress
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.resources import ResourceChoice
from scalenet_ray.runs.results import image_results
from scalenet_ray.workflows.detection import DetectionRun
from scalenet_ray.workflows.preparation import EngineName, named_policies, prepare_run, settle_workers, start_session

if TYPE_CHECKING:
    import ray.data

_IMAGES_PER_TABLE = 256
_COLUMNS = ("source", "category", "score", "x0", "y0", "x1", "y1", "depth")


@dataclass(frozen=True, eq=False, repr=False)
class ImagePrediction(Prediction):
    """Objects found in one of many images.

    Attributes:
        source: the image's address, or "image 3" for the fourth of images that are given as pixels.
        detections: merged, in image pixels, the best first; none if the image failed.
        categories: category id -> name.
        size: (height, width), in pixels; (0, 0) if the image could not be read.
        failure: stage and reason, if the image could not be processed; else None.
        row: the other values of the image's row, if the images came as rows.
        read: reads the image anew.
    """

    source: str
    detections: Detections
    categories: Mapping[int, str]
    size: tuple[int, int]
    failure: Failure | None
    row: Mapping[str, Any]
    read: Callable[[], AnyImage]

    @property
    def pixels(self) -> AnyImage:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[h, w, 3] uint8 RGB, read anew; of a large TIFF its windows, read on demand.

        Raises:
            TileError: if the image cannot be read.
        """
        return self.read()

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width), in pixels."""
        return self.size

    def __repr__(self) -> str:
        """One line: the source, and what was found in it."""
        what = f"failed: {self.failure.reason}" if self.failure is not None else self.in_words()
        return f"ImagePrediction({self.source}: {what})"


class Predictions:
    """Iterator of predictions, in the order in which the images finish; the result of `detect`.

    Attributes:
        total: number of images.
    """

    def __init__(
        self, predictions: Generator[ImagePrediction, None, None], total: int, columns: Collection[str] = ()
    ) -> None:
        self._predictions, self._columns = predictions, columns
        self.total = total
        # Writes what is done and releases the run, also at the end of the interpreter.
        weakref.finalize(self, predictions.close)

    def __iter__(self) -> Iterator[ImagePrediction]:
        """The iterator itself: each prediction is yielded once."""
        return self

    def __repr__(self) -> str:
        """One line: the number of images."""
        return f"Predictions({self.total} image{'' if self.total == 1 else 's'})"

    def __next__(self) -> ImagePrediction:
        """The next image's prediction; waits until it is done."""
        return next(self._predictions)

    def to_dataset(self) -> ray.data.Dataset:
        """A `ray.data.Dataset` with a row per object of the images that are left; waits until all are done.

        Columns are source, category, score, x0, y0, x1, y1 (image pixels), depth, and those of the images' rows. Images
        that failed have no rows, and a warning names how many they are and the reason of the first.

        Raises:
            UserError: if a column of the images' rows has the name of one of the objects', before the work.
        """
        with needs_extra():
            import pandas as pd
            import ray.data
        if shared := [name for name in _COLUMNS if name in self._columns]:
            msg = (
                f"columns of rows must have other names than those of the objects, {', '.join(_COLUMNS)}, got "
                f"{', '.join(shared)}: rename them"
            )
            raise UserError(msg)
        failed: list[ImagePrediction] = []
        blocks = []
        while images := list(islice(self, _IMAGES_PER_TABLE)):
            failed += [image for image in images if image.failure is not None]
            rows = [row for image in images for row in _rows(image)]
            if rows:
                blocks.append(pd.DataFrame(rows))
        if failed:
            msg = f"{len(failed)} of {self.total} images failed and have no rows, the first is {failed[0]!r}"
            warnings.warn(msg, stacklevel=2)
        return ray.data.from_pandas(blocks) if blocks else ray.data.from_items([])


def _rows(image: ImagePrediction) -> Iterator[dict[str, Any]]:
    found = image.detections
    names = [image.categories[label] for label in found.labels.tolist()]
    columns = names, found.scores.tolist(), *found.boxes.T.tolist(), found.depth.tolist()
    for values in zip(*columns, strict=True):
        yield {**image.row, **dict(zip(_COLUMNS, (image.source, *values), strict=True))}


@dataclass(frozen=True)
class _HeldNetworks(NetworkSpec):
    """Networks of which some are objects in place of names; an engine pickles them for its actors."""

    own_detector: Detector | None = None
    own_scale_net: Any = None

    def settings(self) -> dict[str, Any]:
        """Settings that the results depend on, objects by the names of their classes."""
        return NetworkSpec(**{field.name: getattr(self, field.name) for field in fields(NetworkSpec)}).settings()

    def _load(self) -> Detector:
        return super()._load() if self.own_detector is None else self.own_detector

    def load_scale_net(self) -> Any:
        """Scale Net or a scale head, loaded by its name or given as an object."""
        return super().load_scale_net() if self.own_scale_net is None else self.own_scale_net


def _networks(detector: str | Detector | None, scale_net: str | AnyScalePredictor | None, device: str) -> NetworkSpec:
    if detector is None:
        detector, scale_net = SAMPLE_DETECTOR, scale_net or SAMPLE_SCALE_NET
    return _HeldNetworks(
        detector=detector if isinstance(detector, str) else type(detector).__name__,
        scale_net=scale_net if scale_net is None or isinstance(scale_net, str) else type(scale_net).__name__,
        device=device,
        own_detector=None if isinstance(detector, str) else detector,
        own_scale_net=None if isinstance(scale_net, str) else scale_net,
    )


def _engine(engine: EngineName | Literal["auto"], images: Any) -> EngineName:
    if engine != "auto":
        return engine
    running = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    return "ray" if running or "RAY_ADDRESS" in os.environ or hasattr(images, "iter_rows") else "local"


def _check_resumable(output: str | None, inputs: InputImages) -> None:
    if output is None or not inputs.resumable:
        lacking = "no output" if output is None else "images without addresses"
        msg = f"resume continues a run in output with images that have addresses, got {lacking}: leave resume out"
        raise UserError(msg)


def _policies(
    policy: str | Policy, networks: NetworkSpec, smallest_object: float | None, detector: DetectorInfo
) -> list[Policy]:
    """The policy, with the detector's defaults if it is given by name."""
    if isinstance(policy, Policy):
        return [ready_policy(policy, smallest_object)]
    return named_policies([policy], networks, detector, smallest_object)


class _Settings(TypedDict, total=False):
    """Arguments of `detect` that do not change the type of its result."""

    every: int
    policy: str | Policy
    smallest_object: float | None
    scale_net: str | AnyScalePredictor | None
    classes: Collection[str] | None
    confidence_threshold: float
    device: str
    engine: EngineName | Literal["auto"]
    resources: ResourceChoice | None
    output: str | None
    resume: bool
    column: str | None
    progress: Callable[[Progress], None] | None


@overload
def detect(
    images: Images,
    detector: str | Detector | None = None,
    *,
    as_dataset: Literal[False] = False,
    **settings: Unpack[_Settings],
) -> Predictions: ...


@overload
def detect(
    images: Images,
    detector: str | Detector | None = None,
    *,
    as_dataset: Literal[True],
    **settings: Unpack[_Settings],
) -> ray.data.Dataset: ...


def detect(
    images: Images,
    detector: str | Detector | None = None,
    *,
    every: int = 1,
    policy: str | Policy = "regions",
    smallest_object: float | None = None,
    scale_net: str | AnyScalePredictor | None = None,
    classes: Collection[str] | None = None,
    confidence_threshold: float = 0.3,
    device: str = AUTO,
    engine: EngineName | Literal["auto"] = "auto",
    resources: ResourceChoice | None = None,
    output: str | None = None,
    resume: bool = False,
    column: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    as_dataset: bool = False,
) -> Predictions | ray.data.Dataset:
    """Detect objects in many images with recursive zooming, as `scalenet-ray detect` does.

    Inputs and networks are checked before this returns; images are processed while the result is iterated, several at a
    time by engine ray. An image that fails costs itself alone: its prediction has the reason in `failure`.

    Args:
        images: a folder, glob or Parquet file of addresses, local or in a store; a video; one image; or an iterable of
            images, each an address, [h, w, 3] uint8 RGB array, Pillow image or encoded bytes; or of rows, dictionaries
            with an image in `column` or tuples with the image first. So data sets of Hugging Face and torch can be
            given, and a `ray.data.Dataset`.
        detector: a detector's name (`kind:what`, see `load_detector`) or a detector; None for the embedded sample's.
        every: only the first of each so many images, or frames of a video.
        policy: a policy or its name.
        smallest_object: side of the smallest object worth finding, in image pixels, for `regions`; None for 16.
        scale_net: weights of Scale Net, or a predictor; None for none, or for the embedded sample's with its detector.
        classes: only these of the detector's classes, by name; None for all.
        confidence_threshold: objects that score less are left out of the predictions, not of the run folder.
        device: torch device of networks given by name; auto: a GPU if there is one and they run on it, else the CPU.
        engine: ray (actors, here or on a cluster), local (this process), or auto: ray if Ray runs in this process,
            RAY_ADDRESS is set, or the images are a `ray.data.Dataset`; else local.
        resources: actors, batch sizes and timeouts of engine ray; what is not set is chosen by the cluster and a trial.
        output: the run folder, local, s3://, gs:// or az://, which gets the results, metrics and report of
            `scalenet-ray detect` when the last image is done; None for none.
        resume: continue the run in the output folder. Images that it holds come first, from there.
        column: the rows' column with the image; None for the first of image, uri, path, file_name that is there.
        progress: called with the progress at the beginning, about every second, and at the end.
        as_dataset: return a `ray.data.Dataset` of the objects, when all images are done.

    Returns:
        An iterator of predictions, one per image, in the order in which they finish; or `Predictions.to_dataset` of it.

    Raises:
        UserError: if an argument, the images or the networks cannot be used, with what to do.
        FileNotFoundError: if there are no such images.
    """
    check_threshold(confidence_threshold)
    if output is not None:
        RunFolder.check_output(output, resume=resume)
    classes = [classes] if isinstance(classes, str) else classes
    networks = _networks(detector, scale_net, device)
    chosen_engine = _engine(engine, images)
    session = start_session(chosen_engine, resources or ResourceChoice(), networks)
    inputs = collect_images(images, session, column, every)
    if resume:
        _check_resumable(output, inputs)
    choose = partial(_policies, policy, networks, smallest_object)
    (chosen,), info = prepare_run(session, networks, [inputs.images], choose, partial(warnings.warn, stacklevel=3))
    info = info._replace(categories=classes_named(info.categories, classes))
    networks = settle_workers(session, networks, info, [chosen], inputs.images, log=lambda line: None)
    workers = {"engine": chosen_engine, "device": networks.device, **session.settings}
    settings = {
        "images": inputs.images.source,
        "networks": networks.settings(),
        "policies": [policy_to_dict(chosen)],
        **({"classes": list(classes)} if classes is not None else {}),
        **({"every": every} if every > 1 else {}),
    }
    report = progress or (lambda progress: None)
    start = partial(
        DetectionRun, session, policy=chosen, networks=networks, detector=info, images=inputs.images, report=report
    )
    begin = partial(RunFolder.begin, settings=settings, resume=resume, workers=workers)
    predictions = _predict(start, inputs, chosen.name, info.categories, confidence_threshold, output, begin)
    # Runs up to the first image: an output folder that cannot be used is refused here.
    next(predictions)
    columns = {str(name) for row in inputs.rows.values() for name in row}
    total = len(inputs.images.images)
    result = Predictions(cast(Generator[ImagePrediction, None, None], predictions), total, columns)
    return result.to_dataset() if as_dataset else result


def _predict(
    start: Callable[[RunFolder], DetectionRun],
    inputs: InputImages,
    policy: str,
    categories: Mapping[int, str],
    threshold: float,
    output: str | None,
    begin: Callable[[RunFolder], AbstractContextManager[None]],
) -> Generator[ImagePrediction | None, None, None]:
    """Yield None when the run has begun, then the predictions: of images that are done already, then of the others."""
    with ExitStack() as stack:
        folder = output or stack.enter_context(tempfile.TemporaryDirectory(prefix="scalenet_ray-"))
        run = RunFolder(folder, is_kept=output is not None)
        stack.enter_context(begin(run))
        work = start(run)

        def prediction(
            image_id: int, found: Detections, hw: tuple[int, int] | None, failure: Failure | None
        ) -> ImagePrediction:
            """The prediction of an image of the run, with the detections that score enough."""
            found = found[found.scores >= threshold]
            record = work.records.by_id(image_id)
            read = partial(inputs.images.open_image, record)
            row = inputs.rows.get(image_id, {})
            return ImagePrediction(record.file_name, found, categories, hw or (0, 0), failure, row, read)

        yield None
        if run.resumed:
            for stored in image_results(run, policy):
                yield prediction(stored.image_id, stored.detections, stored.hw, None)
            for row in run.find_failures([policy]).to_pylist():
                yield prediction(row["image_id"], Detections.empty(), None, Failure(row["stage"], row["reason"]))
        for result in work:
            yield prediction(result.image_id, result.detections, result.image_hw, result.failure)
        if output is not None:
            work.conclude()
