"""Sums over tokens that several ranks and micro-batches hold, of which each rank differentiates its own part."""
