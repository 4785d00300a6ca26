"""Measure erasers: replay recorded threads, time edits, report. Ships as `kv_retract.evals`; the CLI runs it."""
