"""Detectors, Scale Net and their weights: the modules that import torch or onnxruntime, without Ray."""
