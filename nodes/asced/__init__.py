"""ASCED: find regions whose score dynamics are abnormal while sampling, and renoise just those (arXiv 2503.16218)."""
