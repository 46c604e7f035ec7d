"""Benchmarks of the losses against what people use today: the cases behind `kldiv bench` and `benchmarks/`."""

from __future__ import annotations
