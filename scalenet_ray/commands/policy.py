"""`scalenet-ray policy`: print, check or list policies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import tyro
import yaml

from scalenet_ray.console import say
from scalenet_ray.core.bounds import ONE_OR_MORE, SHARE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.merge import Merging
from scalenet_ray.core.policy import parse_policy
from scalenet_ray.core.policy_form import check_names, describe_policy
from scalenet_ray.data.policy_files import read_policies

POLICIES = {
    "whole": "the whole image at the detector's input side; no zoom",
    "whole@SIZE": "the whole image with its longer side resized to SIZE pixels",
    "pyramid": "the whole image at 1, 1.5 and 2 times the input side; larger sizes keep small boxes only",
    "grid-N": "the whole image and N x N overlapping windows",
    "slices@PIXELS": "the whole image and overlapping squares of PIXELS image pixels, as sliced inference cuts them",
    "random": "the whole image and two random windows",
    "regions": "rectangles around small objects of the detector's first pass, zoomed by their size; the default",
    "regions-scalenet": "the same, around the small objects of Scale Net's class maps; needs --scale-net",
    "regions-oracle": "the same, around the ground truth's small objects, an upper bound; for eval only",
    "paper": "Algorithm 1 with the paper's parameters for COCO; needs --scale-net",
    "first-pass": "the recursion on the boxes of the detector's first pass; needs no Scale Net",
    "scalenet": "the recursion on Scale Net's class or regression maps; needs --scale-net",
    "module:function": "the whole image and the windows that your function plans",
    "oracle": "the recursion on the ground truth, an upper bound; for eval only",
}
"""Named policies, with a line each."""

_ANY_SIDE = 640
"""Input side to check a file with that leaves it to the detector."""


@dataclass(frozen=True)
class PrintPolicy:
    """Print a named policy as the YAML that --policy-file reads, check such a file, or list the names.

    Without arguments: list the names.

    Attributes:
        name: the policy to print, e.g. first-pass, whole@640 or grid-2.
        input_side: side of the whole image's tile, in pixels; if left out, the detector's in a run.
        iou_threshold: of NMS when windows are merged; if left out, the detector's in a run.
        policy_file: YAML to check, in place of a name.
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    input_side: Annotated[int, ONE_OR_MORE] | None = None
    iou_threshold: Annotated[float, SHARE] | None = None
    policy_file: str | None = None


def main(job: PrintPolicy) -> int:
    """Print a policy, a file's policies in words, or the names. Returns the exit status."""
    if job.name is not None and job.policy_file is not None:
        msg = f"policy takes a name or --policy-file, got {job.name} and {job.policy_file}: leave one out"
        raise UserError(msg)
    threshold = Merging.iou_threshold if job.iou_threshold is None else job.iou_threshold
    named = partial(parse_policy, input_side=job.input_side or _ANY_SIDE, iou_threshold=threshold)
    if job.policy_file is not None:
        policies = check_names(read_policies(job.policy_file, named))
        for policy in policies:
            side = f"tiles of up to {policy.largest_side} pixels at an input side of {policy.input_side}"
            say(f"{policy.name}: {policy.kind}, {side}")
        say(f"{job.policy_file} is valid, policies: {len(policies)}")
    elif job.name is None:
        width = max(map(len, POLICIES))
        for name, line in POLICIES.items():
            say(f"{name.ljust(width)}  {line}")
    else:
        given = {"input_side": job.input_side, "iou_threshold": job.iou_threshold}
        say(yaml.safe_dump(describe_policy(job.name, named(job.name), **given), sort_keys=False).rstrip())
    return 0
