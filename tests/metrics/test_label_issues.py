import numpy as np

from cifar_lightning.metrics.label_issues import find_label_issues, noise_counts, self_confidence


def noisy(num_classes=4, n=2000, changed=0.05, seed=0):
    """Return probabilities of a fair model, labels of which some are changed, and which ones those are."""
    rng = np.random.default_rng(seed)
    true = rng.integers(num_classes, size=n)
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), true] += 4
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    is_changed = rng.random(n) < changed
    labels = np.where(is_changed, (true + rng.integers(1, num_classes, size=n)) % num_classes, true)
    return probs, labels, is_changed


def test_changed_labels_are_found():
    probs, labels, is_changed = noisy()
    found = find_label_issues(probs, labels)
    hits = is_changed[found].sum()
    assert hits / len(found) > 0.9
    assert hits / is_changed.sum() > 0.9
    assert is_changed[found[:50]].all()  # the first are the surest


def test_counts_equal_the_papers_definition_image_by_image():
    probs, labels, _ = noisy(n=300, seed=1)
    thresholds = [np.mean([p[k] for p, label in zip(probs, labels, strict=True) if label == k]) for k in range(4)]
    joint = np.zeros((4, 4))
    for p, label in zip(probs, labels, strict=True):
        above = [k for k in range(4) if p[k] >= thresholds[k]]
        if above:
            joint[label, max(above, key=lambda k: p[k])] += 1
    expected = [np.rint(joint[k] / joint[k].sum() * np.sum(labels == k)) for k in range(4)]
    assert (noise_counts(probs, labels) == expected).all()


def test_of_each_pair_of_classes_the_largest_margins_are_taken():
    probs, labels, _ = noisy(n=300, seed=2)
    expected = set()
    for label, row in enumerate(noise_counts(probs, labels)):
        for other, num in enumerate(row):
            margins = sorted((p[label] - p[other], i) for i, p in enumerate(probs) if labels[i] == label)
            expected |= {i for _, i in margins[:num] if label != other and probs[i].argmax() != label}
    found = find_label_issues(probs, labels).tolist()
    assert set(found) == expected
    assert np.all(np.diff(self_confidence(probs, labels)[found]) >= 0)


def test_a_model_without_mistakes_has_no_issue():
    labels = np.arange(30) % 3
    assert not len(find_label_issues(np.full((30, 3), 0.1) + 0.7 * np.eye(3)[labels], labels))


def test_classes_without_images_are_suggested_for_none():
    labels = np.zeros(10, np.int64)
    probs = np.tile([0.2, 0.8], (10, 1))
    assert not len(find_label_issues(probs, labels))
