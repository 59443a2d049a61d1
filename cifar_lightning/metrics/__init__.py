"""Numbers from predictions: rates, calibration, intervals and tests."""
