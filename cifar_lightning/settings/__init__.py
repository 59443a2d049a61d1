"""Settings: their limits, YAML as users write it."""
