"""Accuracy of the recipes and of their parts, and the tables that report it."""
