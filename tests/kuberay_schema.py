"""The fields of KubeRay's RayJob (ray.io/v1) as its API reference documents them, and those of pods that we use.

KubeRay checks a manifest against its custom resource definition, which no Python package ships.
"""

from __future__ import annotations

from typing import Any

__all__ = ["RAY_JOB"]


def _object(fields: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


_TEXT = {"type": "string"}
_FLAG = {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^[0-9.]+(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"},
}
_RESOURCES = _object({"requests": _QUANTITIES, "limits": _QUANTITIES})
_ENVIRONMENT = {
    "type": "array",
    "items": _object({"name": _TEXT, "value": _TEXT, "valueFrom": {"type": "object"}}, "name"),
}
_MOUNTS = {
    "type": "array",
    "items": _object({"name": _TEXT, "mountPath": _TEXT, "readOnly": _FLAG}, "name", "mountPath"),
}
_CONTAINER = _object(
    {
        "name": _TEXT,
        "image": _TEXT,
        "imagePullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
        "command": {"type": "array", "items": _TEXT},
        "args": {"type": "array", "items": _TEXT},
        "env": _ENVIRONMENT,
        "resources": _RESOURCES,
        "volumeMounts": _MOUNTS,
        "securityContext": {"type": "object"},
    },
    "name",
    "image",
)
_MEMORY = _object({"medium": {"enum": ["", "Memory"]}, "sizeLimit": _TEXT})
_TOLERATION = _object(
    {
        "key": _TEXT,
        "operator": {"enum": ["Exists", "Equal"]},
        "value": _TEXT,
        "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
    }
)
_POD_TEMPLATE = _object(
    {
        "metadata": {"type": "object"},
        "spec": _object(
            {
                "serviceAccountName": _TEXT,
                "nodeSelector": _TEXTS,
                "tolerations": {"type": "array", "items": _TOLERATION},
                "containers": {"type": "array", "items": _CONTAINER, "minItems": 1},
                "volumes": {"type": "array", "items": _object({"name": _TEXT, "emptyDir": _MEMORY}, "name")},
            },
            "containers",
        ),
    },
    "spec",
)
_HEAD_GROUP = _object(
    {
        "template": _POD_TEMPLATE,
        "headService": {"type": "object"},
        "enableIngress": _FLAG,
        "rayStartParams": _TEXTS,
        "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
    },
    "template",
)
_WORKER_GROUP = _object(
    {
        "groupName": _TEXT,
        "replicas": _COUNT,
        "minReplicas": _COUNT,
        "maxReplicas": _COUNT,
        "idleTimeoutSeconds": _COUNT,
        "numOfHosts": {"type": "integer", "minimum": 1},
        "suspend": _FLAG,
        "rayStartParams": _TEXTS,
        "scaleStrategy": _object({"workersToDelete": {"type": "array", "items": _TEXT}}),
        "template": _POD_TEMPLATE,
    },
    "groupName",
    "template",
)
_AUTOSCALER = _object(
    {
        "version": {"enum": ["v1", "v2"]},
        "idleTimeoutSeconds": _COUNT,
        "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
        "resources": _RESOURCES,
        "image": _TEXT,
        "imagePullPolicy": _TEXT,
        "env": _ENVIRONMENT,
        "envFrom": {"type": "array"},
        "securityContext": {"type": "object"},
        "volumeMounts": _MOUNTS,
    }
)
_CLUSTER = _object(
    {
        "rayVersion": _TEXT,
        "authOptions": _object({"mode": {"enum": ["disabled", "token"]}}),
        "enableInTreeAutoscaling": _FLAG,
        "autoscalerOptions": _AUTOSCALER,
        "gcsFaultToleranceOptions": {"type": "object"},
        "headServiceAnnotations": _TEXTS,
        "suspend": _FLAG,
        "managedBy": _TEXT,
        "headGroupSpec": _HEAD_GROUP,
        "workerGroupSpecs": {"type": "array", "items": _WORKER_GROUP},
    },
    "headGroupSpec",
)

RAY_JOB: dict[str, Any] = _object(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": _object(
            {
                # A Kubernetes Job is named after it, with a suffix.
                "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47},
                "namespace": _TEXT,
                "labels": _TEXTS,
                "annotations": _TEXTS,
            },
            "name",
        ),
        "spec": _object(
            {
                "entrypoint": _TEXT,
                "runtimeEnvYAML": _TEXT,
                "jobId": _TEXT,
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
                "submitterPodTemplate": _POD_TEMPLATE,
                "submitterConfig": _object({"backoffLimit": _COUNT}),
                "entrypointNumCpus": {"type": "number"},
                "entrypointNumGpus": {"type": "number"},
                "entrypointResources": _TEXT,
                "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
                "backoffLimit": _COUNT,
                "shutdownAfterJobFinishes": _FLAG,
                "ttlSecondsAfterFinished": _COUNT,
                "deletionStrategy": {"type": "object"},
                "suspend": _FLAG,
                "schedule": _TEXT,
                "managedBy": _TEXT,
                "metadata": _TEXTS,
                "clusterSelector": _TEXTS,
                "rayClusterSpec": _CLUSTER,
            },
            "entrypoint",
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)
"""A JSON schema that refuses whatever is not among those fields."""
