"""What was said and what was taken back: rendered threads, and the durable records of retractions."""
