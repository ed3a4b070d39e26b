"""What is known of a routing, for people to look at: a page, pictures, tables."""
