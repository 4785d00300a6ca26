"""OpenTelemetry: spans of steps, retractions and heals."""

from .tracing import TracingObserver

__all__ = ["TracingObserver"]
