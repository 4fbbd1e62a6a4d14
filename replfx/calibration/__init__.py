"""Calibration: start replaced blocks where they imitate the blocks that they replace, by least squares."""

from replfx.calibration.loop import calibrate

__all__ = ["calibrate"]
