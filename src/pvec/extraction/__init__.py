"""From a trait to its persona vector: generate, judge, filter, compute."""
