"""From bytes to finished batches."""
