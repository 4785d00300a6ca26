"""Prometheus: counters and histograms of steps, retractions and heals."""

from .metrics import PrometheusObserver

__all__ = ["PrometheusObserver"]
