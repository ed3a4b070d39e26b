"""Text as it lies on disks, and domain labels for it."""
