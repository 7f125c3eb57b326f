"""Flags of the commands that run a detector over many images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from scalenet_ray.console import say
from scalenet_ray.core.bounds import ABOVE_ZERO, MEGAPIXELS, ONE_OR_MORE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.policy_form import policy_to_dict
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.local import Session
from scalenet_ray.runs.resources import ResourceChoice
from scalenet_ray.workflows.preparation import EngineName, start_session
from scalenet_ray.workflows.run_report import PICTURES


@dataclass(frozen=True)
class RunFlags:
    """Flags of a run over many images.

    Attributes:
        limit: only the first so many images.
        output: the run folder, local, s3://, gs:// or az://; by default a new one under runs/.
        resume: continue the run in the output folder.
        retry_failed: with --resume: also process the images that failed before.
        max_failures: images that may fail before the exit status is 1.
        smallest_object: side of the smallest object worth finding, in image pixels, for regions; 16 by default.
        max_image_megapixels: larger images are refused before they are decoded, except TIFFs that are read by window.
        report_pictures: photographs in report.html.
        engine: ray (actors, here or on a cluster) or local (one process).
    """

    limit: Annotated[int, ONE_OR_MORE] | None = None
    output: str | None = None
    resume: bool = False
    retry_failed: bool = False
    max_failures: int = 0
    smallest_object: Annotated[float, ABOVE_ZERO] | None = None
    max_image_megapixels: Annotated[float, MEGAPIXELS] = 200.0
    report_pictures: int = PICTURES
    engine: EngineName = "ray"
    networks: Annotated[NetworkSpec, tyro.conf.OmitArgPrefixes] = field(default_factory=NetworkSpec)
    resources: Annotated[ResourceChoice, tyro.conf.OmitArgPrefixes] = field(default_factory=ResourceChoice)

    def start(self) -> Session:
        """Check what can be checked before any work, and start the engine.

        Raises:
            UserError: if --retry-failed is given without --resume; or as `RunFolder.check_output` and `start_session`.
        """
        if self.retry_failed and not self.resume:
            msg = "--retry-failed tries a run's failed images again, got no --resume: add it, and the run's --output"
            raise UserError(msg)
        RunFolder.check_output(self.output, resume=self.resume)
        session = start_session(self.engine, self.resources, self.networks)
        say("checking the images and the networks")
        return session

    def run_settings(self, policies: Sequence[Policy]) -> dict[str, Any]:
        """The settings in config.yaml that all such commands have."""
        return {
            "limit": self.limit,
            "max_image_megapixels": self.max_image_megapixels,
            "networks": self.networks.settings(),
            "policies": [policy_to_dict(policy) for policy in policies],
        }
