"""The three methods behind one node."""
