"""Metrics computed from predictions: accuracy, calibration, confidence intervals and significance tests."""
