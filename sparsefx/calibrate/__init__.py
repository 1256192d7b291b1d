"""Calibration data through a model: the sequential driver, its statistics, and attention."""
