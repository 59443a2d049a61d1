"""Results of a run as insights, charts, terminal tables and one HTML page."""
