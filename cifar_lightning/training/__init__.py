"""ImageClassifier and its callbacks."""
