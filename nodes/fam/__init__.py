"""FAM, flaw activation maps (arXiv 2512.08774): show the flaw, strengthen attention there, refine it away."""
