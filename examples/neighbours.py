"""How close embeddings stay to others of the same texts: a mean cosine, and common neighbours.

Where neighbours are near each other, a small error changes them: run it to see how many random
embeddings of norm 1 keep with errors of their own.
"""

import numpy as np


def neighbours(embeddings, count=5):
    """The nearest other rows of each row."""
    return np.argsort(2 * np.eye(len(embeddings)) - embeddings @ embeddings.T)[:, :count]


def compare(embeddings, original):
    """Mean cosine of two embeddings of the same texts, and the share of common neighbours."""
    pairs = zip(neighbours(embeddings), neighbours(original), strict=True)
    recall = np.mean([len(set(a) & set(b)) / 5 for a, b in pairs])
    return float(np.mean(np.sum(embeddings * original, 1))), float(recall)


def main(errors=(0.0, 0.03, 0.1, 0.3), texts=200, width=32):
    """Prints cosine and recall for errors of these norms, and returns them."""
    rng, found = np.random.default_rng(0), []
    original = rng.normal(size=(texts, width))
    original /= np.linalg.norm(original, axis=1, keepdims=True)
    for error in errors:
        noisy = original + error / np.sqrt(width) * rng.normal(size=original.shape)
        found.append(compare(noisy / np.linalg.norm(noisy, axis=1, keepdims=True), original))
        print(f"error {error:.2f}: cosine {found[-1][0]:.4f}, recall {found[-1][1]:.2f}")
    return found


if __name__ == "__main__":
    main()
