"""kv-retract."""
