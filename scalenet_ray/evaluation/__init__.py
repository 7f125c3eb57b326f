"""Figures of merit of detections: AP, error kinds, comparison of policies."""
