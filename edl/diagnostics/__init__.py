"""Seeing what experts do: sums of the routing, records of it, measures, and tests of what they say."""
