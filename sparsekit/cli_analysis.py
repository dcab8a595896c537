"""The commands that look at a model before and after pruning: what it would cost, what it did cost, and why."""
