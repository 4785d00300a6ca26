"""Training: the corpus of retractable agent traces, and the models that are trained on it.

`corpus` is public and needs no torch; `reference` trains the bundled chat model.
"""
