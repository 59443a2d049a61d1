"""Durable checkpoints and what a resume needs."""
