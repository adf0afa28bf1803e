"""TAG, temporal alignment guidance (arXiv 2510.11057): a sample that left the manifold of its step is pulled back."""
